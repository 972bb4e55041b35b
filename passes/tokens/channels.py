"""Channel attention, told from token attention by where its axes come from.

Some networks (XCiT, DaViT) let channels attend channels: the product of query and key sums over the
tokens, and the softmax runs over channels. It looks like attention whose sequence is as long as a
head is wide. A linear layer or a convolution on the way tells which axis is which: what it makes
are channels, what it leaves in place are tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import fx

from ..graph.axes import Axes, Dims
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor
from ..graph.operations import SLICES, SPLITS
from ..graph.product import Product, product_of
from ..sites.site import AttentionSite, View
from .steps import indexed, same_axis

Kind = Literal["token", "channel"]

_MOST = 64  # projections stand near their attention


def attends_channels(site: AttentionSite) -> bool:
    """Whether query and key of `site` are multiplied along their tokens."""
    # One after the other: the first one tells for nearly all attention.
    wanted: tuple[tuple[int, Kind], ...] = ((-1, "token"), (-2, "channel"))
    return all(
        _kind_along(view, dim) == kind for view in (site.query, site.key) for dim, kind in wanted
    )


def _kind_along(view: View, dim: int) -> Kind | None:
    """What a dimension of a view is."""
    axes = Axes()
    given = axes.fresh(example(view.node).shape)
    dims = view.through(axes, given)
    return None if dims is None else _kind(view.node, _sources(given, dims, dim, axes))


def _sources(given: Dims, dims: Dims, dim: int, axes: Axes) -> list[int]:
    """The dimensions of a tensor that make up one of a view of it, those of size 1 excepted."""
    wanted = [atom for atom in axes.resolve(dims)[dim] if axes.sizes[atom] != 1]
    groups = axes.resolve(given)
    return [at for at, group in enumerate(groups) if any(atom in group for atom in wanted)]


def _kind(node: fx.Node, dims: list[int]) -> Kind | None:
    """What the dimensions are by the nearest layer behind them; None if none is found."""
    waiting = [(node, dim) for dim in dims]
    seen: set[tuple[fx.Node, int]] = set()
    while waiting and len(seen) < _MOST:
        place = waiting.pop()
        if place in seen or not is_tensor(place[0]):
            continue
        seen.add(place)
        call = call_of(place[0])
        if call is None or not call.args:
            continue
        product = product_of(place[0])
        kind = _made_by_layer(call, product, *place)
        if kind is not None:
            return kind
        if product is None and "attention" not in call.name:
            # The youngest comes first: projections were computed after tables of rotary positions.
            waiting += sorted(_before(call, *place))
    return None


def _made_by_layer(call: Call, product: Product | None, node: fx.Node, dim: int) -> Kind | None:
    if call.name == "linear":
        return "channel" if dim == example(node).dim() - 1 else "token"
    if call.name.startswith("conv") and "conver" not in call.name and dim > 0:
        return "channel" if dim == 1 else "token"
    if product is None:
        return None
    left, right = (set(letters) for _, letters in product.sides)
    letter = product.out_letters[dim]
    # A weight matrix has no batch.
    if example(product.right).dim() == 2 and letter in right - left:
        return "channel"
    return "token" if example(product.right).dim() == 2 and letter in left - right else None


def _before(call: Call, node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """The same dimension one operation back."""
    source: Any = call.args[0]
    if call.name in ("cat", "stack"):
        at = call.argument(1, "dim", default=0) % example(node).dim()
        shift = int(call.name == "stack" and dim > at)
        if call.name == "cat" or dim != at:
            yield from ((part, dim - shift) for part in call.joined() if is_tensor(part))
    elif call.name == "getitem" and not is_tensor(source):
        yield from _part(source, dim)
    elif is_tensor(source) and call.name in SLICES:
        found = indexed(call, example(source).dim(), dim)
        if found is not None and found[0] is not None:
            yield source, found[0]
    elif is_tensor(source) and (dims := _viewed(call, source, node, dim)) is not None:
        yield from ((source, at) for at in dims)
    else:
        yield from ((axis.node, axis.dim) for axis in same_axis(node, dim))


def _part(base: Any, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """One of the results of a split, or of an operation such as `max`."""
    call = call_of(base)
    if call is None or call.name not in SPLITS or not is_tensor(call.args[0]):
        return
    at = call.argument(1, "dim", default=0) if call.name == "unbind" else None
    shift = at is not None and dim >= at % example(call.args[0]).dim()
    yield call.args[0], dim + int(shift)


def _viewed(call: Call, source: fx.Node, node: fx.Node, dim: int) -> list[int] | None:
    axes = Axes()
    given = axes.fresh(example(source).shape)
    dims = axes.through(call, given, example(source), example(node))
    return None if dims is None else _sources(given, dims, dim, axes)
