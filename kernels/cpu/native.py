"""The native library: loading, and one call of it.

The library has a plain C interface (`src/pisa.h`) and depends on nothing but the C library, so
one file serves every version of Python and torch. It starts its own threads; `ctypes` releases
the interpreter lock for the duration of a call.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..params import (
    MASS_FACTOR_LIMIT,
    ROUTING_WEIGHT,
    AttentionParams,
    block_count,
    free_key_blocks,
    free_query_blocks,
)
from ..permutation import check_values
from .budget import budgets

LIBRARY = Path(__file__).with_name("_pisa_cpu.so")
ABI_VERSION = 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUTINGS = {"topk": 0, "topk_covariance": 1, "threshold": 2}
_ORDERS = {"none": 0, "zeroth": 1, "hybrid": 2, "corrected": 3}
_MAX_HEAD_DIM = 1024
_ALIGNMENT = 64  # bytes

# OpenMP's threads do not survive a fork, and its runtime would wait for them in the child.
_PROCESS = os.getpid()

_Strides = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """Mirror of `pisa::Call` in src/pisa.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask")),
        *((name, ctypes.c_void_p) for name in ("permutation", "top_k", "beta")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "workspace", "parallel")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("query_len", "key_len", "head_dim", "value_dim")),
        *((f"{name}_stride", _Strides) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("query_block", "key_block")),
        *((name, ctypes.c_int64) for name in ("free_first", "free_last")),
        *((name, ctypes.c_int64) for name in ("query_first", "query_last")),
        *((name, ctypes.c_double) for name in ("scale", "mass_limit", "routing_weight")),
        *((name, ctypes.c_int32) for name in ("dtype", "routing", "order", "threads")),
    ]


class NativeUnavailableError(RuntimeError):
    """The library cannot be used; the message says why and what to do."""


@cache
def library(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library and check that it matches this module and its own sources."""
    from .build import source_digest  # here, so that `python -m ...build` is not imported twice

    advice = "run `python -m pisa_compile.kernels.cpu.build` with a C++ compiler installed"
    if not path.exists():
        raise NativeUnavailableError(f"{path.name} has not been built: {advice}")
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.pisa_abi_version.restype = ctypes.c_int32
        loaded.pisa_call_size.restype = ctypes.c_int64
        loaded.pisa_source_digest.restype = ctypes.c_char_p
        loaded.pisa_variant.restype = ctypes.c_char_p
        loaded.pisa_variant.argtypes = [ctypes.c_int32]
        loaded.pisa_workspace_floats.restype = ctypes.c_int64
        loaded.pisa_workspace_floats.argtypes = [ctypes.POINTER(_Call)]
        loaded.pisa_attention.restype = ctypes.c_int32
        loaded.pisa_attention.argtypes = [ctypes.POINTER(_Call), ctypes.c_int32]
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path.name} cannot be loaded ({error}): {advice}") from error
    version, size = loaded.pisa_abi_version(), loaded.pisa_call_size()
    if (version, size) != (ABI_VERSION, ctypes.sizeof(_Call)):
        raise NativeUnavailableError(
            f"{path.name} has interface {version} with {size}-byte calls, expected {ABI_VERSION} "
            f"with {ctypes.sizeof(_Call)}: {advice}"
        )
    built, current = loaded.pisa_source_digest().decode(), source_digest()
    if current and built != current:
        raise NativeUnavailableError(f"{path.name} is older than its sources: {advice}")
    return loaded


def variants(path: Path = LIBRARY) -> tuple[str, ...]:
    """Instruction sets that the library has and this processor supports, best first."""
    names: list[str] = []
    while (name := library(path).pisa_variant(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


@cache
def _openmp_team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, or None.

    Not a dependency: without it the library starts threads of its own. But OpenMP's workers spin
    for a while after each of torch's operators, each on its core, and a second set of threads
    would have to share the cores with them.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@cache
def unavailable() -> str | None:
    """Why the library cannot be loaded, or None. Asked once per process."""
    try:
        library()
    except NativeUnavailableError as error:
        return str(error)
    return None


def unsupported(query: Tensor, value: Tensor) -> str | None:
    """Why the library cannot compute this call, or None."""
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is computed by the torch path only"
    if max(query.shape[3], value.shape[3]) > _MAX_HEAD_DIM:
        return f"head_dim above {_MAX_HEAD_DIM} is computed by the torch path only"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    variant: str | None = None,
    threads: int | None = None,
    team: str = "openmp",
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.attention`, on float32, bfloat16 or float16 CPU tensors.

    Args:
        query: [B, H, Tq, D]. Tensors are read in place when their last stride is 1.
        key: [B, G, Tk, D].
        value: [B, G, Tk, E].
        key_mask: boolean [B, Tk] or None.
        params: validated settings.
        density: float32 [] or [H] in place of `params.density`, or None.
        permutation: int32 or int64 [T], or None. Tokens are read and written through it.
        variant: instruction set, one of `variants()`; the best one by default.
        threads: `torch.get_num_threads()` by default.
        team: "openmp" to run on torch's own threads where they can be reached, "own" not to.

    Raises:
        ValueError: `permutation` does not list every token once.
    """
    reason = unsupported(query, value)
    if reason is not None:
        raise NativeUnavailableError(reason)
    if permutation is not None:
        check_values(permutation)
    native = library()
    out = query.new_empty(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3])
    out = out.transpose(1, 2)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0 or key.shape[2] == 0:
        # Nothing to read: no rows, or rows without keys.
        return out.zero_(), lse.fill_(-torch.inf)

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = None if key_mask is None else key_mask.contiguous()
    places = None if permutation is None else permutation.to(torch.int64).contiguous()
    shares = _Shares(query, key, params, density)
    call = _Call(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        permutation=None if places is None else places.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        parallel=_openmp_team() if team == "openmp" and os.getpid() == _PROCESS else None,
        threads=torch.get_num_threads() if threads is None else threads,
        dtype=_DTYPES[query.dtype],
        **_sizes(query, key, value, out),
        **_settings(params),
        **shares.fields,
    )
    # From torch's allocator, so that its memory accounting and its tests see the workspace.
    floats = native.pisa_workspace_floats(ctypes.byref(call))
    workspace = torch.empty(floats + _ALIGNMENT // 4, dtype=torch.float32)
    call.workspace = -(-workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    chosen = 0 if variant is None else variants().index(variant)
    status = native.pisa_attention(ctypes.byref(call), chosen)
    if status != 0:
        raise MemoryError(f"the native attention library failed with status {status}")
    return out, lse


def _sizes(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> dict[str, Any]:
    strides = {
        f"{name}_stride": _Strides(*tensor.stride()[:3])
        for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out))
    }
    return {
        "batch": query.shape[0],
        "heads": query.shape[1],
        "kv_heads": key.shape[1],
        "query_len": query.shape[2],
        "key_len": key.shape[2],
        "head_dim": query.shape[3],
        "value_dim": value.shape[3],
        **strides,
    }


def _settings(params: AttentionParams) -> dict[str, Any]:
    return {
        "query_block": params.block_size,
        "key_block": params.key_size,
        "scale": params.scale,
        "mass_limit": MASS_FACTOR_LIMIT,
        "routing_weight": ROUTING_WEIGHT if params.weighs_routing else 0.0,
        "routing": _ROUTINGS[params.routing],
        "order": _ORDERS[params.order],
    }


class _Shares:
    """Which blocks routing may choose from, and how many for each head.

    Holds the arrays that `fields` point to.
    """

    def __init__(
        self, query: Tensor, key: Tensor, params: AttentionParams, density: Tensor | None
    ) -> None:
        heads, query_len, key_len = query.shape[1], query.shape[2], key.shape[2]
        first, last = free_key_blocks(key_len, params)
        query_first, query_last = 0, block_count(query_len, params.block_size)
        if query_len == key_len and params.exact != (0, 0):
            query_first, query_last = free_query_blocks(query_len, params)
        shares = budgets(density, heads, last - first, params)
        self._top_k = (ctypes.c_int64 * heads)(*(share.count for share in shares))
        self._beta = (ctypes.c_double * heads)(*(share.beta for share in shares))
        self.fields = {
            "top_k": ctypes.addressof(self._top_k),
            "beta": ctypes.addressof(self._beta),
            "free_first": first,
            "free_last": last,
            "query_first": query_first,
            "query_last": query_last,
        }
