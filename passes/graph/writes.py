"""In-place changes in a graph, so that no value is read before or after the wrong one.

What is not known to be harmless counts: a result may share memory with every input unless it is
known to be a tensor of its own, an operation that nobody knows may write to every tensor that it is
given, and two inputs of the graph may be views of one tensor.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .calls import call_of
from .operations import aliased_inputs

# Results of these hold what they held; only what autograd or a reader knows of them changes.
_HARMLESS = frozenset({"requires_grad", "retain_grad", "clone", "rename"})  # `detach_` is a clone
# Functions that write to arguments without a word in their names: where those stand, and the
# argument, with its place and default, that makes them do it.
_HIDDEN_WRITES: dict[str, tuple[tuple[int, ...], int, str, bool]] = {
    "batch_norm": ((1, 2), 5, "training", False),  # running statistics
    "instance_norm": ((1, 2), 5, "use_input_stats", True),
    "embedding": ((1,), 3, "max_norm", False),
}
_INPUTS = "graph inputs"
Root = fx.Node | str


class UnknownValueError(Exception):
    """A tensor's value cannot be told: something else changes it in place."""


def is_in_place(node: fx.Node) -> bool:
    """Whether the node changes, or may change, a tensor that existed before it."""
    return bool(written_by(node))


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` changes in place, or may change."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    written = list(_written(node))
    return [x for x in tree_leaves(written) if isinstance(x, fx.Node)] if written else []


def _written(node: fx.Node) -> Iterator[Any]:
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    target = node.target
    call = call_of(node)
    if call is not None and call.name in _HARMLESS:
        return
    if isinstance(target, torch._ops.OpOverload):
        for at, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield node.args[at] if at < len(node.args) else node.kwargs.get(argument.name)
        return
    if isinstance(target, torch._ops.HigherOrderOperator):
        yield from _written_inside(node)
        return
    if call is None:  # not torch's own: a function that is allowed in graphs, a kernel
        yield list(node.all_input_nodes)
        return
    if call.in_place or _inplace_argument(node):
        yield call.args[:1]
    if call.name in _HIDDEN_WRITES:
        places, at, name, default = _HIDDEN_WRITES[call.name]
        if call.argument(at, name, default=default):
            yield [call.args[place] for place in places if place < len(call.args)]


def _inplace_argument(node: fx.Node) -> bool:
    """Whether a function such as `F.relu` is told to work in place."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if node.op != "call_function" or not node.args:
        return False
    at = _inplace_position(node.target)
    return at is not None and at < len(node.args) and bool(node.args[at])


@functools.cache
def _inplace_position(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # of C; torch's have an underscore for that
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _written_inside(node: fx.Node) -> Iterator[Any]:
    """Operands that the bodies of a higher-order operator change; all of them if none is seen."""
    operands = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]
    bodies = [body for x in operands if (body := _body(x)) is not None]
    if not bodies:
        yield operands
        return
    for body in bodies:
        inputs = body.graph.find_nodes(op="placeholder")
        writes = Writes(body.graph)
        if any(writes.between(x, x, None) for x in inputs):
            yield operands
            return


def _body(node: fx.Node) -> fx.GraphModule | None:
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, fx.GraphModule) else None


class Writes:
    """The in-place operations of one graph, by the memory that they change."""

    def __init__(self, graph: fx.Graph) -> None:
        self._by_root: dict[Root, list[fx.Node]] = defaultdict(list)
        self._roots: dict[fx.Node, frozenset[Root]] = {}
        for node in graph.nodes:
            written = [root for target in written_by(node) for root in self._root(target)]
            for root in dict.fromkeys(written):
                self._by_root[root].append(node)

    def between(self, node: fx.Node, after: fx.Node, before: fx.Node | None) -> list[fx.Node]:
        """The writes that may reach the memory of `node` and lie strictly between two nodes.

        Args:
            before: None for the end of the graph.
        """
        if not self._by_root:
            return []
        found = {write for root in self._root(node) for write in self._by_root.get(root, ())}
        return sorted(
            write for write in found if after < write and (before is None or write < before)
        )

    def value(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that gives `node` the value that `before` reads: itself or the last write.

        Raises:
            UnknownValueError: a write reaches the tensor through something else, or may.
        """
        writes = self.between(node, node, before)
        if not writes:
            return node
        last = writes[-1]
        if written_by(last) != [node]:
            raise UnknownValueError(f"`{last.name}` changes it in place through a view, or may")
        return last

    def _root(self, node: fx.Node) -> frozenset[Root]:
        """What made the memory that `node` may hold."""
        waiting = [node]
        while waiting:
            current = waiting[-1]
            if current in self._roots:
                waiting.pop()
                continue
            if current.op in ("placeholder", "get_attr"):
                self._roots[current] = frozenset((_INPUTS,))
                continue
            sources = aliased_inputs(current)
            missing = [source for source in sources if source not in self._roots]
            if missing:
                waiting += missing
                continue
            roots = frozenset().union(*(self._roots[source] for source in sources))
            self._roots[current] = roots or frozenset((current,))
        return self._roots[node]
