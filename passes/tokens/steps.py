"""One operation back along the token axis: what the tokens were before it.

A walk takes these steps, see `tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import Axes
from ..graph.calls import Call
from ..graph.fake import example, is_tensor
from ..graph.operations import RESHAPES


@dataclass(frozen=True)
class TokenAxis:
    """Dimension `dim` of the tensor that `node` computes, in steps of `stride` tokens."""

    node: fx.Node
    dim: int
    stride: int = 1

    @property
    def size(self) -> Any:
        """A number or a symbol."""
        size = example(self.node).shape[self.dim]
        return size // self.stride if self.stride != 1 else size

    @property
    def hint(self) -> int:
        """The traced size; 0 for one that is only known when it runs."""
        return hint_of(self.size)


@dataclass(frozen=True)
class Joined:
    """Sequences one behind the other."""

    parts: tuple[TokenAxis, ...]


@dataclass(frozen=True)
class Merged:
    """A picture or a video that was flattened: its axes, slowest first."""

    axes: tuple[TokenAxis, ...]


Origin = Joined | Merged


def hint_of(size: Any) -> int:
    """A size as it was traced; 0 if it is only known when it runs."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def axes_at(nodes: Any, dim: int) -> Iterator[TokenAxis]:
    return (TokenAxis(node, dim) for node in nodes if is_tensor(node))


def joined(node: fx.Node, call: Call, dim: int) -> Origin | tuple[TokenAxis, ...]:
    tensors = call.argument(0, "tensors")
    if not isinstance(tensors, (list, tuple)):
        return ()
    at = call.argument(1, "dim", "axis", default=0) % example(node).dim()
    if call.name == "stack":
        return () if at == dim else tuple(axes_at(tensors, dim - (dim > at)))
    if at != dim:
        return tuple(axes_at(tensors, dim))
    parts = tuple(axes_at(tensors, dim))
    if len(parts) != len(tensors):
        return ()
    return parts if len(parts) == 1 else Joined(parts)


def indexed(call: Call, rank: int, dim: int) -> tuple[int | None, Any] | None:
    """Which dimension of the indexed tensor `dim` of the result is, and where it starts in it.

    The start is None where the whole dimension is taken, the dimension None where it is new. None
    for an index that does more than to slice.
    """
    if call.name == "select":
        at = call.argument(1, "dim") % rank
        return dim + (dim >= at), None
    if call.name in ("narrow", "slice"):
        at = call.argument(1, "dim", default=0) % rank
        start = call.argument(2, "start", default=0)
        step = call.argument(4, "step", default=1) if call.name == "slice" else 1
        if step != 1:
            return (dim, None) if at != dim else None
        return dim, (start or 0) if at == dim else None
    index = call.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (list, bool)) or is_tensor(item) for item in items):
        return None
    missing = rank - sum(item is not None and item is not Ellipsis for item in items)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [slice(None)] * missing
    source = result = 0
    for item in items:
        if item is None or isinstance(item, slice):
            if result == dim:
                return _start(source, item)
            result += 1
        source += item is not None
    return None


def _start(source: int, item: slice | None) -> tuple[int | None, Any] | None:
    if item is None:
        return None, None
    if item.step not in (None, 1):
        return None
    return source, None if item == slice(None) else (item.start or 0)


def viewed(node: fx.Node, call: Call, dim: int) -> Origin | tuple[TokenAxis, ...]:
    source = call.args[0]
    if not is_tensor(source):
        return ()
    before, after = example(source), example(node)
    if call.name in RESHAPES and _equal(before.shape[: dim + 1], after.shape[: dim + 1]):
        return (TokenAxis(source, dim),)  # also where sizes are unknown
    axes = Axes()
    given = axes.fresh(before.shape)
    dims = axes.through(call, given, before, after)
    if dims is None:
        return ()
    sources = axes.resolve(given)
    found = []
    for atom in axes.resolve(dims)[dim]:
        if not _is_one(axes.sizes[atom]):
            if (atom,) not in sources:
                return ()
            found.append(TokenAxis(source, sources.index((atom,))))
    return Merged(tuple(found)) if len(found) > 1 else tuple(found)


def _equal(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def unfolded(node: fx.Node, call: Call, dim: int) -> Origin | tuple[TokenAxis, ...]:
    """`F.unfold` into patches that do not overlap: [B, C, H, W] to [B, C * p * q, h * w]."""
    source = call.args[0]
    if not is_tensor(source) or example(source).dim() != 4 or example(node).dim() != 3 or dim != 2:
        return ()
    sides, dilation, padding, strides = (
        _pair(call.argument(at, name, default=default))
        for at, (name, default) in enumerate(
            (("kernel_size", None), ("dilation", 1), ("padding", 0), ("stride", 1)), start=1
        )
    )
    if sides != strides or dilation != (1, 1) or padding != (0, 0):
        return ()
    return Merged((TokenAxis(source, 2, sides[0]), TokenAxis(source, 3, sides[1])))


def _pair(value: Any) -> tuple[Any, Any]:
    first, second = value if isinstance(value, (list, tuple)) else (value, value)
    return first, second


def same_axis(node: fx.Node, dim: int) -> Iterator[TokenAxis]:
    """The operands of any other operation that have a dimension like `dim`, counted from the last.

    Norms, projections, activations, arithmetic: they leave tokens where they are.
    """
    size, from_last = example(node).shape[dim], example(node).dim() - dim
    for operand in node.all_input_nodes:
        if is_tensor(operand) and example(operand).dim() >= from_last:
            at = example(operand).dim() - from_last
            if statically_known_true(example(operand).shape[at] == size):
                yield TokenAxis(operand, at)
