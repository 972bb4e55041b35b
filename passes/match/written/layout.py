"""How the tensors of a hand-written attention lie, read from their axes, and as [B, H, T, D]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...graph.axes import Axes, Dims
from ...graph.fake import example
from ...sites.site import Mask, View
from .chain import Chain, MismatchError, Term


class RolesError(MismatchError):
    """The axes of two products around a softmax are not those of an attention."""


@dataclass(frozen=True)
class Roles:
    """Which axis is what.

    Attributes:
        batch: the axes that are neither tokens nor channels, as the op is to see them.
        rows, keys: the tokens of query and key.
        width: what the product of query and key sums.
        own: what the value alone has.
    """

    batch: tuple[int, ...]
    rows: int
    keys: int
    width: int
    own: int


def atoms(dims: Dims, axes: Axes) -> frozenset[int]:
    return frozenset(atom for group in axes.resolve(dims) for atom in group)


def roles_of(
    chain: Chain, key_axis: int, query: Dims, key: Dims, value: Dims, result: Dims, axes: Axes
) -> Roles:
    """Tell the axes apart by the tensors that have them.

    Raises:
        RolesError: they are not those of an attention.
    """
    out = atoms(chain.dims, axes)
    left, right = atoms(query, axes), atoms(key, axes)
    value_axes, result_axes = atoms(value, axes), atoms(result, axes)
    if key_axis not in value_axes or key_axis in result_axes:
        raise RolesError(
            "its softmax does not run over the dimension that the product with the values sums"
        )
    summed, own = (left & right) - out, value_axes - out
    rows = _row_axis(left - right - summed, key_axis, result_axes - value_axes, axes)
    if len(summed) != 1 or len(own) != 1:
        raise RolesError("query and key, or weights and value, share unusual dimensions")
    batch = _batch(chain, rows, key_axis, axes)
    if (right | value_axes) - summed - own - set(batch) - {key_axis}:
        raise RolesError("key or value have a dimension that the query lacks")
    return Roles(batch, rows, key_axis, min(summed), min(own))


def _row_axis(candidates: frozenset[int], keys: int, own: frozenset[int], axes: Axes) -> int:
    """The query's tokens: an axis of query and result alone, of the keys' size if possible."""
    found = sorted(candidates & own)
    if not found:
        raise RolesError("its query has no token dimension of its own")
    same = [atom for atom in found if statically_known_true(axes.sizes[atom] == axes.sizes[keys])]
    return (same or found)[-1]


def _batch(chain: Chain, rows: int, keys: int, axes: Axes) -> tuple[int, ...]:
    """The other axes, in the order of the scores unless only the second of two has a mask."""
    dims = axes.resolve(chain.dims)
    batch = tuple(atom for group in dims for atom in group if atom not in (rows, keys))
    terms = [atoms(term.dims, axes) for term in chain.terms]
    masked = {atom for term in terms for atom in term if keys in term}
    if len(batch) == 2 and batch[1] in masked and batch[0] not in masked:
        return batch[::-1]
    return batch


@dataclass(frozen=True)
class Layout:
    """Batch and head dimension, as groups of axes, of the query and of key and value.

    [N, T, D] is N batches of one head: masks differ between batches, never between heads. More than
    two axes are merged into the batch. The last of them is one of query heads that share a key and
    a value head, if these lack it.
    """

    axes: Axes
    roles: Roles
    groups: Dims
    shared: Dims

    @classmethod
    def of(cls, roles: Roles, key: Dims, value: Dims, axes: Axes) -> Layout:
        batch = roles.batch
        if len(batch) < 2:
            groups: Dims = (batch, ())
            return cls(axes, roles, groups, groups)
        present = atoms(key, axes) | atoms(value, axes)
        if len(batch) > 2 and batch[-1] not in present:
            return cls(axes, roles, (batch[:-2], batch[-2:]), (batch[:-2], batch[-2:-1]))
        groups = (batch[:-1], batch[-1:])
        return cls(axes, roles, groups, groups)

    def query(self, node: fx.Node, dims: Dims) -> View:
        return self._view(node, dims, (*self.groups, (self.roles.rows,), (self.roles.width,)))

    def key(self, node: fx.Node, dims: Dims) -> View:
        return self._view(node, dims, (*self.shared, (self.roles.keys,), (self.roles.width,)))

    def value(self, node: fx.Node, dims: Dims) -> View:
        return self._view(node, dims, (*self.shared, (self.roles.keys,), (self.roles.own,)))

    def result(self, dims: Dims) -> tuple[Any, ...]:
        """Steps from [B, H, T, D] to the axes of the result."""
        given = (*self.groups, (self.roles.rows,), (self.roles.own,))
        steps = self.axes.steps(given, dims)
        if steps is None:
            raise MismatchError("the layout of its result cannot be made from [B, H, T, D]")
        return steps

    def masks(self, terms: Iterable[Term]) -> tuple[Mask, ...]:
        """What the terms add or mask; what they add to whole rows changes nothing."""
        roles, masks = self.roles, []
        for term in terms:
            if term.kind not in ("mul", "div") and not term.of_rows:
                wanted = (*self.groups, (roles.rows,), (roles.keys,))
                view = self._view(term.node, term.dims, wanted)
                masks.append(
                    Mask(
                        term.kind,  # type: ignore[arg-type]
                        view,
                        term.sign,
                        term.scale,
                        fill=term.fill * term.scale,
                        dtype=example(term.reader).dtype if term.kind == "add" else None,
                    )
                )
        return tuple(masks)

    def factors(self, terms: Iterable[Term]) -> tuple[tuple[str, View], ...]:
        """What multiplies or divides the query."""
        wanted = (*self.groups, (self.roles.rows,), ())
        return tuple(
            (term.kind, self._view(term.node, term.dims, wanted))
            for term in terms
            if term.kind in ("mul", "div")
        )

    def spread(self, view: View, *, shared: bool = False) -> View:
        """Broadcast batch and head dimension to those of the scores, where a tensor lacks them."""
        given = view.example().shape[:2]
        groups = self.shared if shared else self.groups
        wanted = [math.prod(self.axes.sizes[atom] for atom in group) for group in groups]
        sizes: list[Any] = []
        for mine, full in zip(given, wanted, strict=True):
            same = statically_known_true(mine == full)
            if not same and not isinstance(full, int):
                raise MismatchError(
                    f"`{view.node.name}` broadcasts over a dimension of unknown size; expand it"
                )
            sizes.append(-1 if same else full)
        return view if sizes == [-1, -1] else view.then(("expand", (*sizes, -1, -1)))

    def has_one_shared_head(self, query: View, key: View, value: View) -> bool:
        """One key and value head for all query heads: [B, 1, T, D]."""
        heads = [view.example().shape[1] for view in (query, key, value)]
        one = [statically_known_true(count == 1) for count in heads]
        return one == [False, True, True]

    def _view(self, node: fx.Node, given: Dims, wanted: Dims) -> View:
        steps = self.axes.steps(given, wanted)
        if steps is None:
            raise MismatchError(f"the layout of `{node.name}` cannot be brought to [B, H, T, D]")
        return View(node, steps)
