"""Helpers for testing an implementation of the op, ours or somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import reference
from .params import AttentionParams


@dataclass(frozen=True)
class Inputs:
    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, G, Tk, D]
    value: Tensor  # [B, G, Tk, E]
    key_mask: Tensor | None  # boolean [B, Tk]

    def astuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.query, self.key, self.value, self.key_mask

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), self.key_mask)


def random_inputs(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    query_len: int = 256,
    key_len: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "BTHD",
    masked: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Inputs:
    """Normal inputs whose keys share a direction per block of tokens, so that routing matters.

    `layout` is the memory order behind the [B, H, T, D] views: "BTHD" as linear layers give it,
    "BHTD" contiguous, or "fused" for slices of one [B, T, 3, H, D] projection (equal lengths).
    `masked` is the fraction of keys that the key mask removes; 0 gives no mask.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    key_len = query_len if key_len is None else key_len
    value_dim = head_dim if value_dim is None else value_dim

    def normal(tokens: int, count: int, width: int) -> Tensor:
        coarse = torch.randn(batch, -(-tokens // 32), count, width, generator=generator)
        fine = torch.randn(batch, tokens, count, width, generator=generator)
        x = 0.7 * coarse.repeat_interleave(32, dim=1)[:, :tokens] + 0.7 * fine
        return x.to(device=device, dtype=dtype)  # [B, T, H, D]

    q, k, v = (
        normal(query_len, heads, head_dim),
        normal(key_len, kv_heads, head_dim),
        normal(key_len, kv_heads, value_dim),
    )
    if layout == "fused":
        q, k, v = torch.stack([q, k, v], dim=2).unbind(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if layout == "BHTD":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    mask = None
    if masked:
        mask = (torch.rand(batch, key_len, generator=generator) >= masked).to(device)
    return Inputs(q, k, v, mask)


def relative_l2(out: Tensor, expected: Tensor) -> float:
    """`|out - expected| / |expected|` in float64; 0 for two zero tensors, inf for non-finite."""
    out, expected = out.double(), expected.double()
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    scale = float(expected.norm())
    error = float((out - expected).norm())
    return error if scale == 0.0 else error / scale


def specified(
    inputs: Inputs,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of the specification in float64 (LSE comes back as float32)."""
    double = inputs.to(torch.float64).astuple()
    return reference.attention(*double, params, density=density, permutation=permutation)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every tensor from `torch.empty` and its siblings with NaN (or extreme integers).

    An implementation that leaves part of its output or workspace unwritten then fails.
    """

    def poison(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def created(*args: Any, **kwargs: Any) -> Tensor:
            tensor = create(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            floating = tensor.is_floating_point()
            return tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max)

        return created

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
