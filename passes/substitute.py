"""Put the op where a site was, with the same shape, dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .. import ops as ops  # registers torch.ops.pisa
from ..policy import Policy
from .site import AttentionSite, emit, example


def substitute(site: AttentionSite, policy: Policy) -> None:
    """Replace `site.node` in its graph; the node is erased, everything else is left alone."""
    node = site.node
    expected = example(node)
    inputs = [site.query, site.key, site.value]
    with node.graph.inserting_before(node):
        if any(example(x).dtype != expected.dtype for x in inputs):
            # Under autocast the op sees what SDPA would have cast its inputs to.
            inputs = [emit(node, "to", (x, expected.dtype), {}) for x in inputs]
        single_head = expected.dim() == 3
        if single_head:
            inputs = [emit(node, "unsqueeze", (x, 1), {}) for x in inputs]
        out = emit(
            node,
            torch.ops.pisa.attention.default,
            (*inputs, site.attn_mask),
            _settings(site, policy),
        )
        if single_head:
            out = emit(node, "squeeze", (out, 1), {})
        out = _in_layout_of(expected, out, node)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)


def _settings(site: AttentionSite, policy: Policy) -> dict[str, Any]:
    prefix, suffix = policy.exact or (0, 0)
    settings: dict[str, Any] = {
        "sparsity": policy.sparsity,
        "block_size": policy.block_size,
        "routing": policy.routing,
        "order": policy.order,
    }
    optional = {
        "scale": site.scale,
        "exact_prefix": prefix or None,
        "exact_suffix": suffix or None,
        "enable_gqa": site.enable_gqa or None,
        "impl": policy.impl,
    }
    return settings | {name: value for name, value in optional.items() if value is not None}


def _in_layout_of(expected: Tensor, out: fx.Node, like: fx.Node) -> fx.Node:
    """Copy `out` into the dimension order of `expected` if it has another one.

    The code after the site was traced with those strides and may `view` its result.
    """
    wanted, given = _memory_order(expected), _memory_order(example(out))
    if wanted == given:
        return out
    permuted = emit(like, "permute", (out, wanted), {})
    contiguous = emit(like, "contiguous", (permuted,), {})
    inverse = tuple(wanted.index(dim) for dim in range(expected.dim()))
    return emit(like, "permute", (contiguous, inverse), {})


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest; those of size 1 have no place and stay put."""
    strides, shape = tensor.stride(), tensor.shape
    moving = [dim for dim in range(tensor.dim()) if not _is_one(shape[dim])]
    by_stride = iter(sorted(moving, key=lambda dim: -_comparable(strides[dim])))
    return tuple(next(by_stride) if dim in moving else dim for dim in range(tensor.dim()))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _comparable(stride: Any) -> int:
    # Only the order matters, which the traced sizes give without a guard.
    return stride if isinstance(stride, int) else int(stride.node.hint)
