"""Packed sequences of several modalities, and what fits nowhere else."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, grid, padded_text
from .video import latent_video


@diffusers_case(
    "MiniMaxH3Transformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    hidden_size=32,
    num_layers=2,
    num_refiner_layers=1,
    ffn_dim=48,
    in_channels=4,
    audio_in_channels=4,
    text_dim=24,
    freq_dim=16,
    time_embed_hidden_dim=32,
    time_embed_dim=16,
    rope_freq_dim=2,
)
def minimax_h3() -> Inputs:
    text, video, audio = TEXT, 256, 32
    tags = torch.tensor([1] * text + [0] * video + [2] * audio)
    index = torch.arange(text + video + audio)
    return {
        "hidden_states": randn(1, video, 16),
        "audio_hidden_states": randn(1, audio, 4),
        "encoder_hidden_states": randn(1, text, 24),
        "timestep": torch.tensor([0.7]),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.long),
        "token_tags": tags,
        "position_ids": torch.cat([torch.zeros(text, 3), grid(), torch.zeros(audio, 3)]),
        "video_indices": index[tags == 0],
        "audio_indices": index[tags == 2],
        "text_indices": index[tags == 1],
        "return_dict": False,
    }


@diffusers_case(
    "PriorTransformer",
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    embedding_dim=24,
    num_embeddings=TEXT,
)
def prior() -> Inputs:
    return {
        "hidden_states": randn(1, 24),
        "timestep": torch.tensor([500]),
        "proj_embedding": randn(1, 24),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "attention_mask": padded_text(),
        "return_dict": False,
    }


@diffusers_case(
    "QwenImage21Transformer2DModel",
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    context_in_dim=24,
    axes_dims_rope=(4, 6, 6),
)
def qwen_image21() -> Inputs:
    slots = 64  # of 2x2 latent tokens each, behind the text
    return {
        "hidden_states": randn(1, 256, 4),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 16, 16)]],
        "img_mask": (torch.arange(TEXT + slots) >= TEXT)[None],
        "encoder_hidden_states_mask": padded_text(),
        "return_dict": False,
    }


@diffusers_case(
    "Cosmos3OmniTransformer",
    dtype="float32",
    head_dim=16,
    hidden_size=64,
    intermediate_size=48,
    latent_channel=4,
    patch_latent_dim=16,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    vocab_size=64,
    rope_axes_dim=(4, 2, 2),
)
def cosmos3() -> Inputs:
    video = 2 * 10 * 10
    tokens = TEXT + video
    index = torch.arange(tokens)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": index[:TEXT],
        "position_ids": index.expand(3, tokens),
        "und_len": TEXT,
        "sequence_length": tokens,
        "vision_tokens": [randn(1, 4, 2, 20, 20)],
        "vision_token_shapes": [(2, 10, 10)],
        "vision_sequence_indexes": index[TEXT:],
        "vision_mse_loss_indexes": index[TEXT:],
        "vision_timesteps": torch.full((video,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
        "return_dict": False,
    }


@diffusers_case(
    "RFD4ProteinaTransformer",
    nlayers=2,
    token_dim=32,
    nheads=2,
    dim_cond=16,
    pair_repr_dim=8,
    latent_dim=4,
    token_type_emb_dim=8,
    cath_emb_dim=8,
    t_emb_dim=8,
    seq_sep_dim=8,
    feats_seq=("xt_bb_ca", "xt_local_latents"),
    feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
    feats_pair_repr=("xt_bb_ca_pair_dists",),
    feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
    tri_mult_c=8,
)
def proteina() -> Inputs:
    residues = 128
    nothing = torch.zeros(1, residues, dtype=torch.bool)
    return {
        "bb_ca": randn(1, residues, 3),
        "local_latents": randn(1, residues, 4),
        "bb_ca_time": torch.tensor([0.7]),
        "local_latents_time": torch.tensor([0.7]),
        "padding_mask": (torch.arange(residues) < 120)[None],
        "conditioning": {"is_in_context_conditioning": nothing, "supports_local_latent": ~nothing},
        "return_dict": False,
    }


@diffusers_case(
    "WanAnimate2Transformer3DModel",
    text_len=TEXT,
    in_dim=8,
    dim=32,
    ffn_dim=48,
    freq_dim=32,
    text_dim=24,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    use_img_emb=False,
)
def wan_animate2() -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [randn(4, 3, 20, 20)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [randn(30, 24)],
        "condition_latents": [randn(4, 3, 20, 20)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 300,
        "offset_grid_sizes": torch.tensor([[3, 10, 10]]),
        "return_dict": False,
    }


_JOY = {
    "in_channels": 4,
    "out_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


@diffusers_case("JoyImageEditTransformer3DModel", **_JOY)
def joy_image() -> Inputs:
    return latent_video()


@diffusers_case("JoyImageEditPlusTransformer3DModel", **_JOY)
def joy_image_plus() -> Inputs:
    return {
        "hidden_states": randn(1, 300, 4, 1, 2, 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "encoder_hidden_states_mask": padded_text(dtype=torch.int64),
        "shape_list": [[(1, 10, 10), (2, 10, 8)]],
        "return_dict": False,
    }
