"""What every implementation of the op is told, and the block arithmetic they share.

No tensors are created here, so that the specification, the CPU path and the Triton launcher cannot
disagree about which block is where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUTINGS = ("topk", "topk_covariance", "threshold")
ORDERS = ("none", "zeroth", "hybrid", "corrected", "blockwise")
BLOCK_SIZES = (16, 32, 64, 128)
# What users get who say nothing. `Settings` itself defaults to the method of the paper.
DEFAULT_BLOCK_SIZE, DEFAULT_ROUTING, DEFAULT_ORDER = 64, "topk", "corrected"
# Key blocks that the GPU kernels can number: 16 bits of an index entry.
MAX_KERNEL_BLOCKS = 1 << 16
# Order "corrected": the mass of a block is at most this many times what its mean key says.
MASS_FACTOR_LIMIT = 8.0
# There "topk" ranks blocks by `scale * qbar_i . kbar_j` plus this times their log weight.
ROUTING_WEIGHT = 2.0


@dataclass(frozen=True)
class Settings:
    """How attention is approximated, already validated: the one carrier from policies to kernels.

    A field that is added here is an argument of the op of the same name (`ops.register`), and a
    field of `Policy` where users may choose it; everything between hands the whole record on.

    Attributes:
        sparsity: fraction of the key blocks that is approximated, in [0, 1).
        block_size: tokens per query block, and per key block unless `key_block_size` is given.
        routing: which blocks are exact, one of `ROUTINGS`.
        order: how the other blocks are approximated, one of `ORDERS`.
        exact: `(prefix, suffix)` tokens at both ends of the sequence that every query attends
            exactly. Key blocks that overlap them are exact on top of the routed ones. In
            self-attention (`Tq == Tk`) query blocks that overlap them attend densely.
        key_block_size: tokens per key block; None for `block_size`. Readers take `key_size`.
    """

    sparsity: float = 0.85
    block_size: int = DEFAULT_BLOCK_SIZE
    routing: str = DEFAULT_ROUTING
    order: str = "hybrid"
    exact: tuple[int, int] = (0, 0)
    key_block_size: int | None = None

    def as_arguments(self) -> dict[str, Any]:
        """The settings as keyword arguments of `torch.ops.pisa.attention`."""
        given = {name: getattr(self, name) for name in SETTINGS}
        prefix, suffix = given.pop("exact")
        return {**given, "exact_prefix": prefix, "exact_suffix": suffix}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Settings:
        """The settings that `as_arguments` gave."""
        given = dict(arguments)
        exact = given.pop("exact_prefix", 0), given.pop("exact_suffix", 0)
        return cls(**given, exact=exact)

    def scaled(self, scale: float) -> AttentionParams:
        """The settings of a call whose logits are `scale * q.k`."""
        return AttentionParams(scale=scale, **{name: getattr(self, name) for name in SETTINGS})

    @property
    def density(self) -> float:
        return 1.0 - self.sparsity

    @property
    def key_size(self) -> int:
        """Tokens per key block."""
        return self.block_size if self.key_block_size is None else self.key_block_size

    @property
    def first_order(self) -> bool:
        """Whether one first-order matrix serves all approximated blocks of a head."""
        return self.order in ("hybrid", "corrected")

    @property
    def weighs_routing(self) -> bool:
        """Whether the scatter of a block's keys has a say in its being exact."""
        return self.order == "corrected" and self.routing == "topk"

    @property
    def threshold_beta(self) -> float:
        """Threshold in standard deviations above the row mean: density is close to 1 - Phi(beta).

        Sol-Attn (arXiv 2607.24027) sets beta; we derive it from the density that was asked for.
        """
        return -math.inf if self.sparsity == 0 else NormalDist().inv_cdf(self.sparsity)


SETTINGS = tuple(field.name for field in fields(Settings))
"""Names of the fields of `Settings`, as a constant that code under Dynamo may read."""


@dataclass(frozen=True)
class _Scaled:
    scale: float


@dataclass(frozen=True)
class AttentionParams(Settings, _Scaled):  # the last base's field comes first
    """One call's settings, with `scale` resolved to a number: `s(q, k) = scale * q.k`."""


def block_count(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def exact_block_count(density: float, blocks: int) -> int:
    """Number of routed exact blocks out of `blocks`: rounded up, so never sparser than asked."""
    return min(blocks, max(1, math.ceil(density * blocks - 1e-6))) if blocks else 0


def exact_block_counts(density: Tensor, blocks: int) -> Tensor:
    """`exact_block_count` where the density is a float tensor: no value is read on the host.

    The tolerance is wider, because a float32 density may be off by 6e-8 of itself.
    """
    return (density * blocks - 1e-6 * blocks).ceil().clamp(1, blocks)


def free_key_blocks(key_len: int, params: Settings) -> tuple[int, int]:
    """Range `[first, last)` of the key blocks that routing may choose from: those that do not
    overlap the exact prefix or suffix. Empty when everything is exact."""
    return _free_blocks(key_len, params.key_size, params.exact)


def free_query_blocks(query_len: int, params: Settings) -> tuple[int, int]:
    """Range `[first, last)` of the query blocks of self-attention that do not attend densely."""
    return _free_blocks(query_len, params.block_size, params.exact)


def _free_blocks(tokens: int, size: int, exact: tuple[int, int]) -> tuple[int, int]:
    prefix, suffix = exact
    first = block_count(min(prefix, tokens), size)
    last = max(tokens - suffix, 0) // size if suffix else block_count(tokens, size)
    return first, max(first, last)
