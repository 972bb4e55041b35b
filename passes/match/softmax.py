"""Softmax in its spellings: one call, or written out with exp and sum.

Written out, the division by the sum may also follow the product with the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graph.axes import added_dims
from ..graph.calls import Call, call_of
from ..graph.fake import example


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` over dimension `dim` (not negative).

    `interior` are the nodes of the spelling, `node` included. With a `division`, `node` is not
    normalised: its product with the values is, by that node.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    interior: tuple[fx.Node, ...]
    division: fx.Node | None = None


def softmax_of(node: fx.Node) -> Softmax | None:
    """The softmax that `node` computes, or None."""
    call = call_of(node)
    if call is None or not isinstance(scores := call.argument(0, "input", "self"), fx.Node):
        return None
    if call.name == "softmax":
        return _called(node, call, scores)
    if call.name == "div":
        return _normalised(node, scores, call.argument(1, "other"))
    if call.name == "exp":
        return _exponential(node, scores) or _divided_later(node, scores)
    return None


def _called(node: fx.Node, call: Call, scores: fx.Node) -> Softmax | None:
    dim = call.argument(1, "dim")
    if dim is None:  # the choice that F.softmax warns about
        dim = 0 if example(scores).dim() in (0, 1, 3) else 1
    if not isinstance(dim, int):
        return None
    return Softmax(node, scores, dim % max(example(scores).dim(), 1), (node,))


def _normalised(node: fx.Node, weights: fx.Node, total: Any) -> Softmax | None:
    """`exp(scores) / exp(scores).sum(dim, keepdim=True)`"""
    exp = call_of(weights)
    if exp is None or exp.name != "exp" or not isinstance(exp.args[0], fx.Node):
        return None
    for nodes, dim in _totals(weights):
        if nodes[0] is total:
            return Softmax(node, exp.args[0], dim, (node, *nodes, weights))
    return None


def _divided_later(node: fx.Node, scores: fx.Node) -> Softmax | None:
    """`exp(scores)`, whose sum divides something else than itself."""
    for nodes, dim in _totals(node):
        for division in nodes[0].users:
            call = call_of(division)
            if call is None or call.name != "div" or call.args[0] is node:
                continue
            if call.argument(1, "other") is nodes[0]:
                return Softmax(node, scores, dim, (*nodes, node), division)
    return None


def _totals(weights: fx.Node) -> Iterator[tuple[tuple[fx.Node, ...], int]]:
    """Sums of `weights` that keep their dimension, at once or by a second node, and it."""
    for total in weights.users:
        dim = _reduced_dim(total, "sum", weights)
        if dim is not None:
            yield (total,), dim
        dim = _reduced_dim(total, "sum", weights, kept=False)
        if dim is None:
            continue
        rank = example(weights).dim()
        for again in total.users:
            call = call_of(again)
            if call is None or not call.args or call.args[0] is not total:
                continue
            if call.name == "unsqueeze" and call.argument(1, "dim") % rank == dim:
                yield (again, total), dim
            if call.name == "getitem":
                dims = added_dims(call.args[1], tuple((i,) for i in range(rank - 1)))
                if dims is not None and len(dims) == rank and dims.index(()) == dim:
                    yield (again, total), dim


def _exponential(node: fx.Node, argument: fx.Node) -> Softmax | None:
    """`exp(log_softmax(scores))` and `exp(scores - logsumexp(scores, dim, keepdim=True))`"""
    call = call_of(argument)
    if call is None or not call.args or not isinstance(scores := call.args[0], fx.Node):
        return None
    if call.name == "log_softmax":
        found = _called(node, call, scores)
        return found and Softmax(node, scores, found.dim, (node, argument))
    if call.name == "sub":
        total = call.argument(1, "other")
        dim = _reduced_dim(total, "logsumexp", scores)
        if dim is not None:
            return Softmax(node, scores, dim, (node, argument, total))
    return None


def _reduced_dim(node: Any, name: str, source: fx.Node, *, kept: bool = True) -> int | None:
    """The dimension over which `node` reduces `source` and keeps it (or not), or None."""
    call = call_of(node)
    if call is None or call.name != name or not call.args or call.args[0] is not source:
        return None
    dim = call.argument(1, "dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or bool(call.argument(2, "keepdim", default=False)) != kept:
        return None
    return int(dim % example(source).dim())
