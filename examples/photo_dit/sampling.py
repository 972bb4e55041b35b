"""From noise to picture: the time grid and one Euler step."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy [B, C, S, S], time [B], label [B]) -> velocity, shaped like `noisy`."""


def shift_time(uniform: Tensor, shift: float) -> Tensor:
    """Move uniform times towards the noise (0), where large pictures take their shape."""
    return uniform / (uniform + shift * (1 - uniform))


def time_grid(steps: int, shift: float = 2.0) -> list[float]:
    """`steps + 1` times from 0 (noise) to 1 (picture)."""
    times: list[float] = shift_time(torch.linspace(0, 1, steps + 1), shift).tolist()
    return times


def noise(seed: int, side: int, channels: int = 3) -> Tensor:
    """Starting point [1, C, side, side]; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, side, side, generator=generator)


def euler_step(model: Velocity, x: Tensor, label: Tensor, start: float, end: float) -> Tensor:
    """Follow the flow of `x [B, C, S, S]` from time `start` to `end`."""
    time = torch.full((x.shape[0],), start, dtype=x.dtype, device=x.device)
    return x + (end - start) * model(x, time, label)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats to [0, 255] integers."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
