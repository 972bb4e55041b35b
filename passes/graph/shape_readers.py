"""What asks for the shape, the dtype or the device of a tensor, and not for its values.

`zeros_like(scores)` or `mask.expand_as(scores)` need no scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls import call_of
from .fake import example, is_tensor

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


def is_check(reader: fx.Node) -> bool:
    """Whether `reader` only compares the shape or dtype that it reads with what they should be."""
    call = call_of(reader)
    return call is not None and call.name in _CHECKS


def _is_contiguous(node: fx.Node) -> bool:
    return is_tensor(node) and bool(example(node).is_contiguous())
