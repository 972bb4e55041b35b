"""Along which of its dimensions a tensor can vary: not along one that an `expand` made."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import Axes
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor
from ..graph.operations import REARRANGEMENTS
from ..graph.writes import Writes
from .domain import BINARY, UNARY
from .values import CASTS, CONSTANTS, FILLS, ValueFacts, read, tensor_of
from .vmapped import SHOW, shown

Flags = tuple[bool, ...]
_POINTWISE = {*BINARY, *UNARY, *CASTS, "masked_fill", "where", "floor_divide", "remainder"}


class VaryingFacts:
    """Where tensors of one graph vary; each node is looked at once."""

    def __init__(self, writes: Writes, values: ValueFacts) -> None:
        self._writes = writes
        self._values = values
        self._known: dict[fx.Node, Flags] = {}

    def varying(self, node: fx.Node) -> Flags:
        """For each dimension, whether elements may differ along it."""
        if node not in self._known:
            tensor = tensor_of(node)
            still = [
                statically_known_true(size == 1) or statically_known_true(stride == 0)
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ]
            derived = self._derived(node) if not all(still) else tuple(still)
            self._known[node] = tuple(not s and d for s, d in zip(still, derived, strict=True))
        return self._known[node]

    def adopt(self, node: fx.Node, known: Flags) -> None:
        self._known[node] = known

    def _read(self, argument: Any, reader: fx.Node) -> fx.Node | None:
        return read(argument, reader, self._writes)

    def _is_one_number(self, node: fx.Node) -> bool:
        values = self._values.values(node)
        return values is not None and len(values) == 1

    def _derived(self, node: fx.Node) -> Flags:
        rank = tensor_of(node).dim()
        unknown = (True,) * rank
        call = call_of(node)
        if call is None:
            return unknown
        if self._is_one_number(node):
            return (False,) * rank
        if call.name == "setitem":
            return self._assigned(call, node, rank)
        if call.name in CONSTANTS or call.name in FILLS:
            return (False,) * rank
        if call.name in _POINTWISE:
            return self._any(call, node, rank)
        if call.name == SHOW:
            return shown(node, _POINTWISE, self._is_one_number, self.varying) or unknown
        source = self._read(call.argument(0, "input", "tensors"), node)
        if call.name == "cat":
            return self._joined(call, node, rank)
        if source is None:
            return unknown
        if call.name == "repeat":
            return (False,) * (rank - tensor_of(source).dim()) + self.varying(source)
        return self._moved(node) or self._picked(call, source, node) or unknown

    def _moved(self, node: fx.Node) -> Flags | None:
        """Follow a chain of views as one: a reshape may undo what another one merged."""
        chain: list[tuple[Call, fx.Node, fx.Node]] = []
        source = node
        while (call := call_of(source)) is not None and call.name in REARRANGEMENTS | {"getitem"}:
            before = self._read(call.args[0], source)
            if before is None or tensor_of(before) is not example(call.args[0]):
                break
            chain.append((call, before, source))
            source = before
        axes = Axes()
        dims = fresh = axes.fresh(tensor_of(source).shape)
        for call, before, after in reversed(chain):
            through = axes.through(call, dims, tensor_of(before), tensor_of(after))
            if through is None:
                return None
            dims = through
        if not chain:
            return None
        fixed = {
            atom
            for group, varies in zip(axes.resolve(fresh), self.varying(source), strict=True)
            for atom in group
            if not varies
        }
        still = fixed | axes.repeats
        return tuple(any(atom not in still for atom in group) for group in axes.resolve(dims))

    def _picked(self, call: Call, source: fx.Node, node: fx.Node) -> Flags | None:
        """`x[i, j]` with tensors of indices: as these vary, but not along what `x` is constant in.

        Indices stand side by side, before them whole dimensions or none, and after them too.
        """
        if call.name not in ("getitem", "index"):
            return None
        given = call.args[1]
        items = list(given) if isinstance(given, (tuple, list)) else [given]
        # aten.index spells a whole dimension as None, where getitem makes a new one of it.
        items = [slice(None) if x is None and call.name == "index" else x for x in items]
        first = next((at for at, item in enumerate(items) if item != slice(None)), None)
        while items and isinstance(items[-1], slice) and items[-1] == slice(None):
            items.pop()
        if first is None or first >= len(items):
            return None
        indices = [self._read(item, node) for item in items[first:]]
        if any(x is None or tensor_of(x).dtype == torch.bool for x in indices):
            return None
        flags = list(self.varying(source))
        known = [x for x in indices if x is not None]
        picked = [False] * max(tensor_of(x).dim() for x in known)
        for along, index in zip(flags[first:], known, strict=False):
            for at, varies in enumerate(reversed(self.varying(index)), start=1):
                picked[-at] |= along and varies
        return (*flags[:first], *picked, *flags[first + len(known) :])

    def _any(self, call: Call, node: fx.Node, rank: int) -> Flags:
        result = [False] * rank
        for argument in (*call.args, *call.kwargs.values()):
            if not is_tensor(argument):
                continue
            source = self._read(argument, node)
            flags = (True,) * rank if source is None else self.varying(source)
            for i, varies in enumerate(reversed(flags), start=1):
                result[-i] |= varies
        return tuple(result)

    def _assigned(self, call: Call, node: fx.Node, rank: int) -> Flags:
        """A number written to some places: they differ along the dimensions that pick them."""
        source, index, value = call.args
        base = self._read(source, node)
        items = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
        items += [slice(None)] * (rank - len(items))
        plain = all(isinstance(item, (int, slice)) for item in items)
        if base is None or not plain or not isinstance(value, (bool, int, float)):
            return (True,) * rank
        flags = zip(self.varying(base), items, strict=True)
        return tuple(varies or item != slice(None) for varies, item in flags)

    def _joined(self, call: Call, node: fx.Node, rank: int) -> Flags:
        dim = call.argument(1, "dim", default=0)
        parts = [self._read(part, node) for part in call.joined()]
        if not isinstance(dim, int) or None in parts:
            return (True,) * rank
        flags = [self.varying(part) for part in parts if part is not None]
        return tuple(i == dim % rank or any(f[i] for f in flags) for i in range(rank))
