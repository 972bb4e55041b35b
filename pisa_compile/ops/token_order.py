"""`torch.ops.pisa.token_order`: the order in which tokens are cut into blocks, as data of a graph.

The op makes the `permutation` argument of the attention. Sizes may be symbolic, so one graph serves
pictures of any size. Where a graph does not see the grid, as a transformer block alone does not,
the op asks what the backend read from the model that is being called (`called_with`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.curves import curve as curve_of

Grid = tuple[int, ...]


@dataclass(frozen=True)
class CallerTokens:
    """What the call of a model says about its tokens.

    Attributes:
        grids: those that they may be on. Several, because not all argument orders are known; only
            one can have as many cells as there are tokens.
        prefix: text tokens that stand before those of the grid in every sequence that has both.
    """

    grids: tuple[Grid, ...] = ()
    prefix: int = 0


NO_CALLER = CallerTokens()
_caller: ContextVar[CallerTokens] = ContextVar("pisa_compile_caller", default=NO_CALLER)


@contextmanager
def called_with(tokens: CallerTokens) -> Iterator[None]:
    """Let `live` orders inside be those of a call of a model."""
    token = _caller.set(tokens)
    try:
        yield
    finally:
        _caller.reset(token)


@torch.library.custom_op(
    "pisa::token_order",
    mutates_args=(),
    schema=(
        "(SymInt[] grid, str curve, SymInt tokens, SymInt prefix, SymInt suffix, Device device, "
        "bool live=False) -> Tensor"
    ),
)
def token_order(
    grid: Sequence[int],
    curve: str,
    tokens: int,
    prefix: int,
    suffix: int,
    device: torch.device,
    live: bool = False,
) -> Tensor:
    """The places of `tokens` tokens whose middle lies on a grid, row by row.

    Args:
        grid: (t, h, w), (h, w) or (w,).
        curve: "hilbert", "tile" or "raster".
        prefix, suffix: tokens before and behind the grid, which keep their places.
        device: of the result.
        live: the grid is a guess from another call of the model: those of the present call go
            before it, and one that does not fit gives raster order. Else a grid that does not fit
            is an error.

    Returns:
        int32 [tokens], a tensor of its own: place i holds token `result[i]`.

    Raises:
        ValueError: the grid does not have `tokens - prefix - suffix` cells.
    """
    cells = tokens - prefix - suffix
    candidates = (_caller.get().grids or (tuple(grid),)) if live else (tuple(grid),)
    fitting = [candidate for candidate in candidates if math.prod(candidate) == cells]
    if not fitting and not live:
        sizes = "x".join(map(str, grid))
        raise ValueError(
            f"grid must have as many cells as there are tokens on it: {sizes} has "
            f"{math.prod(grid)}, but of {tokens} tokens {prefix} stand before and {suffix} behind "
            f"it, which leaves {cells}"
        )
    device = torch.device(device)
    order = _order(fitting[0] if fitting else (), curve, tokens, prefix, device.type == "cuda")
    # A copy, since results of an op must not share memory. It comes from pinned memory on a GPU:
    # no host synchronisation, and nothing that CUDA graphs would have to keep alive.
    return order.clone() if device.type == "cpu" else order.to(device, non_blocking=True)


@token_order.register_fake
def _(
    grid: Sequence[int],
    curve: str,
    tokens: int,
    prefix: int,
    suffix: int,
    device: torch.device,
    live: bool = False,
) -> Tensor:
    return torch.empty(tokens, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _order(grid: Grid, curve: str, tokens: int, prefix: int, pinned: bool) -> Tensor:
    """int32 [tokens] in host memory; an empty grid keeps every token in its place."""
    with torch.device("cpu"), torch.inference_mode(False):
        order = torch.arange(tokens, dtype=torch.int32)
        if grid:
            order[prefix : prefix + math.prod(grid)] = prefix + curve_of(grid, curve)
        return order.pin_memory() if pinned else order
