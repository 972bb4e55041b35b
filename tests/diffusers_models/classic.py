"""Cases of the families that most pipelines build on."""

from __future__ import annotations

import torch
from torch import randn

from .case import Inputs, diffusers_case


@diffusers_case(
    "FluxTransformer2DModel",
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=(4, 4, 8),
)
def flux() -> Inputs:
    return {
        "hidden_states": randn(1, 256, 4),
        "encoder_hidden_states": randn(1, 40, 24),
        "pooled_projections": randn(1, 16),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 16, 16))).float(),
        "txt_ids": torch.zeros(40, 3),
        "return_dict": False,
    }


@diffusers_case(
    "SD3Transformer2DModel",
    sample_size=32,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=16,
    pos_embed_max_size=32,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
def sd3() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "encoder_hidden_states": randn(1, 40, 24),
        "pooled_projections": randn(1, 16),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


@diffusers_case(
    "WanTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
    rope_max_seq_len=32,
)
def wan() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 3, 20, 20),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 40, 24),
        "return_dict": False,
    }


@diffusers_case(
    "CogVideoXTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=24,
    num_layers=2,
    sample_width=20,
    sample_height=20,
    sample_frames=9,
    max_text_seq_length=40,
    use_rotary_positional_embeddings=True,
)
def cogvideox() -> Inputs:
    tokens = 3 * 10 * 10
    return {
        "hidden_states": randn(1, 3, 4, 20, 20),
        "encoder_hidden_states": randn(1, 40, 24),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (randn(tokens, 16), randn(tokens, 16)),
        "return_dict": False,
    }


@diffusers_case(
    "LTXVideoTransformer3DModel",
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    num_layers=2,
    caption_channels=24,
)
def ltx() -> Inputs:
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[:, 30:] = 0
    return {
        "hidden_states": randn(1, 3 * 10 * 10, 8),
        "encoder_hidden_states": randn(1, 40, 24),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": mask,
        "num_frames": 3,
        "height": 10,
        "width": 10,
        "return_dict": False,
    }


@diffusers_case(
    "PixArtTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    norm_num_groups=1,
    cross_attention_dim=32,
    sample_size=32,
    caption_channels=24,
    use_additional_conditions=False,
)
def pixart() -> Inputs:
    mask = torch.ones(1, 40)
    mask[:, 30:] = 0
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "encoder_hidden_states": randn(1, 40, 24),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


@diffusers_case(
    "DiTTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    norm_num_groups=1,
    sample_size=32,
    num_embeds_ada_norm=10,
)
def dit() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
        "return_dict": False,
    }
