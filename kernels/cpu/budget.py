"""How many blocks each head attends exactly, as numbers on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..params import AttentionParams, exact_block_count, exact_block_counts


@dataclass(frozen=True)
class Budget:
    """One head's share of the blocks that routing may choose from."""

    count: int  # exact blocks of the top-k routings; 0 means that all are exact
    beta: float  # threshold routing: standard deviations above the row mean


def budgets(
    density: Tensor | None, heads: int, blocks: int, params: AttentionParams
) -> list[Budget]:
    """The budget of every head out of `blocks` free blocks; `density` [] or [H] is read here."""
    everything = Budget(0, 0.0)
    if blocks == 0:
        return [everything] * heads
    if density is None:
        if params.sparsity == 0:
            return [everything] * heads
        count = exact_block_count(params.density, blocks)
        return [Budget(count, params.threshold_beta)] * heads
    fraction = density.to(torch.float64).expand(heads)
    if bool(fraction.isnan().any()):
        raise ValueError(f"density must be a fraction in (0, 1] for each head, got {density}")
    counts = exact_block_counts(fraction, blocks).tolist()
    betas = torch.special.ndtri(1 - fraction.clamp(0, 1)).tolist()
    return [
        everything if share >= 1 else Budget(int(count), beta)
        for share, count, beta in zip(fraction.tolist(), counts, betas, strict=True)
    ]
