"""The neutral record of one attention in a graph, however it was spelled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ..graph.axes import Axes, Dims
from ..graph.axes import Step as Step
from ..graph.calls import Call
from ..graph.emit import emit
from ..graph.fake import example


@dataclass(frozen=True)
class View:
    """A tensor of the graph as seen through method calls that only rearrange it."""

    node: fx.Node
    steps: tuple[Step, ...] = ()

    def example(self) -> Tensor:
        """The fake value of the view."""
        return self._examples()[-1]

    def _examples(self) -> list[Tensor]:
        """The fake values of the tensor and of what each step makes of it."""
        values: list[Tensor] = [example(self.node)]
        if self.steps:
            with values[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
                for method, arguments in self.steps:
                    values.append(getattr(values[-1], method)(*arguments))
        return values

    def emit(self, like: fx.Node) -> fx.Node:
        """Make the view in the graph, at the insertion point."""
        node = self.node
        for method, arguments in self.steps:
            node = emit(like, method, (node, *arguments), {})
        return node

    def through(self, axes: Axes, dims: Dims) -> Dims | None:
        """The dims of the view, where the tensor has `dims`; None if they cannot be followed."""
        values = self._examples()
        for (method, arguments), before, after in zip(
            self.steps, values[:-1], values[1:], strict=True
        ):
            call = Call(method, (self.node, *arguments), {}, in_place=False)
            followed = axes.through(call, dims, before, after)
            if followed is None:
                return None
            dims = followed
        return dims

    def then(self, *steps: Step) -> View:
        return View(self.node, (*self.steps, *steps))


@dataclass(frozen=True)
class Mask:
    """One restriction of who attends whom, a view that broadcasts to [B, H, Tq, Tk].

    "allow" is boolean and True where a key takes part, "block" the opposite; "add" is added to the
    logits, `sign` times and then multiplied by `scale`.

    Attributes:
        fill: what a boolean mask replaces the logits of other keys by.
        dtype: of the scores that an additive mask is added to; None for what
            `F.scaled_dot_product_attention` adds it in.
        state: the write in place that gave its tensor the value that counts, if one did.
    """

    kind: Literal["allow", "block", "add"]
    view: View
    sign: int = 1
    scale: float = 1.0
    fill: float = -math.inf
    dtype: torch.dtype | None = None
    state: fx.Node | None = None


@dataclass(frozen=True)
class AttentionSite:
    """softmax(scale * query @ key^T + masks) @ value, computed by `node`.

    Attributes:
        query, key, value: views [B, H, T, D]; with `enable_gqa` key and value have fewer heads.
        dtype: what the op computes in; the result is cast to the dtype of `node`.
        scale: None for `D ** -0.5`.
        factors: tensors that multiply ("mul") or divide ("div") the query, as views that broadcast
            with it.
        result: how to get from [B, H, Tq, E] to the axes of `node`.
        interior: other nodes of the spelling, which go when `node` goes.
    """

    node: fx.Node
    query: View
    key: View
    value: View
    dtype: torch.dtype
    masks: tuple[Mask, ...] = ()
    dropout: bool = False
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    factors: tuple[tuple[str, View], ...] = ()
    result: tuple[Step, ...] = ()
    interior: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class NearMiss:
    """Attention by all appearance, spelled in a way that cannot be replaced.

    `token_first` says that its tensors are [B, T, H, D].
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    reason: str
    token_first: bool = False
