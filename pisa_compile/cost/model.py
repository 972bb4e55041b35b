"""Times of dense and of sparse attention as sums of a few products of sizes and measured rates.

Every term is something that the kernels do: a fixed start, floating-point operations of the two
matrix products with tokens and with block means, elements that are read and summed. The seconds per
unit of each term are fitted to measurements of one device, data type and head dimension, so caches,
vector widths and padding are in them without being modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..kernels.params import Settings
from ..ops.flops import Work

# Sparse attention must be predicted to take at most this part of the dense time.
MARGIN = 0.95
# Fewer key blocks leave routing nothing to choose from, however fast it would be.
MIN_BLOCKS = 16
DENSE_TERMS, SPARSE_TERMS = 3, 4
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Workload:
    """The sizes of one self-attention; `tokens` is the sequence length of queries and keys."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    value_dim: int
    settings: Settings


@dataclass(frozen=True)
class Profile:
    """Seconds per unit of each term, for one device, data type and pair of head dimensions."""

    dense: tuple[float, ...]
    sparse: tuple[float, ...]

    def dense_seconds(self, work: Workload) -> float:
        return _dot(self.dense, dense_terms(work))

    def sparse_seconds(self, work: Workload) -> float:
        return _dot(self.sparse, sparse_terms(work))


def dense_terms(work: Workload) -> tuple[float, ...]:
    """Calls, floating-point operations, elements read and written."""
    flops = 2 * work.batch * work.heads * work.tokens**2 * (work.head_dim + work.value_dim)
    return 1.0, float(flops), float(_elements(work))


def sparse_terms(work: Workload) -> tuple[float, ...]:
    """Calls, floating-point operations with exact tokens and with block means, elements.

    Every query meets every block mean, in routing or in the tail; whether the block is exact only
    decides which of the two, and the difference is within what this model resolves.
    """
    tokens, counted = work.tokens, Work.of(work.tokens, work.tokens, work.settings)
    per_pair = 2.0 * work.batch * work.heads * (work.head_dim + work.value_dim)
    attended = counted.dense_rows * tokens + counted.sparse_rows * counted.exact_keys
    means = counted.sparse_rows * counted.blocks
    return 1.0, per_pair * attended, per_pair * means, float(_elements(work))


def _elements(work: Workload) -> int:
    width = work.head_dim + work.value_dim
    return work.batch * (work.heads + work.kv_heads) * work.tokens * width


def fit(terms: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Non-negative rates with the least squared *relative* error over the measurements.

    Terms whose best rate is negative are left out one by one, the most negative first.
    """
    matrix = torch.tensor(terms, dtype=torch.float64)
    matrix = matrix / torch.tensor(seconds, dtype=torch.float64)[:, None]
    ones = torch.ones(len(seconds), 1, dtype=torch.float64)
    scale = matrix.norm(dim=0).clamp(min=1e-300)  # the terms differ by twelve orders of magnitude
    used = list(range(matrix.shape[1]))
    while used:
        rates = torch.linalg.lstsq(matrix[:, used] / scale[used], ones).solution[:, 0]
        if bool((rates >= 0).all()):
            found = dict(zip(used, (rates / scale[used]).tolist(), strict=True))
            return tuple(found.get(i, 0.0) for i in range(matrix.shape[1]))
        used.pop(int(rates.argmin()))
    raise ValueError(f"no rates explain the measured seconds {list(seconds)}")


@lru_cache(maxsize=1024)
def break_even(work: Workload, profile: Profile) -> int | None:
    """Tokens from which on sparse attention is faster, whatever `work.tokens` says; None if never.

    A whole number of blocks, and at least `MIN_BLOCKS` of them.
    """
    size = work.settings.block_size
    shortest = MIN_BLOCKS * size

    def pays(tokens: int) -> bool:
        sized = replace(work, tokens=tokens)
        return profile.sparse_seconds(sized) <= MARGIN * profile.dense_seconds(sized)

    losing = 0  # the longest length found at which it does not pay
    tokens = _LONGEST
    while tokens >= shortest and pays(tokens):
        tokens //= 2
    if tokens == _LONGEST:
        return None
    losing = tokens
    winning = max(2 * tokens, shortest)
    while winning - losing > size and winning > shortest:
        middle = (losing + winning) // (2 * size) * size
        if middle <= losing:
            break
        losing, winning = (losing, middle) if pays(middle) else (middle, winning)
    return max(winning, shortest)


def _dot(rates: Sequence[float], terms: Sequence[float]) -> float:
    return sum(rate * term for rate, term in zip(rates, terms, strict=True))
