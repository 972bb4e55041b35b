"""Piecewise sparse attention on the CPU: the native library where it runs, else torch operators."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from ..params import AttentionParams
from . import native, torch_path

__all__ = ["attention"]

_log = logging.getLogger("pisa_compile")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.attention`, for CPU tensors."""
    reason = native.unavailable() or native.unsupported(query, value)
    if reason is not None:
        _say_once(reason)
    run = native.attention if reason is None else torch_path.attention
    return run(query, key, value, key_mask, params, density=density, permutation=permutation)


@cache
def _say_once(reason: str) -> None:
    _log.warning("attention runs on torch operators, slower than the native library: %s", reason)
