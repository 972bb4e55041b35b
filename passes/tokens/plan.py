"""Which tokens of a site stay exact, and along which curve the others are cut into blocks.

What the policy leaves to us ("auto") is read from the graph: text joined with the image before or
behind it stays exact, and the grid is that of the axes that were flattened to the image's tokens,
or what the backend read from the model that is being called.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...ops.token_order import NO_CALLER, CallerTokens
from ...policies.policy import Policy, PolicyError
from ..graph.emit import emit
from ..sites.site import AttentionSite
from .exchange import exchanges_joint_shares, share_of_rank
from .origins import TokenOrigins, axis_of
from .steps import Joined, Merged, TokenAxis, hint_of

# Sequences joined with the image that are longer than this share of it are no text: to keep them
# exact would cost more than sparsity saves.
_TEXT_SHARE = 0.5


@dataclass(frozen=True)
class Layout:
    """What is known of a sequence: text, then the tokens of a picture, then text."""

    prefix: tuple[TokenAxis, ...] = ()
    suffix: tuple[TokenAxis, ...] = ()
    grid: tuple[TokenAxis, ...] = ()


@dataclass(frozen=True)
class Order:
    """The arguments of `torch.ops.pisa.token_order`; each length is a number or a sum of axes."""

    grid: tuple[Length, ...]
    curve: str
    tokens: Length
    prefix: Length
    suffix: Length
    live: bool = False


Length = int | tuple[TokenAxis, ...]


@dataclass(frozen=True)
class TokenPlan:
    """How the tokens of one site are treated.

    Attributes:
        exact: tokens at the start and end that stay exact.
        order: None for raster order.
        policy: the policy with what was found in the place of "auto", by the traced sizes.
        notes: what a user should know, in words.
    """

    exact: tuple[Length, Length]
    order: Order | None
    policy: Policy
    notes: tuple[str, ...] = ()


@dataclass
class Tokens:
    """The token axes of one graph, and what was emitted for them: one node for all its sites."""

    origins: TokenOrigins = field(default_factory=TokenOrigins)
    _sizes: dict[str, fx.Node] = field(default_factory=dict)
    _orders: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)

    def length(self, length: Length, like: fx.Node) -> int | fx.Node:
        """A number where it is one, else the node that computes it."""
        if isinstance(length, int):
            return length
        static = sum(axis.size for axis in length if isinstance(axis.size, int))
        total: int | fx.Node = static
        for axis in length:
            if not isinstance(axis.size, int):
                size = self._size(axis, like)
                total = size if total == 0 else emit(like, operator.add, (total, size), {})
        return total

    def _size(self, axis: TokenAxis, like: fx.Node) -> fx.Node:
        name = str(axis.size)
        if name not in self._sizes:
            size = emit(like, "size", (axis.node, axis.dim), {})
            if axis.stride != 1:
                size = emit(like, operator.floordiv, (size, axis.stride), {})
            self._sizes[name] = size
        return self._sizes[name]

    def order(self, order: Order, device: torch.device, like: fx.Node) -> fx.Node:
        """The node that makes the permutation."""
        lengths = (*order.grid, order.tokens, order.prefix, order.suffix)
        key = (*map(_text, lengths), order.curve, str(device), order.live)
        if key not in self._orders:
            *grid, tokens, prefix, suffix = (self.length(length, like) for length in lengths)
            arguments = (grid, order.curve, tokens, prefix, suffix, device, order.live)
            target = torch.ops.pisa.token_order.default
            self._orders[key] = emit(like, target, arguments, {})
        return self._orders[key]


def reads_caller(gm: fx.GraphModule) -> bool:
    """Whether an order in the graph depends on the model that is being called."""
    target = torch.ops.pisa.token_order.default
    return any(
        node.args[-1] is True
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=target)
    )


def plan_tokens(
    site: AttentionSite, policy: Policy, tokens: Tokens, caller: CallerTokens
) -> TokenPlan:
    """Resolve the fields `exact`, `grid` and `curve` of a policy for one site.

    Args:
        caller: what the call of the model says, where the graph does not show it.

    Raises:
        PolicyError: the policy names a grid that does not fit the tokens.
    """
    layout, notes = _layout(site, tokens.origins)
    if share_of_rank(site) is not None:
        layout = Layout()  # what was merged before it are ranks and their shares
        if exchanges_joint_shares(site):
            caller = NO_CALLER  # it tells the lengths of text and picture, but shares alternate
    around = _around(site, layout, caller)
    exact = policy.exact if isinstance(policy.exact, tuple) else around
    order, order_notes = _order(site, policy, layout.grid, around, exact, caller)
    if any(hint(length) == 0 for length in exact if length != 0):
        notes = (*notes, "exact: its text, of a length that is only known when it runs")
    return TokenPlan(
        exact=exact,
        order=None if policy.curve == "raster" else order,
        policy=replace(
            policy,
            exact=(hint(exact[0]), hint(exact[1])),
            grid=None if order is None else tuple(hint(length) for length in order.grid),
        ),
        notes=notes if policy.curve == "raster" else (*notes, *order_notes),
    )


def hint(length: Length) -> int:
    return length if isinstance(length, int) else sum(axis.hint for axis in length)


def _text(length: Length) -> str:
    return str(length if isinstance(length, int) else [str(axis.size) for axis in length])


def _around(site: AttentionSite, layout: Layout, caller: CallerTokens) -> tuple[Length, Length]:
    """The text before and behind the picture."""
    tokens = site.key.example().shape[2]
    if not (layout.prefix or layout.suffix or layout.grid) and isinstance(tokens, int):
        # A block that is compiled alone may be given text and picture as one sequence.
        cells = map(math.prod, caller.grids)
        if caller.prefix and tokens - caller.prefix in cells:
            return caller.prefix, 0
    return layout.prefix or 0, layout.suffix or 0


def _layout(site: AttentionSite, origins: TokenOrigins) -> tuple[Layout, tuple[str, ...]]:
    """The most that key, query or value tell."""
    notes = tuple[str, ...]()
    for view in (site.key, site.query, site.value):
        axis = axis_of(view, 2)
        if axis is None or not statically_known_true(axis.size == view.example().shape[2]):
            continue
        found, said = _layout_of(axis, origins)
        if not _usable(found, site.node):
            continue
        if found.prefix or found.suffix or found.grid:
            return found, said
        notes = notes or said
    return Layout(), notes


def _layout_of(axis: TokenAxis, origins: TokenOrigins) -> tuple[Layout, tuple[str, ...]]:
    layout, notes = Layout(), tuple[str, ...]()
    while isinstance(origin := origins.of(axis), Joined):
        parts = origin.parts
        longest = max(range(len(parts)), key=lambda i: parts[i].hint)
        prefix = (*layout.prefix, *parts[:longest])
        suffix = (*parts[longest + 1 :], *layout.suffix)
        if hint((*prefix, *suffix)) > _TEXT_SHARE * parts[longest].hint:
            sizes = " + ".join(str(part.hint) for part in parts)
            notes = (f"its sequence joins {sizes} tokens, too alike to call one of them text",)
            return layout, notes
        layout, axis = Layout(prefix, suffix), parts[longest]
    if isinstance(origin, Merged):
        layout = replace(layout, grid=_grid(origin, origins))
    return layout, notes


def _grid(merged: Merged, origins: TokenOrigins) -> tuple[TokenAxis, ...]:
    """The axes of a picture or video; () if there are too many to tell."""
    axes: list[TokenAxis] = []
    for axis in merged.axes:
        inner = origins.of(axis)
        axes += _grid(inner, origins) or [axis] if isinstance(inner, Merged) else [axis]
    axes = [axis for axis in axes if axis.hint != 1]
    return tuple(axes) if 2 <= len(axes) <= 3 else ()


def _usable(layout: Layout, like: fx.Node) -> bool:
    """Whether its symbolic lengths can be computed in the graph of the site."""
    axes = (*layout.prefix, *layout.suffix, *layout.grid)
    return all(isinstance(axis.size, int) or axis.node.graph is like.graph for axis in axes)


def _order(
    site: AttentionSite,
    policy: Policy,
    seen: tuple[TokenAxis, ...],
    around: tuple[Length, Length],
    exact: tuple[Length, Length],
    caller: CallerTokens,
) -> tuple[Order | None, tuple[str, ...]]:
    query, key = site.query.example(), site.key.example()
    if not statically_known_true(query.shape[2] == key.shape[2]):
        return None, ("raster order: its queries and keys are not the same tokens",)
    size = query.shape[2]
    axis = axis_of(site.query, 2)
    if not isinstance(size, int) and axis is None:
        return None, ("raster order: its length is symbolic behind a view",)
    tokens: Length = size if isinstance(size, int) else (axis,)
    assert policy.curve is not None
    if isinstance(policy.grid, tuple):
        places = (around, exact, (0, 0))
        left = [hint_of(size) - hint(before) - hint(behind) for before, behind in places]
        wanted = math.prod(policy.grid)
        if wanted not in left:
            raise PolicyError(
                f"the policy's grid {policy.grid} has {wanted} cells, but the attention has "
                f"{hint_of(size)} tokens, {hint(around[0])} of them before and {hint(around[1])} "
                "behind the picture; set the grid by a policy on the modules that it is for"
            )
        prefix, suffix = places[left.index(wanted)]
        return Order(policy.grid, policy.curve, tokens, prefix, suffix), ()
    cells = hint_of(size) - hint(around[0]) - hint(around[1])
    for grid in caller.grids:
        # What the graph shows holds for every call of it; a caller may know one axis more.
        if math.prod(grid) == cells and len(grid) > len(seen):
            return Order(grid, policy.curve, tokens, *around, live=True), ()
    if seen:
        return Order(tuple((axis,) for axis in seen), policy.curve, tokens, *around), ()
    return None, ("raster order: the grid of its tokens is not known",)
