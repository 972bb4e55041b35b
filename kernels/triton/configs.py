"""Launch configurations: a static table per (architecture, padded head_dim, dtype).

`compile_check` proves every entry: it compiles, uses the tensor cores, spills no registers and
fits the shared memory. Sequence lengths and the number of selected blocks are not part of the key,
so a new length never compiles or tunes anything. `tune` measures entries on a GPU and writes them
to a file; `use_table`, or the environment variable PISA_TRITON_TABLE, puts such a file in front of
the table here.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("pisa_compile")


@dataclass(frozen=True)
class Launch:
    """Warps and pipeline stages of one kernel.

    `registers` per thread is for NVIDIA's assembler, which otherwise sometimes prefers to spill a
    little so that two programs fit one processor.
    """

    warps: int
    stages: int
    registers: int | None = None


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
        guarded: launch of the forward kernel where a key mask, a permutation or a head_dim that is
            no power of two guards every load, which takes more registers; `forward` where it is
            None.
        guarded_rows: `rows` on that path; `rows` where it is None.
        selecting: launch of the forward kernel where it also decides what is exact; `forward` where
            it is None.
        small: launch of the forward kernel where key blocks have less than `keys` tokens; `forward`
            where it is None.
        small_guarded: the same where loads are guarded; `guarded` where it is None.
        descriptors: read keys and values by the copy engine (TMA) where their layout allows it.
        inside: decide threshold routing in the forward kernel instead of the routing kernel.
        inside_guarded: the same where loads are guarded.
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
    inside: bool = True
    inside_guarded: bool = True
    forward: Launch = Launch(4, 2)
    guarded: Launch | None = None
    guarded_rows: int | None = None
    selecting: Launch | None = None
    small: Launch | None = None
    small_guarded: Launch | None = None
    statistics: Launch = Launch(8, 2)
    covariance: Launch = Launch(8, 2)
    routing: Launch = Launch(8, 2)


INTERPRETER = Config(centroids=32, tile=64)

# Float32 operands are split into TF32 parts in registers, so everything is small. Rarely used.
_FLOAT32 = Config(
    rows=32, keys=16, centroids=16, tile=16, norm_tile=32, in_chunks=True, forward=Launch(8, 1),
    covariance=Launch(8, 1),
)  # fmt: skip
_FLOAT32_NVIDIA = replace(_FLOAT32, forward=Launch(8, 1, 255), statistics=Launch(8, 2, 255))
_SMALL_KEYS = Config(keys=32, centroids=32)
# Deciding threshold routing in the forward kernel takes registers that a head_dim of 256 has not.
_WIDE = Config(
    keys=16, centroids=16, inside=False, inside_guarded=False, forward=Launch(8, 2),
    statistics=Launch(8, 1),
)  # fmt: skip
_WIDE_KEYS = replace(_WIDE, keys=32, centroids=32)

# Family -> padded head_dim -> configuration for 16-bit dtypes. The width is the larger of D and E.
_TABLE: dict[str, dict[int, Config]] = {
    # mma.sync, 163 KB of shared memory
    "sm_80": {
        32: Config(),
        64: Config(
            guarded=Launch(4, 1), selecting=Launch(8, 1), inside_guarded=False,
            routing=Launch(8, 2, 255),
        ),
        128: replace(
            _SMALL_KEYS, guarded=Launch(8, 2, 255), selecting=Launch(8, 2, 255),
            statistics=Launch(8, 1), routing=Launch(8, 2, 255),
        ),
        256: replace(_WIDE, guarded_rows=32),
    },
    # mma.sync, 99 KB
    "sm_86": {
        32: Config(),
        64: Config(
            guarded=Launch(8, 2), selecting=Launch(8, 1), routing=Launch(8, 2, 255)
        ),
        128: replace(
            _SMALL_KEYS, guarded=Launch(8, 2, 255), inside_guarded=False, statistics=Launch(8, 1)
        ),
        256: replace(_WIDE, guarded=Launch(8, 1)),
    },
    "sm_120": {
        32: Config(),
        64: Config(guarded=Launch(8, 2), selecting=Launch(8, 1), inside_guarded=False),
        128: Config(forward=Launch(8, 1), inside_guarded=False, statistics=Launch(8, 1)),
        256: replace(_WIDE, guarded_rows=32, guarded=Launch(8, 1)),
    },
    # wgmma and TMA, 227 KB
    "sm_90": {
        32: Config(descriptors=True, forward=Launch(4, 3)),
        64: Config(descriptors=True, forward=Launch(4, 3), guarded=Launch(4, 2)),
        128: Config(
            descriptors=True, guarded=Launch(8, 1), small_guarded=Launch(8, 2),
            inside_guarded=False,
        ),
        256: replace(_WIDE_KEYS, descriptors=True, statistics=Launch(8, 2)),
    },
    # tcgen05 and TMA, 227 KB
    "sm_100": {
        32: Config(descriptors=True, forward=Launch(4, 3)),
        64: Config(descriptors=True, selecting=Launch(8, 2), routing=Launch(8, 2, 255)),
        128: Config(
            descriptors=True, guarded=Launch(8, 2), selecting=Launch(8, 2),
            small=Launch(4, 2, 255), small_guarded=Launch(8, 2, 255), routing=Launch(8, 2, 255),
        ),
        256: replace(
            _WIDE_KEYS, descriptors=True, forward=Launch(8, 1), guarded=Launch(8, 2),
            statistics=Launch(8, 2),
        ),
    },
    # mfma, 64 KB
    "gfx942": {
        32: Config(),
        64: Config(inside_guarded=False),
        128: _SMALL_KEYS,
        256: replace(_WIDE_KEYS, forward=Launch(8, 1), statistics=Launch(8, 2)),
    },
}  # fmt: skip
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


DTYPES = ("bfloat16", "float16", "float32")
TABLE_VARIABLE = "PISA_TRITON_TABLE"
_SCHEMA = 1
# Nothing that compiles at all asks for less; for devices that refuse the table's entry at run time.
LEAST = Config(
    rows=32, keys=16, centroids=16, tile=16, norm_tile=16, columns=32, in_chunks=True,
    inside=False, inside_guarded=False, forward=Launch(8, 1), statistics=Launch(8, 1),
    covariance=Launch(8, 1), routing=Launch(8, 1),
)  # fmt: skip

Key = tuple[str, int, str]  # architecture, padded head_dim, dtype


def padded_width(width: int) -> int:
    """Smallest power of two that holds `width` and that tensor cores accept."""
    return max(16, 1 << (width - 1).bit_length())


def table_width(head_dim: int, value_dim: int) -> int:
    """The width that the table knows a pair of head dimensions by."""
    return max(32, padded_width(head_dim), padded_width(value_dim))


def lookup(architecture: str, head_dim: int, value_dim: int, dtype: str) -> Config:
    """The entry of a table in use, else the shipped one; for an unknown architecture that of the
    least demanding relative. `dtype` is a name in `DTYPES`."""
    return _lookup(architecture, table_width(head_dim, value_dim), dtype)


@lru_cache
def _lookup(architecture: str, width: int, dtype: str) -> Config:
    own = _table_in_use().get((architecture, width, dtype))
    if own is not None:
        return own
    if architecture == "interpreter":
        return INTERPRETER
    family = _FAMILIES.get(architecture)
    if family is None:
        family = "sm_86" if architecture.startswith("sm_") else "gfx942"
        logger.warning("no kernel configurations for %s, using those of %s", architecture, family)
    if dtype == "float32":
        return _FLOAT32_NVIDIA if family.startswith("sm_") else _FLOAT32
    return _TABLE[family][width]


def use_table(path: str | Path | None) -> None:
    """Look up configurations in this file first, or with None only in the shipped table.

    Raises:
        ValueError: the file is not a table of this version.
    """
    table = {} if path is None else read_table(path)
    _lookup.cache_clear()
    _in_use.clear()
    _in_use.append(table)


_in_use: list[dict[Key, Config]] = []


def _table_in_use() -> dict[Key, Config]:
    if not _in_use:
        path = os.environ.get(TABLE_VARIABLE)
        _in_use.append(read_table(path) if path else {})
    return _in_use[0]


def read_table(path: str | Path) -> dict[Key, Config]:
    """The entries of a file that `tune` wrote."""
    try:
        content = json.loads(Path(path).read_text())
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        return {
            (entry["architecture"], int(entry["width"]), entry["dtype"]): config_from(
                entry["config"]
            )
            for entry in content["entries"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a table of kernel configurations (schema {_SCHEMA}) as "
            f"`python -m pisa_compile.kernels.triton.tools.tune` writes it, got {path}: "
            f"{type(error).__name__}: {error}"
        ) from error


def write_table(path: str | Path, entries: list[dict[str, Any]], **about: Any) -> None:
    """`entries` have `architecture`, `width`, `dtype`, `config` and what else describes them."""
    lines = [{**entry, "config": asdict(entry["config"])} for entry in entries]
    content = {"schema": _SCHEMA, **about, "entries": lines}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def config_from(values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`."""
    known = {field.name for field in fields(Config)}
    if not known >= set(values):
        raise ValueError(f"unknown settings {sorted(set(values) - known)}")
    launches = {name: Launch(**value) for name, value in values.items() if isinstance(value, dict)}
    return Config(**{**values, **launches})
