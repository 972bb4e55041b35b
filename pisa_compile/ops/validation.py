"""Argument checks shared by policies, the functional interface and the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.curves import CURVES
from ..kernels.dispatch import IMPLEMENTATIONS
from ..kernels.params import BLOCK_SIZES, ORDERS, ROUTINGS


def check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"sparsity must be a number in [0, 1), got {_describe(sparsity)}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity must be in [0, 1), got {sparsity!r}; it is the fraction of key blocks "
            "that is approximated, and 0 is dense attention"
        )


def check_block_size(block_size: Any, name: str = "block_size") -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"{name} must be an int, got {_describe(block_size)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {block_size}")


def check_key_block_size(key_block_size: Any) -> None:
    if key_block_size is not None:
        check_block_size(key_block_size, "key_block_size")


def check_routing(routing: Any) -> None:
    _check_choice("routing", routing, ROUTINGS)


def check_order(order: Any) -> None:
    _check_choice("order", order, ORDERS)


def check_impl(impl: Any) -> None:
    if impl is not None:
        _check_choice("impl", impl, IMPLEMENTATIONS)


def check_exact(exact: Any) -> None:
    expected = "exact must be (prefix, suffix), two token counts >= 0"
    if isinstance(exact, str) or not isinstance(exact, Sequence) or len(exact) != 2:
        raise TypeError(f"{expected}, got {_describe(exact)}")
    for count in exact:
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{expected}, got {_describe(exact)}")
        if count < 0:
            raise ValueError(f"{expected}, got {tuple(exact)!r}")


def check_policy_exact(exact: Any) -> None:
    if isinstance(exact, str):
        _check_choice("exact", exact, ("auto",))
    else:
        check_exact(exact)


def check_grid(grid: Any) -> None:
    expected = 'grid must be "auto", (t, h, w) or (h, w), counts of tokens >= 1'
    if grid == "auto":
        return
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        raise TypeError(f"{expected}, got {_describe(grid)}")
    if any(isinstance(size, bool) or not isinstance(size, int) for size in grid):
        raise TypeError(f"{expected}, got {_describe(grid)}")
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise ValueError(f"{expected}, got {tuple(grid)!r}")


def check_curve(curve: Any) -> None:
    _check_choice("curve", curve, CURVES)


def check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {_describe(count)}")
    if count < 0:
        raise ValueError(f"{name} must be >= 0, got {count}")


def check_fraction(name: str, fraction: Any) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {_describe(fraction)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {fraction!r}")


def check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {_describe(scale)}")


def check_density(density: Any, query: Tensor) -> None:
    if density is None:
        return
    heads = query.shape[1]
    expected = (
        f"density must be a float32 tensor [] or [H] = [{heads}] on {query.device}, the exact "
        "fraction of the key blocks in (0, 1]"
    )
    if not isinstance(density, Tensor):
        raise TypeError(f"{expected}, got {_describe(density)}")
    if density.dtype != torch.float32 or density.device != query.device:
        raise TypeError(f"{expected}, got {density.dtype} on {density.device}")
    if density.dim() > 1 or (density.dim() == 1 and density.shape[0] != heads):
        raise ValueError(f"{expected}, got shape {tuple(density.shape)}")


def check_permutation(permutation: Any, query: Tensor, key: Tensor) -> None:
    if permutation is None:
        return
    expected = (
        f"permutation must be an int32 or int64 tensor [T] = [{query.shape[2]}] on {query.device} "
        "that lists every token once"
    )
    if not isinstance(permutation, Tensor):
        raise TypeError(f"{expected}, got {_describe(permutation)}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "permutation needs self-attention, one order for queries and keys, got "
            f"{query.shape[2]} query and {key.shape[2]} key tokens"
        )
    if permutation.dtype not in (torch.int32, torch.int64) or permutation.device != query.device:
        raise TypeError(f"{expected}, got {permutation.dtype} on {permutation.device}")
    if tuple(permutation.shape) != (query.shape[2],):
        raise ValueError(f"{expected}, got shape {tuple(permutation.shape)}")


def check_tensors(query: Any, key: Any, value: Any, attn_mask: Any, enable_gqa: bool) -> None:
    """Ranks, dtypes, devices and sizes of one call's tensors."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_describe(tensor)}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, H, T, D], got {tensor.dim()}: "
                f"{tuple(tensor.shape)}"
            )
    if not query.is_floating_point():
        raise TypeError(f"query must have a floating-point dtype, got {query.dtype}")
    for what in ("dtype", "device"):
        found = {name: getattr(tensor, what) for name, tensor in named.items()}
        if len(set(found.values())) != 1:
            raise TypeError(
                f"query, key and value must have one {what}, got "
                + ", ".join(f"{name} {x}" for name, x in found.items())
            )
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have one batch size, got {shapes}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head_dim, got {shapes}")
    if key.shape[1] != value.shape[1] or key.shape[2] != value.shape[2]:
        raise ValueError(f"key and value must have one head count and length, got {shapes}")
    if key.shape[2] == 0:
        raise ValueError(f"key must have at least one token, got {shapes}")
    if enable_gqa and (key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0):
        raise ValueError(
            f"with enable_gqa=True the query's head count must be a multiple of the key's, "
            f"got {shapes}"
        )
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must have one head count unless enable_gqa=True, got {shapes}"
        )
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)


def _check_mask(attn_mask: Any, query: Tensor, key: Tensor) -> None:
    expected = (
        "attn_mask must be a boolean key-padding mask that broadcasts to "
        f"[B, 1, 1, Tk] = [{query.shape[0]}, 1, 1, {key.shape[2]}] (True: the key takes part)"
    )
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{expected}, got {_describe(attn_mask)}")
    if attn_mask.dtype != torch.bool:
        raise TypeError(f"{expected}, got dtype {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise TypeError(f"{expected}, got a mask on {attn_mask.device}, query on {query.device}")
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if (
        len(shape) != 4
        or shape[0] not in (1, query.shape[0])
        or shape[1] != 1
        or shape[2] != 1
        or shape[3] not in (1, key.shape[2])
    ):
        raise ValueError(f"{expected}, got shape {tuple(attn_mask.shape)}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {_describe(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"
