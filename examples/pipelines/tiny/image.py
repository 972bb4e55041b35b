"""Tiny pipelines that make pictures."""

from __future__ import annotations

from typing import Any

from .parts import TEXT_DIM, TEXT_TOKENS, euler, image_autoencoder, text


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def flux_arguments(guided: bool) -> dict[str, Any]:
    prompt = {"prompt_embeds": text(TEXT_TOKENS, TEXT_DIM), "pooled_prompt_embeds": text(16)}
    if not guided:
        return prompt
    return prompt | {
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": text(16),
    }


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=32,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sd3_arguments(guided: bool) -> dict[str, Any]:
    return {
        "guidance_scale": 5.0 if guided else 1.0,
        "prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "pooled_prompt_embeds": text(16),
        "negative_prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": text(16),
    }
