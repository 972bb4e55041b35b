"""What arguments must be: of policies and schedules field by field, of a call of the op as a whole.

The op and its fake implementation call `check_call`, so a call is checked once, whatever made it:
`pisa.attention`, a compiled graph, an exported program. Sizes may be symbolic there: a comparison
of those counts only where it holds for all values, and installs no guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.curves import CURVES
from ..kernels.params import BLOCK_SIZES, DTYPES, ORDERS, ROUTINGS
from .dispatch import IMPLEMENTATIONS


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
        if _surely(count < 0):
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


SETTINGS: dict[str, Callable[[Any], None]] = {
    "sparsity": check_sparsity,
    "block_size": check_block_size,
    "key_block_size": check_key_block_size,
    "routing": check_routing,
    "order": check_order,
    "exact": check_exact,
    "impl": check_impl,
}
"""The check of every setting that policies and calls share, by its name."""


def check_call(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    density: Any,
    permutation: Any,
    *,
    scale: Any,
    enable_gqa: bool,
    settings: Mapping[str, Any],
) -> None:
    """Everything that can be said of a call without reading the values of its tensors.

    Args:
        settings: by the names of `SETTINGS`.

    Raises:
        TypeError, ValueError: the text says what was expected and what came.
    """
    _check_tensors(query, key, value, enable_gqa)
    check_scale(scale)
    for name, setting in settings.items():
        SETTINGS[name](setting)
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
    _check_density(density, query)
    _check_permutation(permutation, query, key)


def _check_density(density: Any, query: Tensor) -> None:
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
    if density.dim() > 1 or (density.dim() == 1 and _surely(density.shape[0] != heads)):
        raise ValueError(f"{expected}, got shape {tuple(density.shape)}")


def _check_permutation(permutation: Any, query: Tensor, key: Tensor) -> None:
    if permutation is None:
        return
    tokens = query.shape[2]
    expected = (
        f"permutation must be an int32 or int64 tensor [T] = [{tokens}] on {query.device} "
        "that lists every token once"
    )
    if not isinstance(permutation, Tensor):
        raise TypeError(f"{expected}, got {_describe(permutation)}")
    if _surely(tokens != key.shape[2]):
        raise ValueError(
            "permutation needs self-attention, one order for queries and keys, got "
            f"{tokens} query and {key.shape[2]} key tokens"
        )
    if permutation.dtype not in (torch.int32, torch.int64) or permutation.device != query.device:
        raise TypeError(f"{expected}, got {permutation.dtype} on {permutation.device}")
    if permutation.dim() != 1 or _surely(permutation.shape[0] != tokens):
        raise ValueError(f"{expected}, got shape {tuple(permutation.shape)}")


def _check_tensors(query: Any, key: Any, value: Any, enable_gqa: bool) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_describe(tensor)}")
        if tensor.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got a nested one; pad it with "
                "torch.nested.to_padded_tensor and pass attn_mask for the keys that are padding"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor, got layout {tensor.layout}; use {name}.to_dense()"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, H, T, D], got {tensor.dim()}: "
                f"{tuple(tensor.shape)}"
            )
    if query.dtype not in DTYPES:
        raise TypeError(
            "query must have dtype float64, float32, bfloat16 or float16, "
            f"got {query.dtype}; cast it first"
        )
    for what in ("dtype", "device"):
        found = {name: getattr(tensor, what) for name, tensor in named.items()}
        if len(set(found.values())) != 1:
            raise TypeError(
                f"query, key and value must have one {what}, got "
                + ", ".join(f"{name} {x}" for name, x in found.items())
            )

    def require(condition: str, *differences: Any) -> None:
        if any(map(_surely, differences)):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
            raise ValueError(f"{condition}, got {shapes}")

    (batch, heads, _, width), (batches, groups, tokens, keys_width) = query.shape, key.shape
    require(
        "query, key and value must have one batch size",
        batch != batches,
        batches != value.shape[0],
    )
    require("query and key must have one head_dim", width != keys_width)
    require(
        "key and value must have one head count and length",
        groups != value.shape[1],
        tokens != value.shape[2],
    )
    require("key must have at least one token", tokens == 0)
    if not enable_gqa:
        require("query and key must have one head count unless enable_gqa=True", heads != groups)
        return
    multiple = "with enable_gqa=True the query's head count must be a multiple of the key's"
    require(multiple, groups == 0)
    require(multiple, heads % groups != 0)


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
    wanted = (query.shape[0], 1, 1, key.shape[2])
    if len(shape) != 4 or any(
        _surely(given != 1) and _surely(given != size)
        for given, size in zip(shape, wanted, strict=True)
    ):
        raise ValueError(f"{expected}, got shape {tuple(attn_mask.shape)}")


def _surely(condition: Any) -> bool:
    """Whether a comparison of sizes holds, whatever values its symbols have."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {_describe(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"
