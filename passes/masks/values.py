"""Which numbers the elements of a tensor can be, told from how it was made.

A boolean becomes {0, 1}, `(1 - m) * -10000` then {0, -10000}; `arange(n)` lies between 0 and n - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..graph.calls import Call, call_of
from ..graph.fake import example, is_number, is_tensor, number
from ..graph.operations import INTEGER_CASTS, PICKS, REARRANGEMENTS, SAME
from ..graph.writes import UnknownValueError, Writes
from .domain import (
    BINARY,
    LONGEST,
    MOST,
    UNARY,
    Domain,
    Interval,
    Values,
    changed,
    combined,
    fitted,
)
from .vmapped import HIDE, SHOW

CASTS = (SAME | INTEGER_CASTS) - {"dropout"}
CONSTANTS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
CONSTANTS |= {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
FILLS = {"full": 1, "full_like": 1, "new_full": 2}
_SINGLES = {"tensor": 0, "scalar_tensor": 0, "new_tensor": 1}
# Elements of their first argument, and no others.
_ELEMENTS = (REARRANGEMENTS | PICKS | {"index", "repeat", HIDE, SHOW}) - {"as_strided"}
_HELD = ("_tensor_constant", "lifted_tensor")


def tensor_of(node: fx.Node) -> Tensor:
    """The fake value; `x[index] = value` stands for the changed `x`."""
    call = call_of(node)
    if call is not None and call.name == "setitem":
        node = call.args[0]
    value: Tensor = example(node)
    return value


def read(argument: Any, reader: fx.Node, writes: Writes) -> fx.Node | None:
    """The node whose value `reader` gets for its argument, if that can be told."""
    if not is_tensor(argument):
        return None
    try:
        return writes.value(argument, reader)
    except UnknownValueError:
        return None


class ValueFacts:
    """The numbers in tensors of one graph; each node is looked at once."""

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._known: dict[fx.Node, Domain | None] = {}

    def values(self, node: fx.Node) -> Values | None:
        """The few numbers that elements of `node` can be, or None if they can be others."""
        known = self.domain(node)
        return known if isinstance(known, frozenset) else None

    def domain(self, node: fx.Node) -> Domain | None:
        """As `values`, or the bounds between which they lie."""
        if node not in self._known:
            dtype = tensor_of(node).dtype
            found = self._derived(node)
            found = None if found is None else fitted(found, dtype)
            if found is None and dtype == torch.bool:
                found = frozenset((0.0, 1.0))
            self._known[node] = found
        return self._known[node]

    def adopt(self, node: fx.Node, known: Domain | None) -> None:
        self._known[node] = known

    def _of(self, argument: Any, reader: fx.Node) -> Domain | None:
        if isinstance(argument, (bool, int, float)):
            return frozenset((float(argument),))
        if isinstance(argument, fx.Node) and is_number(argument):
            return _of_number(argument)
        node = read(argument, reader, self._writes)
        return None if node is None else self.domain(node)

    def _derived(self, node: fx.Node) -> Domain | None:
        call = call_of(node)
        if call is None:
            return _held(node)
        if call.name in CONSTANTS:
            return frozenset((CONSTANTS[call.name],))
        if call.name in FILLS:
            return self._of(call.argument(FILLS[call.name], "fill_value"), node)
        if call.name in _SINGLES:
            return self._of(call.argument(_SINGLES[call.name], "data", "s"), node) or _held(node)
        if call.name == "arange":
            return _counted(call)
        if call.name == "cat":
            return _union(*(self._of(part, node) for part in call.joined()))
        if call.name in ("masked_fill", "where", "setitem", "pad"):
            return self._chosen(call, node)
        return self._computed(call, node)

    def _computed(self, call: Call, node: fx.Node) -> Domain | None:
        dtype = tensor_of(node).dtype
        arguments = [self._of(argument, node) for argument in call.args[:2]]
        if not arguments or (first := arguments[0]) is None:
            return None
        name = call.name
        if name in ("max", "min"):
            if len(call.args) < 2 or not is_tensor(call.args[1]):
                return first  # a reduction, whose results are elements
            name += "imum"
        if name in BINARY:
            if len(call.args) != 2 or arguments[1] is None or call.kwargs.get("rounding_mode"):
                return None
            plain = call.kwargs.get("alpha", 1) == 1
            return combined(name, first, arguments[1], dtype) if plain else None
        if name in UNARY:
            return changed(name, first, dtype)
        reinterprets = (
            any(isinstance(x, torch.dtype) for x in call.args) and call.name in REARRANGEMENTS
        )
        if reinterprets:
            return None
        if call.name in CASTS:  # `detach_` among them
            return first
        return first if call.name in _ELEMENTS and not call.in_place else None

    def _chosen(self, call: Call, node: fx.Node) -> Domain | None:
        """Elements of one of two sources; of one alone where the choice is known."""
        condition: Any = None
        if call.name == "where" and len(call.args) == 3:
            condition, if_true, if_false = call.args
        elif call.name == "masked_fill":
            if_false = call.args[0]
            condition, if_true = call.argument(1, "mask"), call.argument(2, "value")
        elif call.name == "setitem":
            if_false, if_true = call.args[0], call.args[2]
        elif call.name == "pad" and call.argument(2, "mode", default="constant") == "constant":
            if_false, if_true = call.args[0], call.argument(3, "value", default=0.0) or 0.0
        else:
            return None
        known = None if condition is None else self._of(condition, node)
        if known == frozenset((1.0,)):
            return self._of(if_true, node)
        if known == frozenset((0.0,)):
            return self._of(if_false, node)
        return _union(self._of(if_true, node), self._of(if_false, node))


def _of_number(node: fx.Node) -> Domain | None:
    value = example(node)
    if isinstance(value, torch.SymInt):
        return None  # reading it would tie the graph to one size
    return frozenset((number(node) or 0.0,))


def _counted(call: Call) -> Domain | None:
    """`arange(end)` or `arange(start, end)`, by ones."""
    numbers = [*call.args, *(call.kwargs[x] for x in ("start", "end") if x in call.kwargs)]
    if not 1 <= len(numbers) <= 2 or "step" in call.kwargs:
        return None
    start, end = ([0, *numbers])[-2:]
    if isinstance(end, fx.Node):
        end = example(end)
    if type(start) is not int or not isinstance(end, (int, torch.SymInt)) or abs(start) > LONGEST:
        return None
    if isinstance(end, int):
        return Interval(start, end - 1) if end > start else None
    return Interval(start, start + LONGEST)


def _held(node: fx.Node) -> Values | None:
    """The numbers in a small tensor that the program itself holds, as export and `make_fx` keep
    what was written as `torch.tensor(...)`."""
    fake = node.meta.get("val", node.meta.get("example_value"))
    held = getattr(fake, "constant", None)
    if held is None and node.op == "get_attr" and str(node.target).startswith(_HELD):
        held = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(held, Tensor) or isinstance(held, FakeTensor):
        return None
    if held.numel() > MOST or held.is_complex():
        return None
    return frozenset(float(x) for x in held.flatten().tolist())


def _union(*parts: Domain | None) -> Domain | None:
    if None in parts or not parts:
        return None
    few = [part for part in parts if isinstance(part, frozenset)]
    joined: Values = frozenset().union(*few)
    wide = [part for part in parts if isinstance(part, Interval)]
    if not wide:
        return joined
    low = min(*(part.low for part in wide), *joined, wide[0].low)
    high = max(*(part.high for part in wide), *joined, wide[0].high)
    return Interval(low, high)
