"""What asks for the shape, the dtype or the device of a tensor, and not for its values.

`zeros_like(scores)` or `mask.expand_as(scores)` need no scores. When an attention goes, such readers
get a stand-in: one element, expanded to the shape of what went.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...graph.calls import call_of
from ...graph.emit import emit
from ...graph.fake import example, is_tensor

_LIKE = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    "randint_like",
}
_OF_FIRST = _LIKE | {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "size", "sym_size", "dim"),
    *("sym_numel", "numel", "nelement", "ndimension", "get_device", "is_floating_point"),
    *("element_size", "is_complex", ".shape", ".dtype", ".device", ".ndim", ".is_cuda"),
}
_OF_SECOND = {"expand_as", "view_as", "reshape_as", "type", "to", "expand"}
_CHECKS = {"assert_tensor_metadata"}


def reads_shape(reader: fx.Node, node: fx.Node) -> bool:
    """Whether `reader` would do the same for any other tensor of the shape and dtype of `node`."""
    call = call_of(reader)
    if call is None or call.in_place or not call.args:
        return False
    others = [x for x in (*call.args[1:], *call.kwargs.values()) if x is node]
    if call.name in _CHECKS:
        return not others
    if call.args[0] is node:
        if others or call.name not in _OF_FIRST:
            return False
        # The memory of `empty_like` lies as that of its model, which an expanded element cannot
        # tell.
        return call.name not in _LIKE or _is_contiguous(reader)
    return call.name in _OF_SECOND and len(others) == 1


def stand_in_sizes(node: fx.Node, sources: Iterable[fx.Node]) -> list[Any] | None:
    """The sizes of `node` as numbers, or as `(tensor, dim)` of a source that has the same.

    None if a symbolic size is that of no dimension of a source.
    """
    found: list[Any] = []
    for size in example(node).shape:
        if isinstance(size, int):
            found.append(size)
            continue
        places = (
            (source, dim)
            for source in sources
            for dim, other in enumerate(example(source).shape)
            if statically_known_true(other == size)
        )
        place = next(places, None)
        if place is None:
            return None
        found.append(place)
    return found


def give_stand_ins(gone: Iterable[fx.Node], sources: tuple[fx.Node, ...], end: fx.Node) -> None:
    """Let readers of the shapes of nodes that are about to go read stand-ins.

    Args:
        sources: tensors that stay, of which the sizes are read; they come before all that go.
        end: goes too; it is not looked at.
    """
    inside = {*gone, end}
    for node in inside - {end}:
        for reader in list(node.users):
            if reader in inside or not reads_shape(reader, node):
                continue
            if _is_check(reader):
                reader.graph.erase_node(reader)
                continue
            with reader.graph.inserting_before(reader):
                reader.replace_input_with(node, _stand_in(node, sources, reader))


def _stand_in(node: fx.Node, sources: tuple[fx.Node, ...], like: fx.Node) -> fx.Node:
    sizes = stand_in_sizes(node, sources)
    assert sizes is not None
    model: Tensor = example(node)
    like = like if is_tensor(like) else sources[0]
    given = [
        emit(like, "size", size, {}) if isinstance(size, tuple) else size for size in sizes
    ]
    factory = torch.ops.aten.empty.memory_format
    element = emit(like, factory, ([],), {"dtype": model.dtype, "device": model.device})
    return emit(like, "expand", (element, *given), {})


def _is_check(reader: fx.Node) -> bool:
    call = call_of(reader)
    return call is not None and call.name in _CHECKS


def _is_contiguous(node: fx.Node) -> bool:
    return is_tensor(node) and bool(example(node).is_contiguous())
