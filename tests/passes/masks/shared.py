"""What the tests of masks share: inputs, and attention with a mask that a function makes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

B, H, T, D = 2, 3, 20, 8

Make = Callable[[Tensor], Tensor]


def inputs(heads: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a boolean [B, T] with holes, different for every batch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator) for _ in range(3))
    valid = torch.rand(B, T, generator=generator) > 0.3
    return q, k, v, valid


def negative(valid: Tensor) -> Tensor:
    return torch.zeros(B, T).masked_fill_(valid.logical_not(), -math.inf)


def written(mask: Tensor, value: float = True) -> Tensor:
    """Some keys allowed (or forbidden) for all queries."""
    if mask.dim() == 2:
        mask = mask.clone()
        mask[:, 4:7] = value
    else:
        mask[:, :, :, 0] = value
    return mask


def outer(m: Tensor) -> Tensor:
    """As HunyuanVideo 1.5 builds it."""
    first = m.view(B, 1, 1, T).repeat(1, 1, T, 1)
    return (first & first.transpose(2, 3)).bool()


def attend(make: Make) -> Callable[..., Tensor]:
    return lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=make(m))
