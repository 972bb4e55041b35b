"""Where the tokens of a sequence come from: text joined with image, a picture flattened to rows.

The walk starts at an attention and follows the token axis back through norms, projections, rotary
embeddings, reshapes, slices and residual additions until several sequences are joined, or several
axes are merged into one. What it finds decides how well attention is approximated, never whether it
is right: no guard is installed, and among symbolic lengths the traced ones choose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import Axes
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor
from ..graph.operations import JOINS, REARRANGEMENTS, SLICES, SPLITS
from ..sites.site import View
from .steps import Joined as Joined
from .steps import (
    Merged,
    Origin,
    axes_at,
    hint_of,
    indexed,
    joined,
    same_axis,
    unfolded,
    viewed,
)
from .steps import TokenAxis as TokenAxis

# These keep the length of an axis and put its tokens elsewhere.
_MIXERS = {
    *("roll", "flip", "fliplr", "flipud", "rot90", "sort", "argsort", "topk", "gather", "index"),
    *("index_select", "take_along_dim", "scatter", "masked_scatter", "index_put", "index_copy"),
    *("pixel_shuffle", "pixel_unshuffle", "unfold", "fold", "as_strided", "randperm"),
}
_ATTENTION = "scaled_dot_product_attention"


class TokenOrigins:
    """The origins of the token axes of one graph."""

    def __init__(self) -> None:
        self._known: dict[TokenAxis, Origin | None] = {}
        self._outside: dict[fx.Node, fx.Node] = {}

    def hand_down(self, source: fx.Node, input_: fx.Node) -> None:
        """Say that an input of this graph is what `source`, of the graph around it, computes."""
        self._outside[input_] = source

    def of(self, axis: TokenAxis) -> Origin | None:
        """What the tokens along an axis were joined or merged from, or None if that is not seen."""
        after: dict[TokenAxis, TokenAxis | None] = {}
        open_: list[tuple[TokenAxis, TokenAxis | None]] = [(axis, None)]
        while open_:
            current, reader = open_.pop()
            if current in after:
                continue
            after[current] = reader
            found = self._known[current] if current in self._known else self._before(current)
            if isinstance(found, (Joined, Merged)):
                step: TokenAxis | None = current
                while step is not None:  # so that the next block need not go all the way
                    self._known[step] = found
                    step = after[step]
                return found
            open_.extend((before, current) for before in reversed(found or ()))
        self._known |= dict.fromkeys(after)
        return None

    def _before(self, axis: TokenAxis) -> Origin | tuple[TokenAxis, ...]:
        """The origin if `axis.node` is it, else the axes to look at next, most telling first."""
        node, dim = axis.node, axis.dim
        if not is_tensor(node):
            return ()
        if node in self._outside:
            return tuple(axes_at([self._outside[node]], dim))
        if node.target in _attention_ops():
            return tuple(axes_at([node.args[0]], dim))
        call = call_of(node)
        if call is None or not _of_torch_alone(node.target):
            return ()  # above all not across an exchange between devices
        if call.name == "getitem" and not is_tensor(call.args[0]):
            return self._part_of_split(node, call.args[0], call.args[1], dim)
        if call.name in JOINS:
            return joined(node, call, dim)
        if call.name in SLICES:
            return self._sliced(node, call, dim)
        if call.name in REARRANGEMENTS:
            return viewed(node, call, dim)
        if call.name in ("view_as_complex", "view_as_real"):
            return tuple(axes_at(call.args[:1], dim))
        if call.name == _ATTENTION:
            return tuple(axes_at([call.argument(0, "query")], dim))
        if call.name == "unfold":
            return unfolded(node, call, dim)
        return () if call.name in _MIXERS else tuple(same_axis(node, dim))

    def _part_of_split(
        self, node: fx.Node, base: Any, index: Any, dim: int
    ) -> Origin | tuple[TokenAxis, ...]:
        call = call_of(base)
        if call is None or call.name not in SPLITS or not is_tensor(call.args[0]):
            return ()
        whole = call.args[0]
        rank = example(whole).dim()
        at = call.argument(1 if call.name == "unbind" else 2, "dim", default=0) % rank
        if call.name == "unbind":
            return (TokenAxis(whole, dim + (dim >= at)),)
        if at != dim:
            return (TokenAxis(whole, dim),)
        pieces = example(base)
        start = sum(hint_of(piece.shape[dim]) for piece in pieces[: index % len(pieces)])
        return self._section(TokenAxis(whole, dim), start, TokenAxis(node, dim))

    def _sliced(self, node: fx.Node, call: Call, dim: int) -> Origin | tuple[TokenAxis, ...]:
        whole = call.args[0]
        if not is_tensor(whole):
            return ()
        given = indexed(call, example(whole).dim(), dim)
        if given is None:
            return ()
        source, start = given
        if source is None:
            return ()
        base, part = TokenAxis(whole, source), TokenAxis(node, dim)
        if start is None or statically_known_true(base.size == part.size):
            return (base,)
        first = hint_of(example(start) if isinstance(start, fx.Node) else start)
        return self._section(base, first if first >= 0 else first + base.hint, part)

    def _section(
        self, base: TokenAxis, start: int, part: TokenAxis
    ) -> Origin | tuple[TokenAxis, ...]:
        """The parts that were joined to the section of `base` that `part` is."""
        origin = self.of(base)
        if not isinstance(origin, Joined):
            return ()
        found, place = [], 0
        for piece in origin.parts:
            if start <= place and place + piece.hint <= start + part.hint:
                found.append(piece)
            place += piece.hint
        if sum(piece.hint for piece in found) != part.hint:
            return ()
        return Joined(tuple(found)) if len(found) > 1 else tuple(found)


def axis_of(view: View, dim: int) -> TokenAxis | None:
    """The token axis that dimension `dim` of a view is."""
    axes = Axes()
    given = axes.fresh(example(view.node).shape)
    dims = view.through(axes, given)
    if dims is None:
        return None
    group = axes.resolve(dims)[dim]
    found = [i for i, source in enumerate(axes.resolve(given)) if source == group]
    return TokenAxis(view.node, found[0]) if len(group) == 1 and found else None


def _of_torch_alone(target: Any) -> bool:
    """Whether one process, with operations that torch defines, computes it."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] in ("aten", "prims")
    return "distributed" not in str(getattr(target, "__module__", ""))


def _attention_ops() -> tuple[Any, ...]:
    return torch.ops.pisa.attention.default, torch.ops.pisa.attention_with_lse.default
