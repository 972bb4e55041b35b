"""What can be told of a mask without looking at its values.

Two facts, found by walking back through the graph: which of a few numbers its elements can have
(a boolean becomes {0, 1}, `(1 - m) * -10000` then {0, -10000}), and along which of its dimensions
it can vary (not along one that an `expand` made).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import Axes
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_number, is_tensor, number
from ..graph.operations import INTEGER_CASTS, PICKS, REARRANGEMENTS, SAME
from ..graph.writes import UnknownValueError, Writes
from .vmapped import HIDE, SHOW, shown

Values = frozenset[float]

NEGLIGIBLE = -1000.0
"""A logit this far below the others has no weight in any float dtype."""

_BINARY: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "div": operator.truediv,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "bitwise_and": lambda a, b: float(bool(a) and bool(b)),
    "bitwise_or": lambda a, b: float(bool(a) or bool(b)),
}
_UNARY: dict[str, Callable[[float], float]] = {
    "bitwise_not": lambda a: float(not a),
    "negative": operator.neg,
    "log": lambda a: math.log(a) if a > 0 else -math.inf,
}
_CASTS = SAME | INTEGER_CASTS
_PARTS = PICKS | {"index", "repeat", HIDE, SHOW}
_CONSTANTS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
_CONSTANTS |= {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
_FILLS = {"full": 1, "full_like": 1, "new_full": 2}
_POINTWISE = {*_BINARY, *_UNARY, *_CASTS, "masked_fill", "where"}
_MOST = 8


class MaskFacts:
    """Facts about the masks of one graph; each node is looked at once."""

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._values: dict[fx.Node, Values | None] = {}
        self._varying: dict[fx.Node, tuple[bool, ...]] = {}

    def values(self, node: fx.Node) -> Values | None:
        """The numbers that elements of `node` can have, or None if they can be anything."""
        if node not in self._values:
            found = self._derived_values(node)
            if found is None and _tensor(node).dtype == torch.bool:
                found = frozenset((0.0, 1.0))
            known = found is not None and len(found) <= _MOST and not any(map(math.isnan, found))
            self._values[node] = found if known else None
        return self._values[node]

    def varying(self, node: fx.Node) -> tuple[bool, ...]:
        """For each dimension, whether elements may differ along it."""
        if node not in self._varying:
            tensor = _tensor(node)
            still = [
                statically_known_true(size == 1) or statically_known_true(stride == 0)
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ]
            derived = self._derived_varying(node) if not all(still) else still
            self._varying[node] = tuple(not s and d for s, d in zip(still, derived, strict=True))
        return self._varying[node]

    def adopt(self, node: fx.Node, other: MaskFacts, source: fx.Node) -> None:
        """Take what `other` knows of `source`, in another graph, for an input of this one."""
        self._values[node] = other.values(source)
        self._varying[node] = other.varying(source)

    def _read(self, argument: Any, reader: fx.Node) -> fx.Node | None:
        """The node whose value `reader` gets for its argument."""
        if not is_tensor(argument):
            return None
        try:
            return self._writes.value(argument, reader)
        except UnknownValueError:
            return None

    def _values_of(self, argument: Any, reader: fx.Node) -> Values | None:
        if isinstance(argument, (bool, int, float)):
            return frozenset((float(argument),))
        if isinstance(argument, fx.Node) and is_number(argument):
            return frozenset((number(argument) or 0.0,))
        node = self._read(argument, reader)
        return None if node is None else self.values(node)

    def _derived_values(self, node: fx.Node) -> Values | None:
        call = call_of(node)
        if call is None:
            return None
        if call.name in _CONSTANTS:
            return frozenset((_CONSTANTS[call.name],))
        if call.name in _FILLS:
            return self._values_of(call.argument(_FILLS[call.name], "fill_value"), node)
        if call.name == "cat":
            return _union(*(self._values_of(part, node) for part in call.joined()))
        if call.name in ("masked_fill", "where", "setitem"):
            return self._chosen(call, node)
        if call.name in ("tensor", "scalar_tensor"):
            return self._values_of(call.argument(0, "data"), node)
        arguments = [self._values_of(argument, node) for argument in call.args[:2]]
        if not arguments:
            return None
        if call.name in _BINARY:
            return self._combined(call, arguments)
        first = arguments[0]
        if first is None or (call.in_place and call.name not in _UNARY):
            return None
        if call.name in _UNARY:
            return frozenset(map(_UNARY[call.name], first))
        if call.name in _CASTS:
            if _tensor(node).dtype == torch.bool:
                return frozenset(float(bool(value)) for value in first)
            return first if _tensor(node).is_floating_point() or first <= {0.0, 1.0} else None
        return first if call.name in REARRANGEMENTS | _PARTS else None

    def _combined(self, call: Call, arguments: list[Values | None]) -> Values | None:
        if len(arguments) != 2 or None in arguments or call.kwargs.get("rounding_mode"):
            return None
        first, second = arguments
        assert first is not None
        assert second is not None
        alpha = call.kwargs.get("alpha", 1)
        if alpha != 1 or (call.name == "div" and 0.0 in second):
            return None
        function = _BINARY[call.name]
        return frozenset(float(function(a, b)) for a, b in itertools.product(first, second))

    def _chosen(self, call: Call, node: fx.Node) -> Values | None:
        """Elements of one of two sources; of one alone where the choice is known."""
        if call.name == "where" and len(call.args) == 3:
            condition, if_true, if_false = call.args
        elif call.name == "masked_fill" and len(call.args) == 3:
            if_false, condition, if_true = call.args
        elif call.name == "setitem":
            if_false, condition, if_true = call.args[0], None, call.args[2]
        else:
            return None
        known = None if condition is None else self._values_of(condition, node)
        if known == frozenset((1.0,)):
            return self._values_of(if_true, node)
        if known == frozenset((0.0,)):
            return self._values_of(if_false, node)
        return _union(self._values_of(if_true, node), self._values_of(if_false, node))

    def _derived_varying(self, node: fx.Node) -> tuple[bool, ...]:
        rank = _tensor(node).dim()
        unknown = (True,) * rank
        call = call_of(node)
        if call is None:
            return unknown
        if call.name == "setitem":
            return self._assigned(call, node, rank)
        if call.name in _CONSTANTS or call.name in _FILLS:
            return (False,) * rank
        if call.name in _POINTWISE:
            return self._any_varying(call, node, rank)
        if call.name == SHOW:
            return shown(node, _POINTWISE, {*_CONSTANTS, *_FILLS}, self.varying) or unknown
        source = self._read(call.argument(0, "input", "tensors"), node)
        if call.name == "cat":
            return self._joined(call, node, rank)
        if source is None:
            return unknown
        if call.name == "repeat":
            return (False,) * (rank - _tensor(source).dim()) + self.varying(source)
        return self._moved(node) or unknown

    def _moved(self, node: fx.Node) -> tuple[bool, ...] | None:
        """Follow a chain of views as one: a reshape may undo what another one merged."""
        chain: list[tuple[Call, fx.Node, fx.Node]] = []
        source = node
        while (call := call_of(source)) is not None and call.name in REARRANGEMENTS | {"getitem"}:
            read = self._read(call.args[0], source)
            if read is None or _tensor(read) is not example(call.args[0]):
                break
            chain.append((call, read, source))
            source = read
        axes = Axes()
        dims = fresh = axes.fresh(_tensor(source).shape)
        for call, before, after in reversed(chain):
            through = axes.through(call, dims, _tensor(before), _tensor(after))
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

    def _any_varying(self, call: Call, node: fx.Node, rank: int) -> tuple[bool, ...]:
        result = [False] * rank
        for argument in (*call.args, *call.kwargs.values()):
            if not is_tensor(argument):
                continue
            source = self._read(argument, node)
            flags = (True,) * rank if source is None else self.varying(source)
            for i, varies in enumerate(reversed(flags), start=1):
                result[-i] |= varies
        return tuple(result)

    def _assigned(self, call: Call, node: fx.Node, rank: int) -> tuple[bool, ...]:
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

    def _joined(self, call: Call, node: fx.Node, rank: int) -> tuple[bool, ...]:
        dim = call.argument(1, "dim", default=0)
        parts = [self._read(part, node) for part in call.joined()]
        if not isinstance(dim, int) or None in parts:
            return (True,) * rank
        flags = [self.varying(part) for part in parts if part is not None]
        return tuple(i == dim % rank or any(f[i] for f in flags) for i in range(rank))


def _tensor(node: fx.Node) -> Tensor:
    """The fake value; `x[index] = value` stands for the changed `x`."""
    call = call_of(node)
    if call is not None and call.name == "setitem":
        node = call.args[0]
    value: Tensor = example(node)
    return value


def _union(*parts: Values | None) -> Values | None:
    return None if None in parts else frozenset().union(*(p for p in parts if p is not None))
