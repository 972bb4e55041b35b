"""Video transformers with joint attention, with windows, or with audio."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, padded_text
from .video import FRAMES, SIDE, latent_video

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}


@diffusers_case(
    "HunyuanVideoTransformer3DModel", **_HUNYUAN, num_single_layers=1, pooled_projection_dim=16
)
def hunyuan_video() -> Inputs:
    return latent_video(
        encoder_attention_mask=padded_text(dtype=torch.int64),
        pooled_projections=randn(1, 16),
        guidance=torch.tensor([6000.0]),
    )


@diffusers_case(
    "HunyuanVideoFramepackTransformer3DModel",
    **_HUNYUAN,
    num_single_layers=1,
    pooled_projection_dim=16,
    has_image_proj=True,
    image_proj_dim=20,
    has_clean_x_embedder=True,
)
def hunyuan_framepack() -> Inputs:
    return latent_video(
        encoder_attention_mask=padded_text(dtype=torch.int64),
        pooled_projections=randn(1, 16),
        guidance=torch.tensor([6000.0]),
        image_embeds=randn(1, 17, 20),
        indices_latents=torch.arange(FRAMES),
        latents_clean=randn(1, 4, 2, SIDE, SIDE),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=randn(1, 4, 2, SIDE, SIDE),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=randn(1, 4, 4, SIDE, SIDE),
        indices_latents_history_4x=torch.arange(4),
    )


@diffusers_case(
    "HunyuanVideo15Transformer3DModel",
    **_HUNYUAN,
    patch_size=2,
    text_embed_2_dim=20,
    image_embed_dim=12,
    target_size=SIDE,
    task_type="t2v",
)
def hunyuan_video_15() -> Inputs:
    return latent_video(
        timestep=torch.tensor([500.0]),
        encoder_attention_mask=padded_text(dtype=torch.int64),
        encoder_hidden_states_2=randn(1, 16, 20),
        encoder_attention_mask_2=torch.ones(1, 16, dtype=torch.int64),
        image_embeds=torch.zeros(1, 8, 12),
    )


@diffusers_case(
    "MotifVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    num_single_layers=2,
    num_decoder_layers=1,
    text_embed_dim=24,
    rope_axes_dim=(4, 6, 6),
)
def motif_video() -> Inputs:
    return latent_video(encoder_attention_mask=padded_text())


@diffusers_case(
    "MochiTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    pooled_projection_dim=16,
    in_channels=4,
    text_embed_dim=24,
    time_embed_dim=16,
    max_sequence_length=TEXT,
)
def mochi() -> Inputs:
    return latent_video(encoder_attention_mask=padded_text())


_LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 24,
}


@diffusers_case("LTXVideoTransformer3DModel", **_LTX)
def ltx() -> Inputs:
    return {
        "hidden_states": randn(1, 300, 8),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": padded_text(dtype=torch.int64),
        "num_frames": FRAMES,
        "height": 10,
        "width": 10,
        "return_dict": False,
    }


_LTX2 = {
    **_LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}


@diffusers_case("LTX2VideoTransformer3DModel", **_LTX2)
def ltx2() -> Inputs:
    return {
        "hidden_states": randn(1, 300, 8),
        "audio_hidden_states": randn(1, 48, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "audio_encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": padded_text(dtype=torch.int64),
        "audio_encoder_attention_mask": padded_text(dtype=torch.int64),
        "num_frames": FRAMES,
        "height": 10,
        "width": 10,
        "fps": 24.0,
        "audio_num_frames": 48,
        "return_dict": False,
    }


@diffusers_case("SanaWMLTX2RefinerTransformer3DModel", **_LTX2)
def sana_wm_refiner() -> Inputs:
    return {
        "hidden_states": randn(1, 300, 8),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.full((1, 300), 500.0),
        "video_rotary_emb": (randn(1, 300, 32), randn(1, 300, 32)),
        "encoder_attention_mask": padded_text(dtype=torch.int64),
        "return_dict": False,
    }


@diffusers_case(
    "SanaVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=24,
    sample_size=SIDE,
    rope_max_seq_len=32,
)
def sana_video() -> Inputs:
    return latent_video(encoder_attention_mask=padded_text(dtype=torch.float32))


@diffusers_case(
    "SanaWMTransformer3DModel",
    tolerance=2e-2,  # it casts query, key and value to bfloat16
    in_channels=4,
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=16,
    caption_channels=24,
    image_size=SIDE,
    mixed_precision="no",
)
def sana_wm() -> Inputs:
    return {
        "hidden_states": randn(1, 4, FRAMES, 10, 10),
        "timestep": torch.full((1, 1, FRAMES), 500),
        "encoder_hidden_states": randn(1, 1, TEXT, 24),
        "encoder_attention_mask": padded_text(dtype=torch.int64),
        "return_dict": False,
    }


_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 24,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 48,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}


@diffusers_case("Kandinsky5Transformer3DModel", **_KANDINSKY)
def kandinsky5() -> Inputs:
    return {
        "hidden_states": randn(1, FRAMES, SIDE, SIDE, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": randn(1, 16),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(10), torch.arange(10)],
        "text_rope_pos": torch.arange(TEXT),
        "return_dict": False,
    }


@diffusers_case(
    "Kandinsky6Transformer3DModel",
    **_KANDINSKY,
    in_audio_dim=4,
    out_audio_dim=4,
    visual_cond=False,
)
def kandinsky6() -> Inputs:
    return {
        "hidden_states": randn(1, FRAMES, SIDE, SIDE, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "pooled_projections": randn(1, 16),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": randn(1, 48, 4),
        "encoder_attention_mask": padded_text(),
        "return_dict": False,
    }


@diffusers_case(
    "Kandinsky6SRTransformer3DModel",
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=16,
    model_dim=32,
    ff_dim=48,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
)
def kandinsky6_sr() -> Inputs:
    return {
        "hidden_states": randn(1, FRAMES, 16, 16, 9),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
