"""In-place changes in a graph, so that no value is read before or after the wrong one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from .calls import call_of, written_by

# Results that may share memory with their first argument.
_ALIASING = {
    *("transpose", "permute", "movedim", "reshape", "flatten", "unflatten", "unsqueeze"),
    *("squeeze", "expand", "expand_as", "view_as", "reshape_as", "narrow", "select", "slice"),
    *("getitem", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unfold"),
    *("diagonal", "clone", "t", "to", "type", "float", "half", "bfloat16", "double", "bool"),
    *("ravel", "as_strided", "view_as_real", "view_as_complex", "adjoint", "positive", "imag"),
    *("hsplit", "vsplit", "dsplit", "swapaxes", "real", "conj", "resolve_conj", "numpy_T"),
    *(".mT", ".T", ".mH", ".H", ".data", ".real", ".imag"),
}


class UnknownValueError(Exception):
    """A tensor's value cannot be told: something else changes it in place."""


class Writes:
    """The in-place operations of one graph, by the tensor whose memory they change."""

    def __init__(self, graph: fx.Graph) -> None:
        self._by_root: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._roots: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for target in written_by(node):
                self._by_root[self._root(target)].append(node)

    def between(self, node: fx.Node, after: fx.Node, before: fx.Node) -> list[fx.Node]:
        """The writes into the memory of `node` that lie strictly between two nodes."""
        if not self._by_root:
            return []
        return [
            write for write in self._by_root.get(self._root(node), ()) if after < write < before
        ]

    def value(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that gives `node` the value that `before` reads: itself or the last write.

        Raises:
            UnknownValueError: a write reaches the tensor through one of its views.
        """
        writes = self.between(node, node, before)
        if not writes:
            return node
        last = writes[-1]
        if written_by(last) != [node]:
            raise UnknownValueError(f"`{last.name}` changes it in place through a view")
        return last

    def _root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory of `node`."""
        passed = []
        while node not in self._roots:
            passed.append(node)
            source = _aliased(node)
            if source is None:
                self._roots[node] = node
                break
            node = source
        found = self._roots[node]
        self._roots.update(dict.fromkeys(passed, found))
        return found


def _aliased(node: fx.Node) -> fx.Node | None:
    call = call_of(node)
    if call is None or not call.args or not (call.in_place or call.name in _ALIASING):
        return None
    source: Any = call.args[0]
    return source if isinstance(source, fx.Node) else None
