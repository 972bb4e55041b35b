"""The number of the decision that put an op into a graph: calls are never told apart by counting.

A number is a place in the list of decisions that `rewrite_attention` returns. Most ops have it as a
literal argument. A region that is called several times holds one op for as many decisions: there
the number is data, a vector that every call passes in with the numbers of its own decisions, and
the literal is a place in that. It is one more input of the outermost graph, of which calls get
parts as views; nothing but an observer ever reads it.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx

from ..graph.emit import emit
from .regions import OPEN_CALLS
from .threading import Threading, empty_like_on

_NUMBER = "pisa_number"  # of an op: the place of its decision among those of its own graph
_BODY = "pisa_numbers"  # of a body: where its decisions start among those around it, and how many


def mark_op(op: fx.Node, number: int) -> None:
    op.meta[_NUMBER] = number


def mark_body(body: fx.Node, first: int, count: int) -> None:
    body.meta[_BODY] = first, count


def number_ops(gm: fx.GraphModule) -> Tensor | None:
    """Tell every op its number.

    Returns:
        A fake example int32 [numbers] of the graph's new last argument, which is to be 0, 1, 2, ...
        when it is called; None if it has none, as no region is called twice.
    """
    starts: dict[fx.GraphModule, set[int]] = defaultdict(set)
    closed: set[fx.GraphModule] = set()
    _collect(gm, 0, True, starts, closed)
    shared = {child for child, found in starts.items() if len(found) > 1}
    readers: list[fx.Node] = []
    for child, found in starts.items():
        for op in child.graph.nodes:
            number = op.meta.get(_NUMBER)
            if number is None:
                continue
            if child not in shared:
                op.kwargs = {**op.kwargs, "site": min(found) + number}
            elif child not in closed:
                op.kwargs = {**op.kwargs, "site": number}
                readers.append(op)
        child.recompile()
    if not readers:
        return None
    vector = empty_like_on(readers[0], _count(gm), dtype=torch.int32)
    _Numbers(set(readers)).lead(gm, vector)
    return vector


def _collect(
    gm: fx.GraphModule,
    start: int,
    is_open: bool,
    starts: dict[fx.GraphModule, set[int]],
    closed: set[fx.GraphModule],
) -> None:
    """Where the decisions of every graph start among those of the outermost one."""
    if start in starts[gm]:
        return
    starts[gm].add(start)
    if not is_open:
        closed.add(gm)
    for body in gm.graph.find_nodes(op="get_attr"):
        if _BODY in body.meta:
            child = gm.get_submodule(str(body.target))
            assert isinstance(child, fx.GraphModule)
            opens = is_open and all(call.target in OPEN_CALLS for call in body.users)
            _collect(child, start + body.meta[_BODY][0], opens, starts, closed)


def _count(gm: fx.GraphModule) -> int:
    """One more than the highest number that the graph's own ops and bodies have."""
    ends = [node.meta[_NUMBER] + 1 for node in gm.graph.nodes if _NUMBER in node.meta]
    ends += [sum(node.meta[_BODY]) for node in gm.graph.nodes if _BODY in node.meta]
    return max(map(int, ends))


class _Numbers(Threading):
    name = "pisa_numbers"

    def __init__(self, readers: set[fx.Node]) -> None:
        super().__init__()
        self._readers = readers

    def reads(self, node: fx.Node) -> bool:
        return node in self._readers

    def read(self, node: fx.Node, given: fx.Node) -> None:
        node.kwargs = {**node.kwargs, "calls": given}

    def operand(self, body: fx.Node, call: fx.Node, given: fx.Node) -> fx.Node:
        first, count = body.meta[_BODY]
        with call.graph.inserting_before(call):
            return emit(given, torch.narrow, (given, 0, first, count), {})
