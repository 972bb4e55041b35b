"""Video transformers in the manner of Wan, CogVideoX and Latte."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, padded_text

FRAMES, SIDE = 3, 20  # patches of 2x2: 3 * 10 * 10 tokens


def latent_video(channels: int = 4, **more: object) -> Inputs:
    return {
        "hidden_states": randn(1, channels, FRAMES, SIDE, SIDE),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "return_dict": False,
        **more,
    }


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@diffusers_case("WanTransformer3DModel", **_WAN)
def wan() -> Inputs:
    return latent_video()


@diffusers_case("WanTransformer3DModel/image", **_WAN, image_dim=20, added_kv_proj_dim=32)
def wan_image() -> Inputs:
    # The sizes of CLIP and UMT5: the model splits the sequence at 512 text tokens.
    return latent_video(
        encoder_hidden_states=randn(1, 512, 24), encoder_hidden_states_image=randn(1, 257, 20)
    )


@diffusers_case("WanVACETransformer3DModel", **_WAN, vace_layers=[0], vace_in_channels=8)
def wan_vace() -> Inputs:
    return latent_video(control_hidden_states=randn(1, 8, FRAMES, SIDE, SIDE))


@diffusers_case("ChronoEditTransformer3DModel", **_WAN)
def chrono_edit() -> Inputs:
    return latent_video()


@diffusers_case("SkyReelsV2Transformer3DModel", **_WAN)
def skyreels() -> Inputs:
    return latent_video()


@diffusers_case("SkyReelsV2Transformer3DModel/diffusion_forcing", **_WAN)
def skyreels_diffusion_forcing() -> Inputs:
    return latent_video(enable_diffusion_forcing=True, timestep=torch.tensor([[500, 300, 100]]))


@diffusers_case(
    "WanAnimateTransformer3DModel",
    **_WAN | {"in_channels": 12, "num_layers": 2},
    latent_channels=4,
    image_dim=20,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)
def wan_animate() -> Inputs:
    return latent_video(
        channels=12,
        hidden_states=randn(1, 12, FRAMES + 1, SIDE, SIDE),
        encoder_hidden_states_image=randn(1, 17, 20),
        pose_hidden_states=randn(1, 4, FRAMES, SIDE, SIDE),
        face_pixel_values=randn(1, 3, 9, 16, 16),
    )


@diffusers_case(
    "AnyFlowTransformer3DModel",
    **_WAN,
)
def anyflow() -> Inputs:
    return latent_video(
        hidden_states=randn(1, FRAMES, 4, SIDE, SIDE),
        timestep=torch.full((1, FRAMES), 500.0),
        r_timestep=torch.full((1, FRAMES), 300.0),
    )


_FAR = _WAN | {"full_chunk_limit": 3, "chunk_partition": (1, 2)}


@diffusers_case("AnyFlowFARTransformer3DModel", **_FAR)
def anyflow_far() -> Inputs:
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformer3DModel

    chunks = [1, 2]
    # Built outside, as its documentation asks for under torch.compile.
    mask = AnyFlowFARTransformer3DModel(**_FAR).build_attention_mask(
        chunk_partition=chunks, height=SIDE, width=SIDE
    )
    return latent_video(
        hidden_states=randn(1, FRAMES, 4, SIDE, SIDE),
        timestep=torch.full((1, FRAMES), 500.0),
        r_timestep=torch.full((1, FRAMES), 300.0),
        chunk_partition=chunks,
        attention_mask=mask,
    )


@diffusers_case(
    "HeliosTransformer3DModel",
    **{name: value for name, value in _WAN.items() if name != "rope_max_seq_len"},
    rope_dim=(4, 6, 6),
)
def helios() -> Inputs:
    return latent_video(
        indices_hidden_states=torch.arange(FRAMES)[None],
        indices_latents_history_short=torch.arange(2)[None],
        indices_latents_history_mid=torch.arange(2)[None],
        indices_latents_history_long=torch.arange(4)[None],
        latents_history_short=randn(1, 4, 2, SIDE, SIDE),
        latents_history_mid=randn(1, 4, 2, SIDE, SIDE),
        latents_history_long=randn(1, 4, 4, SIDE, SIDE),
    )


_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": SIDE,
    "sample_height": SIDE,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


def _cogvideo(**more: object) -> Inputs:
    return latent_video(
        hidden_states=randn(1, FRAMES, 4, SIDE, SIDE),
        image_rotary_emb=(randn(300, 16), randn(300, 16)),
        **more,
    )


@diffusers_case("CogVideoXTransformer3DModel", **_COGVIDEO)
def cogvideox() -> Inputs:
    return _cogvideo()


@diffusers_case(
    "ConsisIDTransformer3DModel",
    **_COGVIDEO | {"num_attention_heads": 3},
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=16,
    cross_attn_num_heads=2,
    LFE_id_dim=20,
    LFE_vit_dim=16,
    LFE_depth=5,
    LFE_dim_head=16,
    LFE_num_heads=2,
    LFE_num_id_token=2,
    LFE_num_querie=4,
    LFE_output_dim=32,
    LFE_ff_mult=2,
    LFE_num_scale=5,
)
def consisid() -> Inputs:
    return _cogvideo(id_cond=randn(1, 20), id_vit_hidden=[randn(1, 17, 16) for _ in range(5)])


@diffusers_case(
    "LatteTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=32,
    sample_size=SIDE,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=24,
    attention_bias=True,
    video_length=FRAMES,
)
def latte() -> Inputs:
    return latent_video()


@diffusers_case(
    "TransformerTemporalModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=32,
    num_layers=2,
    norm_num_groups=4,
    cross_attention_dim=None,
)
def temporal() -> Inputs:
    return {"hidden_states": randn(256, 32, 2, 2), "num_frames": 256, "return_dict": False}


@diffusers_case(
    "AllegroTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=24,
    num_layers=2,
    cross_attention_dim=48,
    sample_height=SIDE,
    sample_width=SIDE,
    sample_frames=FRAMES,
    caption_channels=24,
)
def allegro() -> Inputs:
    angle = torch.outer(torch.arange(16), 1.0 / 10 ** torch.arange(4)).repeat(1, 2)
    axis = torch.arange(10)
    ids = torch.cartesian_prod(torch.arange(FRAMES), axis, axis).T[:, None]
    return latent_video(
        attention_mask=torch.ones(1, FRAMES, SIDE, SIDE),
        encoder_attention_mask=padded_text(dtype=torch.float32),
        image_rotary_emb=(((angle.cos(), angle.sin()),) * 3, ids),
    )


@diffusers_case(
    "EasyAnimateTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    sample_width=SIDE,
    sample_height=SIDE,
    num_layers=2,
    mmdit_layers=1,
    time_embed_dim=8,
    text_embed_dim=24,
)
def easy_animate() -> Inputs:
    return latent_video()


@diffusers_case(
    "CosmosTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    mlp_ratio=2.0,
    text_embed_dim=24,
    adaln_lora_dim=8,
    max_size=(4, 32, 32),
    concat_padding_mask=False,
)
def cosmos() -> Inputs:
    return latent_video(timestep=torch.tensor([0.7]), fps=24)
