"""Which implementation runs a call: by device, or the one that was asked for by name."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.params import MAX_KERNEL_BLOCKS, AttentionParams, Settings, block_count

IMPLEMENTATIONS = ("reference", "cpu", "triton")
MAX_HEAD_DIM = 256
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedError(RuntimeError):
    """An explicit request that no implementation, or not the one named, can serve."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    impl: str | None = None,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one call; arguments and results as in `reference.attention`.

    Raises:
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    name = _resolve(query, value, params, impl)
    run: Callable[..., tuple[Tensor, Tensor]] = reference.attention
    if name == "cpu":
        from ..kernels import cpu

        run = cpu.attention
    elif name == "triton":
        from ..kernels import triton

        run = triton.attention
    return run(query, key, value, key_mask, params, density=density, permutation=permutation)


def refusal(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    params: Settings,
    key_len: int | torch.SymInt | None = None,
) -> str | None:
    """Why `impl` cannot run such a call, or None. The reference runs everything.

    A `key_len` that is symbolic or not given is not judged.
    """
    if impl == "reference":
        return None
    if impl == "cpu":
        return None if device.type == "cpu" else f"it runs CPU tensors, these are on {device}"
    if not _has_triton():
        return "the triton package is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need TRITON_INTERPRET=1 set before Triton is imported"
    if device.type not in ("cpu", "cuda"):
        return f"it runs CUDA and ROCm tensors, these are on {device}"
    if dtype not in _KERNEL_DTYPES:
        return f"it supports float32, bfloat16 and float16, not {dtype}"
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"it supports head_dim up to {MAX_HEAD_DIM}, not {max(head_dim, value_dim)}"
    if params.order == "blockwise":
        return "it does not implement order='blockwise'"
    if isinstance(key_len, int) and block_count(key_len, params.key_size) > MAX_KERNEL_BLOCKS:
        return (
            f"it supports up to {MAX_KERNEL_BLOCKS} key blocks, not "
            f"{block_count(key_len, params.key_size)}; use a larger block_size"
        )
    return None


def preferred(device: torch.device) -> str:
    """The implementation that is fast on `device`, if it can run there at all."""
    return "cpu" if device.type == "cpu" else "triton"


def _resolve(query: Tensor, value: Tensor, params: AttentionParams, impl: str | None) -> str:
    def why_not(name: str) -> str | None:
        return refusal(
            name, query.device, query.dtype, query.shape[-1], value.shape[-1], params,
            value.shape[-2],
        )  # fmt: skip

    if impl is not None:
        reason = why_not(impl)
        if reason is not None:
            raise UnsupportedError(f"impl={impl!r} cannot run this call: {reason}")
        return impl
    name = preferred(query.device)
    return name if why_not(name) is None else "reference"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
