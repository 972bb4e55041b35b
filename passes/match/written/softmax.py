"""Softmax in its spellings: one call, or written out with exponentials and their sum.

Written out, the division by the sum may also follow the product with the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...graph.axes import added_dims
from ...graph.calls import Call, call_of
from ...graph.fake import example, is_tensor
from ...graph.product import product_of
from ...graph.writes import UnknownValueError, Writes, written_by

_BASES = {"exp": 1.0, "exp2": math.log(2.0), "special_exp2": math.log(2.0)}
_PARTS = {"softmin", "div", "mul", "pow", *_BASES}
_CALLS = {"softmax", "softmin", "safe_softmax"}
# Looked at between exponentials, their sum and the quotient, to tell what is no softmax.
_MOST = 16
_ALTERED = (
    "its exponentials are not divided by just their own sum: what was done to them or to the sum "
    "makes it another function than softmax"
)


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `factor * scores` over dimension `dim` (not negative).

    `interior` are the nodes of the spelling, `node` included. With a `division`, `node` is not
    normalised: its product with the values is, by that node. An `obstacle` says in words why it is
    not quite a softmax.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    interior: tuple[fx.Node, ...]
    division: fx.Node | None = None
    factor: float = 1.0
    obstacle: str | None = None


def softmax_of(node: fx.Node, writes: Writes) -> Softmax | None:
    """The softmax that `node` computes, or None."""
    call = call_of(node)
    if call is None or not (call.name in _PARTS or "softmax" in call.name) or not is_tensor(node):
        return None
    try:
        if "softmax" in call.name or call.name == "softmin":
            return _called(node, call)
        if call.name == "div":
            weights, total = call.argument(0, "input"), call.argument(1, "other")
            return _normalised(node, weights, total, writes) or _altered(node, weights, total)
        if call.name == "mul":
            return _times_reciprocal(node, call, writes)
        if exponential := _exponential(call):
            found = _by_logarithm(node) or _divided_later(node, *exponential, writes)
            return found or _altered_and_divided_later(node, exponential[0])
    except UnknownValueError:
        pass
    return None


def _called(node: fx.Node, call: Call) -> Softmax | None:
    scores = call.argument(0, "input", "self", "logits")
    if not is_tensor(scores) or "log" in call.name or "backward" in call.name:
        return None
    dim = call.argument(1, "dim")
    if dim is None:  # the choice that F.softmax warns about
        dim = 0 if example(scores).dim() in (0, 1, 3) else 1
    if call.name not in _CALLS or not isinstance(dim, int) or "out" in call.kwargs:
        return Softmax(node, scores, 0, (node,), obstacle=f"`{call.name}` is no plain softmax")
    factor = -1.0 if call.name == "softmin" else 1.0
    return Softmax(node, scores, dim % max(example(scores).dim(), 1), (node,), factor=factor)


def _exponential(call: Call | None) -> tuple[fx.Node, float] | None:
    """`scores` and `factor` of a call that computes exp(factor * scores)."""
    if call is None or not call.args:
        return None
    if call.name == "pow":
        base, scores = call.argument(0, "input", "self"), call.argument(1, "exponent")
        if is_tensor(scores) and isinstance(base, (int, float)) and base > 0:
            return scores, math.log(base)
        return None
    factor = _BASES.get(call.name)
    scores = call.args[0]
    return (scores, factor) if factor is not None and is_tensor(scores) else None


def _normalised(node: fx.Node, weights: Any, total: Any, writes: Writes) -> Softmax | None:
    """`exp(scores) / exp(scores).sum(dim, keepdim=True)`"""
    if not isinstance(weights, fx.Node):
        return None
    weights = writes.value(weights, node)
    exponential = _exponential(call_of(weights))
    if exponential is None:
        return None
    scores, factor = exponential
    for nodes, dim in _totals(weights, writes):
        if nodes[0] is total:
            return Softmax(node, scores, dim, (node, *nodes, weights), factor=factor)
    return None


def _times_reciprocal(node: fx.Node, call: Call, writes: Writes) -> Softmax | None:
    """`exp(scores) * (1 / exp(scores).sum(dim, keepdim=True))`"""
    pair = call.args[:2]
    for weights, inverse in (pair, pair[::-1]) if len(pair) == 2 else ():
        one = call_of(inverse)
        if one is None or one.in_place or not one.args:
            continue
        total: Any = None
        if one.name == "reciprocal":
            total = one.args[0]
        elif one.name == "div" and one.args[0] == 1:
            total = one.argument(1, "other")
        found = _normalised(node, weights, total, writes)
        if found is not None:
            return replace(found, interior=(node, inverse, *found.interior[1:]))
    return None


def _divided_later(node: fx.Node, scores: fx.Node, factor: float, writes: Writes) -> Softmax | None:
    """`exp(scores)`, whose sum divides something else than itself."""
    for nodes, dim in _totals(node, writes):
        for division in nodes[0].users:
            call = call_of(division)
            if call is None or call.name != "div" or call.args[0] is node:
                continue
            if call.argument(1, "other") is nodes[0]:
                return Softmax(node, scores, dim, (*nodes, node), division, factor)
    return None


def _altered(node: fx.Node, weights: Any, total: Any) -> Softmax | None:
    """Exponentials divided by a sum of them, either of which something was done to."""
    denominators = _sources(total)
    for source in _sources(weights):
        exponential = _exponential(call_of(source))
        if exponential is not None and source in denominators and _has_sum(denominators):
            return Softmax(node, exponential[0], 0, (node, source), obstacle=_ALTERED)
    return None


def _altered_and_divided_later(node: fx.Node, scores: fx.Node) -> Softmax | None:
    """The same where the quotient is taken after the product with the values."""
    made = [node]
    for source in made:
        for user in source.users:
            call = call_of(user)
            if call is None or len(made) > _MOST or product_of(user) is not None:
                continue
            if call.name == "div" and call.args[0] not in made and _has_sum(made):
                return Softmax(node, scores, 0, (node,), obstacle=_ALTERED)
            if user not in made:
                made.append(user)
    return None


def _has_sum(nodes: list[fx.Node]) -> bool:
    return any((call := call_of(node)) is not None and call.name == "sum" for node in nodes)


def _sources(node: Any) -> list[fx.Node]:
    """`node` and what it is made from by a few operations, up to products and exponentials."""
    found: list[fx.Node] = []
    waiting = [node]
    while waiting and len(found) < _MOST:
        node = waiting.pop(0)
        if not isinstance(node, fx.Node) or node in found:
            continue
        found.append(node)
        if _exponential(call_of(node)) is None and product_of(node) is None:
            waiting += node.all_input_nodes
    return found


def _totals(weights: fx.Node, writes: Writes) -> Iterator[tuple[tuple[fx.Node, ...], int]]:
    """Sums of `weights` that keep their dimension, at once or by a second node, and it."""
    rank = example(weights).dim()
    for name, total in _read_as(weights, writes):
        dim = _reduced_dim(total, "sum", name)
        if dim is not None:
            yield (total,), dim
        dim = _reduced_dim(total, "sum", name, kept=False)
        if dim is None:
            continue
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


def _read_as(node: fx.Node, writes: Writes) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads the value of `node`, also as the tensor that it changed in place."""
    for name in (node, *written_by(node)):
        for user in name.users:
            if user is not node and node < user and writes.value(name, user) is node:
                yield name, user


def _by_logarithm(node: fx.Node) -> Softmax | None:
    """`exp(log_softmax(scores))` and `exp(scores - logsumexp(scores, dim, keepdim=True))`"""
    exp = call_of(node)
    argument = exp.args[0] if exp is not None and exp.name == "exp" else None
    call = call_of(argument)
    if call is None or not call.args or not is_tensor(scores := call.args[0]):
        return None
    assert isinstance(argument, fx.Node)
    if call.name == "log_softmax":
        dim = call.argument(1, "dim")
        if not isinstance(dim, int):
            return None
        return Softmax(node, scores, dim % max(example(scores).dim(), 1), (node, argument))
    if call.name == "sub" and call.kwargs.get("alpha", 1) == 1:
        total = call.argument(1, "other")
        found = _reduced_dim(total, "logsumexp", scores)
        if found is not None:
            return Softmax(node, scores, found, (node, argument, total))
    return None


def _reduced_dim(node: Any, name: str, source: fx.Node, *, kept: bool = True) -> int | None:
    """The dimension over which `node` reduces `source` and keeps it (or not), or None."""
    call = call_of(node)
    if call is None or call.name != name or not call.args or call.args[0] is not source:
        return None
    dim = call.argument(1, "dim", "axis")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or bool(call.argument(2, "keepdim", default=False)) != kept:
        return None
    return int(dim % example(source).dim())
