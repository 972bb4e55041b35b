"""What the tiny pipelines share: random prompts, a scheduler, an autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT_TOKENS = 24
TEXT_DIM = 24


def text(*shape: int) -> Tensor:
    return torch.randn(1, *shape)


def euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def image_autoencoder() -> Any:
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
