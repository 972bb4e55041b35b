"""What the masks of an attention amount to, as nodes that the op can be given.

The op takes a boolean [B, 1, 1, Tk], and gives zeros to rows without a key. That is all of it for
masks of booleans and of -inf. Where keys are removed by finite numbers, dense attention gives a row
of padding alone something else (`levels`): the softmax over all its keys, for which these are made
valid, or the average of the values, for which its query is made zero as well. Which rows those are
is data, and found by the graph when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..graph.emit import emit
from ..graph.fake import example
from ..sites.site import Mask
from .levels import Levels

_HEAD, _ROW, _KEY = range(1, 4)


@dataclass(frozen=True)
class Replaced:
    """A boolean mask that replaces scores by a finite number, as masks to be combined by `and`."""

    keys: tuple[Mask, ...]
    rows: tuple[Mask, ...]


@dataclass(frozen=True)
class Added:
    """A mask that adds finite numbers to the scores of keys."""

    mask: Mask
    levels: Levels


@dataclass(frozen=True)
class Padding:
    """Masks to be combined by `and`.

    Attributes:
        keys, rows: masks that remove keys, or whole rows, for good.
        finite: the one that does so by finite numbers.
    """

    keys: tuple[Mask, ...] = ()
    rows: tuple[Mask, ...] = ()
    finite: Replaced | Added | None = None

    def emit(self, like: fx.Node) -> EmittedPadding:
        """The masks in the graph, before `like`."""
        removed = _emit_all(self.keys, _ROW, like)
        rows = _emit_all(self.rows, _KEY, like)
        if isinstance(self.finite, Added):
            keys, averaged = _emit_added(self.finite, removed, like)
            return EmittedPadding(like, keys, averaged, rows=rows)
        if isinstance(self.finite, Replaced):
            averaged_rows = _emit_all(self.finite.rows, _KEY, like)
            return EmittedPadding(
                like, *_emit_replaced(self.finite, removed, like), averaged_rows, rows
            )
        return EmittedPadding(like, removed, rows=rows)


@dataclass(frozen=True)
class EmittedPadding:
    """Nodes of booleans.

    Attributes:
        like: the node of the attention.
        keys: [B, 1, 1, Tk], True where a key takes part.
        averaged: [B, 1, 1, 1], True where all keys that take part weigh the same.
        averaged_rows: [B, 1, Tq, 1], False where a query gets the average of all values.
        rows: [B, 1, Tq, 1], False where a query gets zeros.
    """

    like: fx.Node
    keys: fx.Node | None = None
    averaged: fx.Node | None = None
    averaged_rows: fx.Node | None = None
    rows: fx.Node | None = None

    def query(self, query: fx.Node) -> fx.Node:
        """The query that the op is given, [B, H, Tq, D]."""
        if self.averaged is None:
            return query
        return emit(self.like, "masked_fill", (query, self.averaged, 0.0), {})

    def result(self, out: fx.Node, value: fx.Node) -> fx.Node:
        """What the attention gives, from the result of the op [B, H, Tq, E].

        Args:
            value: [B, H, Tk, E], or with fewer heads.
        """
        if self.averaged_rows is not None:
            mean = emit(self.like, "mean", (value, [2], True), {})
            heads, groups = example(out).shape[1], example(mean).shape[1]
            if isinstance(heads, int) and heads != groups:
                mean = emit(self.like, "repeat_interleave", (mean, heads // groups, 1), {})
            out = emit(self.like, torch.where, (self.averaged_rows, out, mean), {})
        if self.rows is not None:
            invalid = emit(self.like, torch.logical_not, (self.rows,), {})
            out = emit(self.like, "masked_fill", (out, invalid, 0.0), {})
        return out


def _emit_added(
    added: Added, removed: fx.Node | None, like: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """Keys at the highest level of their row, and rows in which these all weigh the same."""
    mask, levels = added.mask, added.levels
    factor = mask.sign * mask.scale
    number = _emit_row(mask, _ROW, like)
    if factor < 0:
        number = emit(like, torch.neg, (number,), {})
    lowest = float("-inf")
    if removed is not None:
        outside = emit(like, torch.logical_not, (removed,), {})
        number = emit(like, "masked_fill", (number, outside, lowest), {})
    top = emit(like, "amax", (number, [-1], True), {})
    keys = emit(like, torch.ge, (number, top), {})
    if removed is not None or levels.removes:  # a row of -inf has no key at all
        valid = emit(like, torch.ne, (number, lowest), {})
        keys = emit(like, torch.bitwise_and, (keys, valid), {})
    if levels.averaged is None:
        return keys, None
    above = [value for value in levels.finite if value > levels.averaged]
    if not above:
        return keys, emit(like, torch.le, (top, float("inf")), {})
    # Between the two levels, whose distance is large against all rounding.
    bound = (min(above) + levels.averaged) / 2 / abs(factor)
    return keys, emit(like, torch.le, (top, bound), {})


def _emit_replaced(
    replaced: Replaced, removed: fx.Node | None, like: fx.Node
) -> tuple[fx.Node | None, fx.Node | None]:
    """Keys that take part, all of them in a row that has none, and those rows."""
    keys = _emit_all(replaced.keys, _ROW, like)
    if keys is None:
        return removed, None
    if removed is not None:
        keys = emit(like, torch.bitwise_and, (keys, removed), {})
    found = emit(like, "any", (keys, -1, True), {})
    empty = emit(like, torch.logical_not, (found,), {})
    instead = empty
    if removed is not None:
        instead = emit(like, torch.bitwise_and, (empty, removed), {})
    return emit(like, torch.bitwise_or, (keys, instead), {}), empty


def _emit_all(masks: tuple[Mask, ...], constant: int, like: fx.Node) -> fx.Node | None:
    combined = None
    for mask in masks:
        node = _emit_boolean(mask, constant, like)
        combined = node if combined is None else emit(like, torch.bitwise_and, (combined, node), {})
    return combined


def _emit_boolean(mask: Mask, constant: int, like: fx.Node) -> fx.Node:
    """One mask as a boolean that is True where attention is allowed."""
    node = _emit_row(mask, constant, like)
    if mask.kind == "add":  # 0 and -inf, or inf that is subtracted
        return emit(like, torch.eq, (node, 0), {})
    return node if mask.kind == "allow" else emit(like, torch.logical_not, (node,), {})


def _emit_row(mask: Mask, constant: int, like: fx.Node) -> fx.Node:
    """A mask of one row and head; it is the same in all, or all columns where that is constant."""
    node = mask.view.emit(like)
    for dim in (_HEAD, constant):
        if example(node).shape[dim] != 1:
            node = emit(like, "narrow", (node, dim, 0, 1), {})
    return node
