"""Image transformers on latents [B, C, H, W]."""

from __future__ import annotations

import torch
from torch import nn, randn

from .case import Inputs, diffusers_case
from .flux_like import TEXT, padded_text


def latent_image(side: int = 32, **more: object) -> Inputs:
    return {
        "hidden_states": randn(1, 4, side, side),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
        **more,
    }


_MMDIT = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}


@diffusers_case(
    "SD3Transformer2DModel",
    **_MMDIT,
    num_layers=3,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=16,
    pos_embed_max_size=32,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
def sd3() -> Inputs:
    return latent_image(pooled_projections=randn(1, 16))


@diffusers_case(
    "AuraFlowTransformer2DModel",
    **_MMDIT,
    num_mmdit_layers=1,
    num_single_dit_layers=1,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pos_embed_max_size=256,
)
def auraflow() -> Inputs:
    return latent_image(timestep=torch.tensor([0.7]))


_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


def _cogview() -> Inputs:
    size = torch.tensor([[32.0, 32.0]])
    return latent_image(original_size=size, target_size=size, crop_coords=torch.zeros(1, 2))


@diffusers_case("CogView3PlusTransformer2DModel", **_COGVIEW, pos_embed_max_size=32, sample_size=32)
def cogview3() -> Inputs:
    return _cogview()


@diffusers_case("CogView4Transformer2DModel", **_COGVIEW, sample_size=32, rope_axes_dim=(8, 8))
def cogview4() -> Inputs:
    return _cogview()


@diffusers_case("CogView4Transformer2DModel/mask", **_COGVIEW, sample_size=32, rope_axes_dim=(8, 8))
def cogview4_mask() -> Inputs:
    return _cogview() | {"attention_mask": padded_text(dtype=torch.float32)}


@diffusers_case("GlmImageTransformer2DModel", **_COGVIEW, prior_vq_quantizer_codebook_size=16)
def glm_image() -> Inputs:
    size = torch.tensor([[32.0, 32.0]])
    return latent_image(
        prior_token_id=torch.arange(256)[None] % 16,
        prior_token_drop=torch.zeros(1, 256, dtype=torch.bool),
        target_size=size,
        crop_coords=torch.zeros(1, 2),
    )


_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "norm_num_groups": 1,
    "sample_size": 32,
}


@diffusers_case(
    "PixArtTransformer2DModel",
    **_DIT,
    cross_attention_dim=32,
    caption_channels=24,
    use_additional_conditions=False,
)
def pixart() -> Inputs:
    return latent_image(
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=padded_text(dtype=torch.float32),
    )


@diffusers_case("DiTTransformer2DModel", **_DIT, num_embeds_ada_norm=10)
def dit() -> Inputs:
    return {
        "hidden_states": randn(1, 4, 32, 32),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
        "return_dict": False,
    }


@diffusers_case(
    "Transformer2DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=32,
    num_layers=2,
    norm_num_groups=4,
    cross_attention_dim=24,
)
def transformer_2d() -> Inputs:
    return {
        "hidden_states": randn(1, 32, 16, 16),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "return_dict": False,
    }


def _dreamlite_processor(model: nn.Module) -> None:
    """The default processor of the class cannot run its own grouped queries."""
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(DreamLiteAttnProcessor2_0())


@diffusers_case(
    "DreamLiteTransformer2DModel",
    prepare=_dreamlite_processor,
    num_attention_heads=2,
    attention_head_dim=16,
    num_kv_heads=1,
    in_channels=32,
    num_layers=2,
    norm_num_groups=4,
    cross_attention_dim=24,
    qk_norm="rms_norm",
)
def dreamlite() -> Inputs:
    return {
        "hidden_states": randn(1, 32, 16, 16),
        "encoder_hidden_states": randn(1, TEXT, 24),
        "encoder_attention_mask": padded_text(dtype=torch.float32),
        "return_dict": False,
    }


@diffusers_case(
    "HunyuanDiT2DModel",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    patch_size=2,
    sample_size=32,
    hidden_size=32,
    num_layers=2,
    cross_attention_dim=24,
    cross_attention_dim_t5=24,
    pooled_projection_dim=16,
    text_len=TEXT,
    text_len_t5=TEXT,
    activation_fn="gelu-approximate",
)
def hunyuan_dit() -> Inputs:
    return latent_image(
        text_embedding_mask=padded_text(dtype=torch.int64),
        encoder_hidden_states_t5=randn(1, TEXT, 24),
        text_embedding_mask_t5=padded_text(dtype=torch.int64),
        image_meta_size=torch.tensor([[32.0, 32.0, 32.0, 32.0, 0.0, 0.0]]),
        style=torch.tensor([0]),
        image_rotary_emb=(randn(256, 16), randn(256, 16)),
    )


@diffusers_case(
    "SanaTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=24,
    sample_size=16,
)
def sana() -> Inputs:
    return latent_image(side=16, encoder_attention_mask=padded_text(dtype=torch.float32))
