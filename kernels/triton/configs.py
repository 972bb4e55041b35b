"""Launch configurations: a static table per (architecture, padded head_dim, bits of the dtype).

`compile_check` proves every entry: it compiles, uses the tensor cores, spills no registers and
fits the shared memory. Sequence lengths and the number of selected blocks are not part of the key,
so a new length never compiles or tunes anything.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """Warps and pipeline stages of one kernel."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tile shapes and launch options of all kernels.

    Attributes:
        rows: query rows per program of the forward kernel. More than a block means that several
            query blocks share a program; each keeps its own selection.
        keys: at most this many keys of a selected block per step.
        centroids: key blocks per step of the zeroth-order phase.
        d_chunk: rows of the first-order matrix per step.
        in_chunks: compute scores from d_chunk columns of query and key at a time.
        tile: at most this many rows and columns of the first-order matrix per program.
        norm_tile: the same for the step of the covariance kernel.
        columns: key blocks per step of the routing scores.
        guarded: launch of the forward kernel where a key mask or a head_dim that is no power of two
            guards every load, which takes more registers; `forward` where it is None.
        descriptors: read keys and values by the copy engine (TMA) where their layout allows it.
    """

    rows: int = 64
    keys: int = 64
    centroids: int = 64
    d_chunk: int = 32
    in_chunks: bool = False
    tile: int = 128
    norm_tile: int = 64
    columns: int = 64
    descriptors: bool = False
    forward: Launch = Launch(4, 2)
    guarded: Launch | None = None
    statistics: Launch = Launch(8, 2)
    routing: Launch = Launch(8, 2)


INTERPRETER = Config(centroids=32, tile=64)

# Float32 operands are split into TF32 parts in registers, so everything is small. Rarely used.
_FLOAT32 = Config(
    rows=32, keys=16, centroids=16, tile=16, norm_tile=32, in_chunks=True, forward=Launch(8, 1)
)  # fmt: skip
_SMALL_KEYS = Config(keys=32, centroids=32)
_WIDE = Config(keys=16, centroids=16, forward=Launch(8, 2))

# Family -> padded head_dim -> configuration for 16-bit dtypes. The width is the larger of D and E.
_TABLE: dict[str, dict[int, Config]] = {
    # mma.sync, 163 KB of shared memory
    "sm_80": {
        32: Config(),
        64: Config(),
        128: replace(_SMALL_KEYS, guarded=Launch(8, 2)),
        256: _WIDE,
    },
    # mma.sync, 99 KB
    "sm_86": {
        32: Config(),
        64: Config(),
        128: replace(_SMALL_KEYS, guarded=Launch(8, 2)),
        256: _WIDE,
    },
    "sm_120": {
        32: Config(),
        64: Config(guarded=Launch(8, 2)),
        128: Config(forward=Launch(8, 1)),
        256: _WIDE,
    },
    # wgmma and TMA, 227 KB
    "sm_90": {
        32: Config(descriptors=True, forward=Launch(4, 3)),
        64: Config(descriptors=True, forward=Launch(4, 3)),
        128: Config(descriptors=True, guarded=Launch(8, 1)),
        256: replace(_SMALL_KEYS, descriptors=True, forward=Launch(8, 2)),
    },
    # tcgen05 and TMA, 227 KB
    "sm_100": {
        32: Config(descriptors=True, forward=Launch(4, 3)),
        64: Config(descriptors=True, forward=Launch(4, 3)),
        128: Config(descriptors=True, guarded=Launch(8, 2)),
        256: replace(_SMALL_KEYS, descriptors=True, forward=Launch(8, 1)),
    },
    # mfma, 64 KB
    "gfx942": {
        32: Config(),
        64: Config(),
        128: _SMALL_KEYS,
        256: replace(_SMALL_KEYS, forward=Launch(8, 1)),
    },
}
_FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_120",
    "sm_121": "sm_120",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
}


def padded_width(width: int) -> int:
    """Smallest power of two that holds `width` and that tensor cores accept."""
    return max(16, 1 << (width - 1).bit_length())


@lru_cache
def lookup(architecture: str, head_dim: int, value_dim: int, bits: int) -> Config:
    """The table's entry; for an unknown architecture that of the least demanding relative."""
    if architecture == "interpreter":
        return INTERPRETER
    family = _FAMILIES.get(architecture)
    if family is None:
        family = "sm_86" if architecture.startswith("sm_") else "gfx942"
        logger.warning("no kernel configurations for %s, using those of %s", architecture, family)
    width = max(32, padded_width(head_dim), padded_width(value_dim))
    return _FLOAT32 if bits == 32 else _TABLE[family][width]
