"""Masks of a site: whether they only remove keys, and by which numbers.

A mask in any shape or form is taken if it provably says the same as a boolean [B, 1, 1, Tk]:
constant over queries and heads, and made from a boolean. `keys & queries`, the outer product of a
padding mask with itself, is taken apart: rows of padding queries become what dense attention makes
of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from ..graph.axes import added_dims
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor, sizes
from ..graph.writes import UnknownValueError, Writes
from ..sites.site import AttentionSite, Mask, View
from .facts import MaskFacts
from .levels import NEGLIGIBLE, Levels, levels_of, scores_dtype
from .padding import Added, Padding, Replaced

_HEAD, _ROW, _KEY = range(1, 4)
# Operations on two booleans after which a mask says the same as both of them together.
_SPLIT = {
    "allow": ("bitwise_and", "mul"),
    "block": ("bitwise_or",),
}
_OPPOSITES: dict[str, Literal["allow", "block"]] = {"allow": "block", "block": "allow"}
_SEVERAL = (
    "several masks remove keys by finite numbers, which rows without a key add up; combine them "
    "into one, or use boolean masks or -inf"
)


class _RefusedError(Exception):
    """A mask does more than to remove keys; the text tells a user what."""


@dataclass
class _Sorted:
    """Masks of a site, sorted by what they remove."""

    keys: list[Mask] = field(default_factory=list)
    rows: list[Mask] = field(default_factory=list)
    finite: Replaced | Added | None = None

    def set_finite(self, mask: Replaced | Added) -> None:
        if self.finite is not None:
            raise _RefusedError(_SEVERAL)
        if isinstance(mask, Replaced) and (self.keys or self.rows):
            raise _RefusedError(
                "its mask replaces scores by a finite number after others removed keys by -inf; "
                "fill with -inf too"
            )
        self.finite = mask

    def padding(self) -> Padding:
        if isinstance(self.finite, Replaced) and self.finite.rows and (self.keys or self.rows):
            raise _RefusedError(_SEVERAL)
        return Padding(tuple(self.keys), tuple(self.rows), self.finite)


@dataclass
class MaskAnalysis:
    """Masks of one graph."""

    writes: Writes
    facts: MaskFacts = field(init=False)

    def __post_init__(self) -> None:
        self.facts = MaskFacts(self.writes)

    def hand_down(
        self, source: fx.Node, reader: fx.Node, inner: MaskAnalysis, given: fx.Node
    ) -> None:
        """Tell the analysis of an inner graph what is known of one of its inputs.

        Args:
            source: the tensor that `reader`, which runs the inner graph, passes in.
            given: the input that stands for it there.
        """
        try:
            if self.writes.value(source, reader) is source:
                inner.facts.adopt(given, self.facts, source)
        except UnknownValueError:
            pass

    def padding(self, site: AttentionSite) -> Padding | str:
        """The padding that the masks of `site` amount to, or why they do not."""
        found = _Sorted()
        try:
            for mask in site.masks:
                parts = list(self._conjuncts(mask, site.node, site.node))
                if mask.kind == "add":
                    for part in parts:
                        self._add(part, scores_dtype(mask.dtype, site.dtype), found)
                else:
                    self._remove(parts, found)
            return found.padding()
        except UnknownValueError as reason:
            return f"its mask cannot be read: {reason}"
        except _RefusedError as reason:
            return str(reason)

    def _remove(self, parts: list[Mask], found: _Sorted) -> None:
        """Sort the parts of a boolean mask."""
        keys: list[Mask] = []
        rows: list[Mask] = []
        for part in parts:
            values = self._values(part)
            if values != frozenset((1.0 if part.kind == "allow" else 0.0,)):
                (keys if self._spares_rows(part) else rows).append(part)
        fill = parts[0].fill if parts else -math.inf
        if fill > NEGLIGIBLE:
            raise _RefusedError(f"its mask sets scores to {fill:g}; only -inf removes a key")
        if fill == -math.inf:
            found.keys += keys
            found.rows += rows
        elif keys or rows:
            found.set_finite(Replaced(tuple(keys), tuple(rows)))

    def _add(self, mask: Mask, dtype: torch.dtype, found: _Sorted) -> None:
        """Sort a mask that is added to scores of `dtype`."""
        values = self._values(mask)
        if values is None:
            raise _RefusedError(_bias_refusal(example(mask.view.node)))
        levels = levels_of(frozenset(x * mask.sign * mask.scale for x in values), dtype)
        if isinstance(levels, str):
            raise _RefusedError(levels)
        if len(levels.finite) == 1 and not levels.removes and levels.averaged is None:
            return  # all keys share it
        if not self._spares_rows(mask):
            self._add_to_rows(mask, levels, found)
        elif levels.is_plain:
            found.keys.append(mask)
        else:
            found.set_finite(Added(mask, levels))

    def _add_to_rows(self, mask: Mask, levels: Levels, found: _Sorted) -> None:
        """A finite number that a whole row shares changes nothing, unless it rounds it away."""
        if levels.is_plain:
            found.rows.append(mask)
        elif levels.removes or levels.averaged is not None:
            raise _RefusedError(
                "its mask adds finite numbers to whole rows, which round their scores away; mask "
                "keys alone, or use a boolean mask or -inf"
            )

    def _values(self, mask: Mask) -> frozenset[float] | None:
        return self.facts.values(mask.state or mask.view.node)

    def _spares_rows(self, mask: Mask) -> bool:
        """True if a mask is the same for all queries, False if it is the same for all keys."""
        varying = self._varying(mask.view, mask.state or mask.view.node)
        shape = tuple(sizes(mask.view.example()))
        if varying[_HEAD]:
            raise _RefusedError(
                f"its mask {shape} differs between heads; only key-padding masks are supported"
            )
        if varying[_ROW] and varying[_KEY]:
            raise _RefusedError(
                f"its mask {shape} varies over queries, or cannot be proven not to; only "
                "key-padding masks are supported: pass [B, 1, 1, Tk]"
            )
        return not varying[_ROW]

    def _varying(self, view: View, state: fx.Node) -> tuple[bool, ...]:
        flags = list(self.facts.varying(state))
        for method, arguments in view.steps:
            if method == "squeeze":
                del flags[arguments[0]]
            elif method == "unsqueeze":
                flags.insert(arguments[0], False)
            elif method == "permute":
                flags = [flags[i] for i in arguments[0]]
            elif method == "flatten":
                first, last = arguments
                flags[first : last + 1] = [any(flags[first : last + 1])]
            elif method == "unflatten":
                dim, parts = arguments
                flags[dim : dim + 1] = [flags[dim]] * len(parts)
        return tuple(flags)

    def _parts(
        self, mask: Mask, views: list[View], reader: fx.Node, end: fx.Node
    ) -> list[Mask] | None:
        """The conjuncts of several views; None if one of them has changed when the op reads it."""
        masks = [replace(mask, view=view) for view in views]
        try:
            return [part for one in masks for part in self._conjuncts(one, reader, end)]
        except UnknownValueError:
            return None

    def _conjuncts(self, mask: Mask, reader: fx.Node, end: fx.Node) -> Iterator[Mask]:
        """`a & b` that allows as `a` and `b`; `a | b` that blocks likewise.

        Args:
            reader: what reads the mask now.
            end: what will read the parts instead.
        """
        node = self.writes.value(mask.view.node, reader)
        if changes := self.writes.between(node, reader, end):
            raise UnknownValueError(f"`{changes[0].name}` changes it in place")
        if not is_tensor(node):  # `mask[...] = x` has no result; the tensor holds it
            yield replace(mask, state=node)
            return
        call = call_of(node)
        split, inside = _SPLIT.get(mask.kind, ()), mask
        if call is not None and not call.in_place and example(node).dtype == torch.bool:
            if call.name in split:
                views = [_broadcast(operand, node, mask.view) for operand in call.args[:2]]
            elif call.name in ("to", "type", "bool", "clone", "expand"):
                views = [_broadcast(call.args[0], node, mask.view)]
            elif call.name == "bitwise_not" and mask.kind in _OPPOSITES:
                views = [_broadcast(call.args[0], node, mask.view)]
                inside = replace(mask, kind=_OPPOSITES[mask.kind])
            else:
                views = [_peeled(call, mask.view)]
            known = [view for view in views if view is not None]
            parts = self._parts(inside, known, node, end)
            if None not in views and parts is not None:
                yield from parts
                return
        if self.writes.between(node, node, reader):
            raise UnknownValueError(f"`{node.name}` is changed in place")
        yield replace(mask, view=replace(mask.view, node=node))


def _broadcast(operand: object, node: fx.Node, view: View) -> View | None:
    """`operand` of the boolean operation `node`, seen as `view` sees the result."""
    if not isinstance(operand, fx.Node) or not is_tensor(operand):
        return None
    if example(operand).dtype != torch.bool:
        return None
    missing = example(node).dim() - example(operand).dim()
    if any(method not in ("permute", "unsqueeze", "squeeze") for method, _ in view.steps):
        return None
    return View(operand, ((("unsqueeze", (0,)),) * missing + view.steps))


def _peeled(call: Call, view: View) -> View | None:
    """The tensor before `call` gave it dimensions of size 1, as `view` sees the result."""
    if call.name not in ("unsqueeze", "getitem") or not is_tensor(call.args[0]):
        return None
    rank = example(call.args[0]).dim()
    if call.name == "unsqueeze":
        new = [call.argument(1, "dim") % (rank + 1)]
    else:
        dims = added_dims(call.args[1], tuple((dim,) for dim in range(rank)))
        if dims is None:
            return None
        new = [at for at, group in enumerate(dims) if not group]
    return View(call.args[0], (*(("unsqueeze", (at,)) for at in new), *view.steps))


def _bias_refusal(tensor: torch.Tensor) -> str:
    what = f"{tensor.dtype}, {tuple(sizes(tensor))}"
    return (
        f"its mask is additive ({what}) and not provably made of 0 and -inf: a score bias such as "
        "relative positions or ALiBi stays dense; a padding mask should be boolean"
    )
