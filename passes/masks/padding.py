"""Masks: which of them only remove keys, and how to hand those to the op.

The op takes a boolean [B, 1, 1, Tk]. A mask in any other shape or form is taken if it provably says
the same: constant over queries and heads, and made from a boolean. `keys & queries`, the outer
product of a padding mask with itself, is taken apart: rows of padding queries become zero, as dense
attention makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from ..graph.axes import added_dims
from ..graph.calls import Call, call_of
from ..graph.emit import emit
from ..graph.fake import example, is_tensor, sizes
from ..graph.writes import UnknownValueError, Writes
from ..sites.site import AttentionSite, Mask, View
from .facts import NEGLIGIBLE, MaskFacts

_BATCH, _HEAD, _ROW, _KEY = range(4)
# Operations on two booleans after which a mask says the same as both of them together.
_SPLIT = {
    "allow": ("bitwise_and", "mul"),
    "block": ("bitwise_or",),
}


@dataclass(frozen=True)
class Padding:
    """Key padding, and query padding where a mask has it, as masks to be combined by `and`."""

    keys: tuple[Mask, ...] = ()
    rows: tuple[Mask, ...] = ()

    def emit_keys(self, like: fx.Node) -> fx.Node | None:
        """Boolean [B, 1, 1, Tk], True where a key takes part; None if all do."""
        return _emit_all(self.keys, _ROW, like)

    def emit_rows(self, like: fx.Node) -> fx.Node | None:
        """Boolean [B, 1, Tq, 1], True where a query is valid; None if all are."""
        return _emit_all(self.rows, _KEY, like)


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
        """The key padding that the masks of `site` amount to, or why they do not."""
        keys: list[Mask] = []
        rows: list[Mask] = []
        for given in site.masks:
            try:
                parts = list(self._conjuncts(given, site.node, site.node))
            except UnknownValueError as reason:
                return f"its mask cannot be read: {reason}"
            for part in parts:
                refusal = self._place(part, keys, rows)
                if refusal is not None:
                    return refusal
        return Padding(tuple(keys), tuple(rows))

    def _place(self, mask: Mask, keys: list[Mask], rows: list[Mask]) -> str | None:
        """Sort one mask into padding of keys or of rows, or say why it is neither."""
        tensor = example(mask.view.node)
        values = self.facts.values(mask.state or mask.view.node)
        if mask.kind == "add":
            if values is None:
                return _bias_refusal(tensor)
            lowest = {value * mask.sign * mask.scale for value in values if value != 0.0}
            if any(value > NEGLIGIBLE for value in lowest):
                return f"its mask adds {sorted(lowest)} to the logits; add -inf to remove a key"
        if values == frozenset((1.0 if mask.kind == "allow" else 0.0,)):
            return None
        varying = self._varying(mask.view, mask.state or mask.view.node)
        shape = tuple(sizes(mask.view.example()))
        if varying[_HEAD]:
            return f"its mask {shape} differs between heads; only key-padding masks are supported"
        if not varying[_ROW]:
            keys.append(mask)
        elif not varying[_KEY]:
            rows.append(mask)
        else:
            return (
                f"its mask {shape} varies over queries, or cannot be proven not to; only "
                "key-padding masks are supported: pass [B, 1, 1, Tk]"
            )
        return None

    def _parts(
        self, mask: Mask, views: list[View], reader: fx.Node, end: fx.Node
    ) -> list[Mask] | None:
        """The conjuncts of several views; None if one of them has changed when the op reads it."""
        masks = [replace(mask, view=view) for view in views]
        try:
            return [part for one in masks for part in self._conjuncts(one, reader, end)]
        except UnknownValueError:
            return None

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
        split = _SPLIT.get(mask.kind, ())
        if call is not None and not call.in_place and example(node).dtype == torch.bool:
            if call.name in split:
                views = [_broadcast(operand, node, mask.view) for operand in call.args[:2]]
            elif call.name in ("to", "type", "bool", "clone"):
                views = [_broadcast(call.args[0], node, mask.view)]
            else:
                views = [_peeled(call, mask.view)]
            known = [view for view in views if view is not None]
            parts = self._parts(mask, known, node, end)
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


def _emit_all(masks: tuple[Mask, ...], constant: int, like: fx.Node) -> fx.Node | None:
    combined = None
    for mask in masks:
        node = _emit_boolean(mask, constant, like)
        combined = node if combined is None else emit(like, torch.bitwise_and, (combined, node), {})
    return combined


def _emit_boolean(mask: Mask, constant: int, like: fx.Node) -> fx.Node:
    """One mask as a boolean that is True where attention is allowed."""
    node = mask.view.emit(like)
    for dim in (_HEAD, constant):
        if example(node).shape[dim] != 1:
            node = emit(like, "narrow", (node, dim, 0, 1), {})
    if mask.kind == "add":
        return emit(like, torch.eq, (node, 0), {})
    return node if mask.kind == "allow" else emit(like, torch.logical_not, (node,), {})


def _bias_refusal(tensor: torch.Tensor) -> str:
    what = f"{tensor.dtype}, {tuple(sizes(tensor))}"
    return (
        f"its mask is additive ({what}) and not provably made of 0 and -inf: a score bias such as "
        "relative positions or ALiBi stays dense; a padding mask should be boolean"
    )
