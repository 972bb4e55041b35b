"""Finds the device and runs the planned launches of a valid call. Never synchronises."""

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

from ..params import AttentionParams
from .configs import LEAST, Config, lookup
from .forward import forward_kernel
from .geometry import Device
from .plan import plan

logger = logging.getLogger("pisa_compile")

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
