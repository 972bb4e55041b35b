"""Put the op where a site was, with the same shape, dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ... import ops as ops  # registers torch.ops.pisa
from ..graph.emit import emit
from ..graph.fake import example
from ..masks.padding import Padding
from ..sites.site import AttentionSite
from ..tokens.plan import TokenPlan, Tokens
from .density_input import MARK, Scheduled
from .numbers import mark_op
from .stand_ins import erase_unread, give_stand_ins


def substitute(
    site: AttentionSite, plan: TokenPlan, padding: Padding, tokens: Tokens, number: int
) -> None:
    """Replace `site.node` and what only led to it; everything else in the graph is left alone.

    Args:
        number: of the decision, among those of the graph.
    """
    node = site.node
    readers = give_stand_ins(site)
    with node.graph.inserting_before(node):
        out = _result(site, _attention(site, plan, padding, tokens, number))
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    for inner in sorted(site.interior, reverse=True):
        if not inner.users:
            inner.graph.erase_node(inner)
    erase_unread(readers)


def _attention(
    site: AttentionSite, plan: TokenPlan, padding: Padding, tokens: Tokens, number: int
) -> fx.Node:
    node = site.node
    query = site.query.emit(node)
    for operation, factor in site.factors:
        function = torch.mul if operation == "mul" else torch.div
        query = emit(node, function, (query, factor.emit(node)), {})
    masks = padding.emit(node)
    inputs = [masks.query(query), site.key.emit(node), site.value.emit(node)]
    # Under autocast the op sees what the attention would have cast its inputs to.
    inputs = [_cast(x, site.dtype, node) for x in inputs]
    settings = plan.policy.settings().as_arguments()
    settings |= {
        "scale": site.scale,
        "enable_gqa": site.enable_gqa or None,
        "impl": plan.policy.impl,
    }
    for name, length in zip(("exact_prefix", "exact_suffix"), plan.exact, strict=True):
        settings[name] = tokens.length(length, node) if length != 0 else None
    if plan.order is not None:
        settings["permutation"] = tokens.order(plan.order, example(inputs[0]).device, node)
    out = emit(
        node,
        torch.ops.pisa.attention.default,
        (*inputs, masks.keys),
        {name: value for name, value in settings.items() if value is not None},
    )
    mark_op(out, number)
    if plan.policy.varying is not None:
        out.meta[MARK] = Scheduled(plan.policy.varying, plan.policy.sparsity or 0.0)
    return masks.result(out, inputs[2])


def _result(site: AttentionSite, out: fx.Node) -> fx.Node:
    expected = example(site.node)
    for method, arguments in site.result:
        out = emit(site.node, method, (out, *arguments), {})
    out = _cast(out, expected.dtype, site.node)
    return _in_layout_of(expected, out, site.node)


def _cast(x: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    return x if example(x).dtype == dtype else emit(like, "to", (x, dtype), {})


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
    if isinstance(stride, int):
        return stride
    if stride.node.has_hint():
        return int(stride.node.hint)
    # Sizes that are only known at run time: any large ones show the same order.
    expression = stride.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 4096)))
