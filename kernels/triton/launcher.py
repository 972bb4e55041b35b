"""Checks a call, finds the device and runs the planned launches. Never synchronises."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..params import BLOCK_SIZES, ORDERS, ROUTINGS, AttentionParams, block_count
from .forward import forward_kernel
from .geometry import MAX_BLOCKS, Device
from .plan import plan

ORDERS_HERE = tuple(order for order in ORDERS if order != "blockwise")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256

# TRITON_INTERPRET counts when the kernels are defined, so they are asked and not the environment.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    budget: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check(query, key, value, key_mask, params, budget)
    work = plan(query, key, value, key_mask, params, budget, device_of(query.device))
    # A launch goes to the current device, which need not be the tensors' own.
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        for launch in work.launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
    return work.out, work.lse


@lru_cache
def device_of(device: torch.device) -> Device:
    if INTERPRETED:
        return Device("interpreter", processors=1)
    if device.type != "cuda":
        raise RuntimeError(
            f"the Triton implementation runs on CUDA and ROCm devices, got tensors on {device}; "
            "use impl='reference', or set TRITON_INTERPRET=1 before the first import of Triton "
            "to interpret the kernels"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    budget: Tensor | None,
) -> None:
    """Raise ValueError for what these kernels cannot compute."""
    for name, given, supported in (
        ("order", params.order, ORDERS_HERE),
        ("routing", params.routing, ROUTINGS),
        ("block_size", params.block_size, BLOCK_SIZES),
        ("dtype", query.dtype, DTYPES),
    ):
        if given not in supported:
            raise ValueError(
                f"the Triton implementation supports {name} in {supported}, got {given!r}; "
                "impl='reference' computes everything"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value need one dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    batch, heads, _, width = query.shape
    if (
        key.shape[0] != batch
        or key.shape[3] != width
        or key.shape[:3] != value.shape[:3]
        or heads % max(key.shape[1], 1)
    ):
        raise ValueError(
            "expected query [B, H, Tq, D], key [B, G, Tk, D], value [B, G, Tk, E] with H a "
            f"multiple of G, got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if max(width, value.shape[3]) > MAX_WIDTH:
        raise ValueError(
            f"head_dim up to {MAX_WIDTH} is supported, got {width} and {value.shape[3]}"
        )
    blocks = block_count(key.shape[2], params.block_size)
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"at most {MAX_BLOCKS} key blocks are supported, got {blocks}; use a larger block_size"
        )
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.shape != (batch, key.shape[2])
    ):
        raise ValueError(
            f"key_mask must be boolean [B, Tk] = {[batch, key.shape[2]]}, "
            f"got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if budget is not None and (budget.dtype != torch.float32 or budget.shape != (heads,)):
        raise ValueError(
            f"budget must be float32 [H] = {[heads]}, got {budget.dtype} {list(budget.shape)}"
        )
    others = [t for t in (key, value, key_mask, budget) if t is not None]
    if any(other.device != query.device for other in others):
        raise ValueError(
            f"all tensors must be on one device, got {query.device} and "
            f"{sorted({str(other.device) for other in others})}"
        )
