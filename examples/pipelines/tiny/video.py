"""Tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

import torch

from .parts import TEXT_DIM, TEXT_TOKENS, euler, text


def wan() -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        scheduler=euler(),
        transformer=transformer,
    )


def video_arguments(guided: bool) -> dict[str, Any]:
    return {
        "guidance_scale": 5.0 if guided else 1.0,
        "prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
    }


def hunyuan_video() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    autoencoder = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=autoencoder,
        scheduler=euler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def hunyuan_video_arguments(guided: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)
    mask[:, TEXT_TOKENS - 5 :] = 0  # padding, as a real prompt has
    prompt = {
        "prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "pooled_prompt_embeds": text(16),
        "prompt_attention_mask": mask,
    }
    if not guided:
        return prompt
    return prompt | {
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": text(16),
        "negative_prompt_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
    }


def cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )
    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    )
    return LTXPipeline(
        scheduler=euler(),
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def ltx_arguments(guided: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS)
    mask[:, TEXT_TOKENS - 5 :] = 0
    return video_arguments(guided) | {
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": torch.ones(1, TEXT_TOKENS),
    }
