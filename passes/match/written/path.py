"""The ways from a product to a softmax, and from the softmax to the next product.

A way is first looked for through operations that can be part of a softmax attention, then through
any others, so that what stands in the way can be named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...graph.calls import Call, call_of
from ...graph.fake import example, is_tensor, sizes
from ...graph.operations import JOINS, REARRANGEMENTS, SAME
from ...graph.product import product_of
from ...graph.shape_readers import reads_shape
from ...graph.writes import UnknownValueError, Writes, written_by

# Long enough for scores that are scaled, masked, cast and viewed several times each.
_LENGTH = 16
_MOST_PATHS = 6
_EITHER = {"add", "mul", "sub", "rsub"}  # the path may run through either operand
_FIRST = {"div", "masked_fill", "setitem", "negative", "getitem"}
_ALSO_EITHER = {"div", "maximum", "minimum", "pow", "floordiv", "addcmul", "addcdiv", "lerp"}
_ENDS = {"softmax", "log_softmax", "softmin", "safe_softmax"}  # the next attention
_REDUCTIONS = {"sum", "mean", "max", "min", "prod", "argmax", "norm", "logsumexp", "any", "all"}


@dataclass(frozen=True)
class Link:
    """One node of a path. `operand` is the argument through which the path enters it.

    After an in-place operation the operand is the tensor that was changed, while the link before
    is the node that changed it. `changed` says in words why the value that goes along the path
    cannot be told, if something else wrote to it.
    """

    node: fx.Node
    operand: fx.Node
    changed: str | None = None


def back_to_products(
    node: fx.Node, reader: fx.Node, writes: Writes, *, through_anything: bool
) -> list[list[Link]]:
    """Paths from a product to `node`, both included, the most likely first.

    Args:
        through_anything: whether a path may hold what is no part of a softmax attention, other
            products included.
    """
    budget = [8 * _LENGTH]

    def search(node: Any, reader: fx.Node, depth: int) -> Iterator[list[Link]]:
        budget[0] -= 1
        if not isinstance(node, fx.Node) or depth == 0 or budget[0] < 0:
            return
        node, changed = _value(node, reader, writes)
        if product_of(node) is not None:
            yield [Link(node, node, changed)]
        for operand in _likely_first(operands(node, through_anything), node):
            for found in search(operand, node, depth - 1):
                yield [*found, Link(node, operand, changed)]

    return list(itertools.islice(search(node, reader, _LENGTH), _MOST_PATHS))


def forward_to_products(
    node: fx.Node, writes: Writes, *, through_anything: bool
) -> Iterator[list[Link]]:
    """Paths from `node` to a product that reads its result, both included, the shortest first."""
    written = written_by(node)
    frontier = [[Link(node, written[0] if len(written) == 1 else node)]]
    count = 0
    for _ in range(_LENGTH):
        following = []
        for path in frontier:
            for link in _readers(path[-1], writes):
                product = product_of(link.node)
                if product is not None and count < _MOST_PATHS:
                    yield [*path, link]
                    count += 1
                ends = product is None and _name(link.node) in _REDUCTIONS | _ENDS
                if link.operand in operands(link.node, through_anything) and not ends:
                    following.append([*path, link])
        frontier = following[:_LENGTH]


def _readers(last: Link, writes: Writes) -> Iterator[Link]:
    """What reads the value that the last link of a path computes.

    What an operation changed in place is read as its result, or as the tensor that it changed.
    """
    names = [last.node]
    if last.operand is not last.node and written_by(last.node) == [last.operand]:
        names.append(last.operand)
    seen = {last.node}
    for name in names:
        for user in name.users:
            if user in seen or not last.node < user:
                continue
            value, changed = _value(name, user, writes)
            if value in (name, last.node) or changed is not None:
                seen.add(user)
                yield Link(user, name, changed)


def _value(node: fx.Node, reader: fx.Node, writes: Writes) -> tuple[fx.Node, str | None]:
    """What gives a node the value that is read, or itself and why that cannot be told."""
    try:
        return writes.value(node, reader), None
    except UnknownValueError as reason:
        return node, str(reason)


def operands(node: fx.Node, through_anything: bool = False) -> tuple[Any, ...]:
    """The arguments through which a path may run."""
    call = call_of(node)
    if call is None:
        return ()
    if call.name in _EITHER or (through_anything and call.name in _ALSO_EITHER):
        return call.args[:2]
    if call.name == "where":
        return (chosen(call) or ())[1:]
    if call.name in _FIRST | REARRANGEMENTS | SAME:
        return call.args[:1]
    return _any_operands(node, call) if through_anything else ()


def chosen(call: Call) -> tuple[Any, Any, Any] | None:
    """Condition and both sources of a `where`, some of which may be keywords."""
    given = call.kwargs
    if len(call.args) == 3:
        return call.args[0], call.args[1], call.args[2]
    if "other" not in given or not call.args:
        return None
    if "condition" in given:
        return given["condition"], call.args[0], given["other"]
    source = call.args[1] if len(call.args) == 2 else given.get("input")
    return None if source is None else (call.args[0], source, given["other"])


def _any_operands(node: fx.Node, call: Call) -> tuple[Any, ...]:
    product = product_of(node)
    if product is not None:
        return product.left, product.right
    if call.name in JOINS:
        return call.joined()
    if call.name == "einsum":  # of one operand, or one that is no product
        return tuple(node.all_input_nodes)
    first = call.argument(0, "input", "self")
    if not isinstance(first, fx.Node) or "attention" in call.name or call.name == "embedding":
        return ()
    return () if reads_shape(node, first) else (first,)


def _likely_first(found: tuple[Any, ...], node: fx.Node) -> list[fx.Node]:
    """Nodes among `found`, those of the size of `node` before those that broadcast."""
    nodes = [operand for operand in dict.fromkeys(found) if isinstance(operand, fx.Node)]
    if not is_tensor(node):
        return nodes
    own = sizes(example(node))
    return sorted(nodes, key=lambda x: not (is_tensor(x) and sizes(example(x)) == own))


def _name(node: fx.Node) -> str:
    call = call_of(node)
    return "" if call is None else call.name
