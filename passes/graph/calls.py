"""What a node calls, under one name for all spellings.

`x.softmax(-1)`, `F.softmax(x, -1)` and `aten.softmax.int(x, -1)` are all `softmax`; `x *= 2`,
`x.mul_(2)` and `torch.multiply(x, 2)` are all `mul`, the first two in place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import fx

_SYNONYMS = {
    "add": ("iadd",),
    "sub": ("isub", "subtract"),
    "mul": ("imul", "multiply"),
    "div": ("truediv", "itruediv", "divide", "true_divide"),
    "bitwise_and": ("and", "iand", "logical_and"),
    "bitwise_or": ("or", "ior", "logical_or"),
    "bitwise_not": ("invert", "inv", "not", "logical_not"),
    "negative": ("neg",),
    "matmul": ("imatmul",),
    "softmax": ("special_softmax",),
    "dropout": ("native_dropout", "alpha_dropout", "feature_dropout"),
    "transpose": ("swapaxes", "swapdims"),
    "movedim": ("moveaxis",),
    "reshape": ("view", "_unsafe_view", "view_copy"),
    "permute": ("permute_copy",),
    "expand": ("broadcast_to", "expand_copy"),
    "max": ("amax",),
    "masked_fill": ("masked_fill_copy",),
    "type": ("type_as",),
    "to": ("_to_copy", "to_copy", "convert_element_type"),
    "cat": ("concat", "concatenate"),
    "clone": (
        *("contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "detach_copy"),
        *("get_data_attr", "alias_copy", ".data"),
    ),
}
_NAMES = {name: main for main, others in _SYNONYMS.items() for name in (main, *others)}
_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "iand", "ior", "imatmul", "setitem"}
_IN_PLACE_OPERATORS |= {"ipow", "ixor", "ifloordiv", "imod", "ilshift", "irshift", "iconcat"}


class Call(NamedTuple):
    """A call of a torch function, method or operator. `in_place` calls change `args[0]`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """The argument at `position` (the tensor is 0), or by one of its keywords."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def joined(self) -> tuple[Any, ...]:
        """What `cat` or `stack` joins."""
        return tuple(self.argument(0, "tensors", default=()))

    def rest(self, position: int, *names: str) -> tuple[Any, ...]:
        """Arguments from `position` on, given one by one or as one sequence."""
        given = self.args[position:] or (self.argument(position, *names, default=()),)
        if len(given) == 1 and isinstance(given[0], (tuple, list)):
            return tuple(given[0])
        return tuple(given)


def call_of(node: Any) -> Call | None:
    """The call that `node` makes, or None for placeholders and for what is not torch's."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr:
        name = f".{node.args[1]}"
        return Call(_NAMES.get(name, name), node.args[:1], {}, in_place=False)
    named = _named(node.target)
    if named is None:
        return None
    name, in_place = named
    args, kwargs = node.args, node.kwargs
    if not args and (first := kwargs.keys() & {"input", "self"}):
        kwargs = dict(kwargs)
        args = (kwargs.pop(first.pop()),)
    elif name == "where" and node.op == "call_method" and len(args) > 1:  # x.where(condition, y)
        args = (args[1], args[0], *args[2:])
    return Call(name, args, kwargs, in_place)


def _named(target: Any) -> tuple[str, bool] | None:
    """The name of what is called and whether it works in place; None for what is not torch's.

    Args:
        target: of a node: a method's name, a function, an operator.
    """
    if isinstance(target, str):
        return _plain(target)
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims"):
            return None
        return _plain(target._opname)[0], target._schema.is_mutable
    module = getattr(target, "__module__", None) or ""
    name = str(getattr(target, "__name__", ""))
    if module == "_operator":
        return _plain(name.strip("_"))  # `and_` is not in place
    return _plain(name) if module.split(".")[0] == "torch" else None


@functools.lru_cache(maxsize=4096)  # a graph asks several times for each of its nodes
def _plain(name: str) -> tuple[str, bool]:
    plain = name.strip("_")
    in_place = plain in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return _NAMES.get(name, _NAMES.get(plain, plain)), in_place
