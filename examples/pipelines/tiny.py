"""Pipelines of diffusers with tiny random weights, for trying things without a download.

They are the real classes, with real schedulers and autoencoders; only sizes and weights are not
those of a published model. Prompts are given as random embeddings, so there is no text encoder.
Pictures come out as noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS = 24
TEXT_DIM = 24


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline and what it is called with.

    Attributes:
        name: of the pipeline's class.
        make: builds the pipeline.
        make_arguments: prompt embeddings and guidance for a call; the argument is True for
            guidance by a second, negative prompt.
        sizes: two sizes that the pipeline accepts, as keyword arguments of a call. The second
            gives more tokens.
    """

    name: str
    make: Callable[[], Any]
    make_arguments: Callable[[bool], dict[str, Any]]
    sizes: tuple[dict[str, int], dict[str, int]]

    def build(self) -> Any:
        """The pipeline, in evaluation mode, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipe

    def arguments(self, guided: bool = False) -> dict[str, Any]:
        """Prompt embeddings and guidance, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make_arguments(guided)


def _text(*shape: int) -> Tensor:
    return torch.randn(1, *shape)


def _euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def _image_autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )


def _flux() -> Any:
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
        scheduler=_euler(),
        vae=_image_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _flux_arguments(guided: bool) -> dict[str, Any]:
    prompt = {"prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM), "pooled_prompt_embeds": _text(16)}
    if not guided:
        return prompt
    return prompt | {
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": _text(16),
    }


def _sd3() -> Any:
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
        scheduler=_euler(),
        vae=_image_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _sd3_arguments(guided: bool) -> dict[str, Any]:
    return {
        "guidance_scale": 5.0 if guided else 1.0,
        "prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "pooled_prompt_embeds": _text(16),
        "negative_prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": _text(16),
    }


def _wan() -> Any:
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
        scheduler=_euler(),
        transformer=transformer,
    )


def _video_arguments(guided: bool) -> dict[str, Any]:
    return {
        "guidance_scale": 5.0 if guided else 1.0,
        "prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "negative_prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
    }


def _hunyuan_video() -> Any:
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
        scheduler=_euler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _hunyuan_video_arguments(guided: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)
    mask[:, TEXT_TOKENS - 5 :] = 0  # padding, as a real prompt has
    prompt = {
        "prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "pooled_prompt_embeds": _text(16),
        "prompt_attention_mask": mask,
    }
    if not guided:
        return prompt
    return prompt | {
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": _text(TEXT_TOKENS, TEXT_DIM),
        "negative_pooled_prompt_embeds": _text(16),
        "negative_prompt_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
    }


def _cogvideox() -> Any:
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


def _ltx() -> Any:
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
        scheduler=_euler(),
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _ltx_arguments(guided: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS)
    mask[:, TEXT_TOKENS - 5 :] = 0
    return _video_arguments(guided) | {
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": torch.ones(1, TEXT_TOKENS),
    }


def _image(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _video(side: int, frames: int) -> dict[str, int]:
    return _image(side) | {"num_frames": frames}


TINY = {
    "FluxPipeline": TinyPipeline("FluxPipeline", _flux, _flux_arguments, (_image(64), _image(72))),
    "WanPipeline": TinyPipeline(
        "WanPipeline", _wan, _video_arguments, (_video(128, 9), _video(160, 9))
    ),
    "HunyuanVideoPipeline": TinyPipeline(
        "HunyuanVideoPipeline",
        _hunyuan_video,
        _hunyuan_video_arguments,
        (_video(128, 9), _video(160, 9)),
    ),
    "CogVideoXPipeline": TinyPipeline(
        "CogVideoXPipeline", _cogvideox, _video_arguments, (_video(128, 9), _video(160, 9))
    ),
    "StableDiffusion3Pipeline": TinyPipeline(
        "StableDiffusion3Pipeline", _sd3, _sd3_arguments, (_image(64), _image(48))
    ),
    "LTXPipeline": TinyPipeline(
        "LTXPipeline", _ltx, _ltx_arguments, (_video(64, 9), _video(96, 9))
    ),
}
"""The tiny pipelines by class name."""
