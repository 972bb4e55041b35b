"""Checks a call, finds the device and runs the planned launches. Never synchronises."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..params import (
    BLOCK_SIZES,
    MAX_KERNEL_BLOCKS,
    ORDERS,
    ROUTINGS,
    AttentionParams,
    block_count,
)
from .configs import LEAST, Config, lookup
from .forward import forward_kernel
from .geometry import Device
from .plan import plan

logger = logging.getLogger(__name__)

ORDERS_HERE = tuple(order for order in ORDERS if order != "blockwise")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256

# TRITON_INTERPRET counts when the kernels are defined, so they are asked and not the environment.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)

# How many configurations a kind of call had to give up so far, so that it fails only once.
Kind = tuple[str, int, int, torch.dtype]  # architecture, D, E, dtype
_given_up: dict[Kind, int] = {}


def failures() -> dict[Kind, int]:
    """Kinds of calls whose configuration failed at run time, with the number that were given up."""
    return dict(_given_up)


def forget_failures() -> None:
    """Try every configuration again."""
    _given_up.clear()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(query, key, value, key_mask, params, density, permutation)
    device = device_of(query.device)
    kind = (device.arch, query.shape[3], value.shape[3], query.dtype)
    configs = list(_configs(*kind))
    while True:
        config = configs[_given_up.get(kind, 0)]
        try:
            return _launch(query, key, value, key_mask, params, density, permutation, config)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            # Whatever a compiler, a driver or a device may object to: the next one asks for less.
            if config is configs[-1]:
                raise
            _given_up[kind] = _given_up.get(kind, 0) + 1
            logger.warning(
                "attention on %s with head_dim %d and %s: %s: %s; falling back to %s",
                device.arch, query.shape[3], query.dtype, type(error).__name__,
                str(error).splitlines()[0] if str(error) else "", configs[_given_up[kind]],
            )  # fmt: skip


def _configs(
    architecture: str, head_dim: int, value_dim: int, dtype: torch.dtype
) -> Iterator[Config]:
    """The table's entry, the same without the copy engine, and one that asks for the least."""
    entry = lookup(architecture, head_dim, value_dim, str(dtype).removeprefix("torch."))
    yield entry
    if entry.descriptors:
        yield replace(entry, descriptors=False)
    yield LEAST


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    density: Tensor | None,
    permutation: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    work = plan(
        query, key, value, key_mask, params, device_of(query.device),
        density=density, permutation=permutation, config=config,
    )  # fmt: skip
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
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> None:
    """Raise ValueError for what these kernels cannot compute."""
    for name, given, supported in (
        ("order", params.order, ORDERS_HERE),
        ("routing", params.routing, ROUTINGS),
        ("block_size", params.block_size, BLOCK_SIZES),
        ("key_block_size", params.key_size, BLOCK_SIZES),
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
    blocks = block_count(key.shape[2], params.key_size)
    if blocks > MAX_KERNEL_BLOCKS:
        raise ValueError(
            f"at most {MAX_KERNEL_BLOCKS} key blocks are supported, got {blocks}; "
            "use a larger block_size"
        )
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.shape != (batch, key.shape[2])
    ):
        raise ValueError(
            f"key_mask must be boolean [B, Tk] = {[batch, key.shape[2]]}, "
            f"got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if density is not None and (
        density.dtype != torch.float32 or density.shape not in ((), (heads,))
    ):
        raise ValueError(
            f"density must be float32 [] or [H] = {[heads]}, got {density.dtype} "
            f"{list(density.shape)}"
        )
    tokens = query.shape[2]
    if permutation is not None and (
        permutation.dtype not in (torch.int32, torch.int64)
        or permutation.shape != (tokens,)
        or key.shape[2] != tokens
    ):
        raise ValueError(
            f"permutation must be int32 or int64 [T] = {[tokens]} and needs as many keys as "
            f"queries, got {permutation.dtype} {list(permutation.shape)} and {key.shape[2]} keys"
        )
    others = [t for t in (key, value, key_mask, density, permutation) if t is not None]
    if any(other.device != query.device for other in others):
        raise ValueError(
            f"all tensors must be on one device, got {query.device} and "
            f"{sorted({str(other.device) for other in others})}"
        )
