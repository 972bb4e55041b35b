"""Which implementation runs a call: by device, or the one that was asked for by name."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.params import MAX_KERNEL_BLOCKS, ORDERS, AttentionParams, Settings, block_count

_HALF = (torch.bfloat16, torch.float16)
_KERNEL_ORDERS = tuple(order for order in ORDERS if order != "blockwise")


@dataclass(frozen=True)
class Limits:
    """What an implementation can run; a field at its default limits nothing.

    Attributes:
        devices: types of devices, and what to call their tensors.
        head_dim: the largest, of queries and keys or of values.
        key_blocks: the most that it can number.
    """

    devices: tuple[str, ...] = ()
    devices_text: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, *_HALF)
    orders: tuple[str, ...] = ORDERS
    head_dim: int | None = None
    key_blocks: int | None = None


LIMITS = {
    "reference": Limits(),
    "cpu": Limits(("cpu",), "CPU", orders=_KERNEL_ORDERS),
    "triton": Limits(
        ("cuda", "cpu"), "CUDA and ROCm", dtypes=(torch.float32, *_HALF), orders=_KERNEL_ORDERS,
        head_dim=256, key_blocks=MAX_KERNEL_BLOCKS,
    ),
}  # fmt: skip
IMPLEMENTATIONS = tuple(LIMITS)


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
    settings: Settings,
    key_len: int | torch.SymInt | None = None,
) -> str | None:
    """Why `impl` cannot run such a call, or None. The reference runs everything.

    A `key_len` that is symbolic or not given is not judged.
    """
    limits = LIMITS[impl]
    if impl == "triton" and not _has_triton():
        return "the triton package is not installed"
    if limits.devices and device.type not in limits.devices:
        return f"it runs {limits.devices_text} tensors, these are on {device}"
    if impl == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need TRITON_INTERPRET=1 set before Triton is imported"
    if dtype not in limits.dtypes:
        names = [str(x).removeprefix("torch.") for x in limits.dtypes]
        return f"it supports {', '.join(names[:-1])} and {names[-1]}, not {dtype}"
    if limits.head_dim is not None and max(head_dim, value_dim) > limits.head_dim:
        return f"it supports head_dim up to {limits.head_dim}, not {max(head_dim, value_dim)}"
    if settings.order not in limits.orders:
        return f"it does not implement order={settings.order!r}"
    if limits.key_blocks is not None and isinstance(key_len, int):
        blocks = block_count(key_len, settings.key_size)
        if blocks > limits.key_blocks:
            return (
                f"it supports up to {limits.key_blocks} key blocks, not {blocks}; use a larger "
                "block_size"
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
