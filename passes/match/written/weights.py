"""What may happen to attention weights after their softmax: nothing but views and casts.

Before the softmax a number that is added to all scores changes nothing; here it would add the sum
of the values to every result.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ...graph.axes import CASTS, Axes
from ...graph.calls import Call, call_of
from ...graph.fake import example, is_tensor
from ...graph.product import product_of
from ..spelling import GraphFacts
from .chain import Chain, checked_call, constant, drift, stands, view
from .path import Link, chosen
from .softmax import Softmax

AFTER = "between its softmax and the product with the values"


def follow_weights(
    path: list[Link], chain: Chain, axes: Axes, softmax: Softmax, facts: GraphFacts
) -> None:
    """Lead `chain` from the softmax, the first node of `path`, to the last.

    Raises:
        MismatchError: something on the path changes the weights.
    """
    for link in path[1:]:
        if chain.obstacle is None:
            _advance(chain, link, axes, softmax, facts)
        else:
            drift(chain, link, axes, AFTER)
        chain.passed(link.node)


def _advance(chain: Chain, link: Link, axes: Axes, softmax: Softmax, facts: GraphFacts) -> None:
    operand, node = link.operand, link.node
    call = call_of(node)
    assert call is not None
    if product_of(node) is not None or not is_tensor(operand) or not is_tensor(node):
        drift(chain, link, axes, AFTER)
        return
    call = checked_call(operand, node, AFTER)
    if view(chain, call, operand, node, axes) or _changes_nothing(call, operand, node, facts):
        return
    rows = _empty_rows(call, node, operand, softmax, facts) if call.name == "where" else None
    if rows is not None:
        chain.nodes += rows
        return
    chain.obstacle = _changed(call, operand, node, facts)
    drift(chain, link, axes, AFTER)


def _other(call: Call, operand: fx.Node) -> Any:
    first, second = call.argument(0, "input", "self"), call.argument(1, "other")
    return second if first is operand else first


def _changes_nothing(call: Call, operand: fx.Node, node: fx.Node, facts: GraphFacts) -> bool:
    """`weights + 0` and `weights * 1`."""
    neutral = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}.get(call.name)
    if neutral is None or call.argument(0, "input", "self") is not operand:
        return False
    other = _other(call, operand)
    if is_tensor(other) or call.argument(2, "rounding_mode", "alpha", default=1) not in (None, 1):
        return False
    return constant(other, node, facts) == neutral


def _changed(call: Call, operand: fx.Node, node: fx.Node, facts: GraphFacts) -> str:
    """What an operation does to the weights, in words."""
    other = _other(call, operand)
    value = constant(other, node, facts)
    what = f"{value:g}" if value is not None else f"`{getattr(other, 'name', other)}`"
    if call.name == "add":
        return f"{what} is added to its attention weights"
    if call.name in ("sub", "rsub"):
        return f"{what} and its attention weights are subtracted from each other"
    if call.name in ("mul", "div"):
        instead = "; apply it to the result instead" if value is not None else ""
        return f"`{call.name}` by {what} stands {AFTER}{instead}"
    return stands(call, AFTER)


def _empty_rows(
    call: Call, node: fx.Node, operand: fx.Node, softmax: Softmax, facts: GraphFacts
) -> list[fx.Node] | None:
    """`where(row has no key, 0, weights)`, which is what the op gives such rows.

    Returns:
        The nodes that find those rows, and the zeros.
    """
    sources = chosen(call)
    if sources is None or not _is_softmax(operand, softmax):
        return None
    condition, if_true, if_false = sources
    other = if_true if operand is if_false else if_false
    nodes: list[fx.Node] = []
    if constant(other, node, facts) != 0.0:
        return None
    if _tells_rows(condition, softmax, nodes) is not (operand is if_false):
        return None
    if is_tensor(other) and len(other.users) == 1:
        nodes.append(other)
    return nodes


def _is_softmax(node: fx.Node, softmax: Softmax) -> bool:
    call = call_of(node)
    if node is not softmax.node and call is not None and call.name in CASTS:
        return call.args[0] is softmax.node
    return node is softmax.node


def _tells_rows(node: Any, softmax: Softmax, nodes: list[fx.Node]) -> bool | None:
    """True if `node` says of each row whether all its scores are -inf, False if the opposite."""
    call = call_of(node)
    if call is None or call.in_place or not call.args:
        return None
    if call.name == "bitwise_not":
        found = _tells_rows(call.args[0], softmax, nodes)
    elif call.name in ("all", "any"):
        dim = call.argument(1, "dim")
        kept = call.argument(2, "keepdim", default=False)
        rank = example(softmax.scores).dim()
        if not isinstance(dim, int) or dim % rank != softmax.dim or not kept:
            return None
        found = _tells_removed(call.args[0], softmax, nodes)
        if found is not (call.name == "all"):
            return None
    else:
        return None
    nodes.append(node)
    return not found if call.name == "bitwise_not" and found is not None else found


def _tells_removed(node: Any, softmax: Softmax, nodes: list[fx.Node]) -> bool | None:
    """True if `node` says of each score whether it is -inf, False if the opposite."""
    call = call_of(node)
    if call is None or call.in_place or not call.args:
        return None
    if call.name == "bitwise_not":
        found = _tells_removed(call.args[0], softmax, nodes)
        found = None if found is None else not found
    else:
        compares = call.args[0] is softmax.scores and call.argument(1, "other") == -math.inf
        found = {"eq": True, "ne": False, "gt": False}.get(call.name) if compares else None
    if found is not None:
        nodes.append(node)
    return found
