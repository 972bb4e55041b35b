"""What happens to a product on its way, with the axes that it has in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...graph.axes import CASTS, Axes, Dims, Group
from ...graph.calls import Call, call_of
from ...graph.fake import example, is_number, is_tensor, is_zero, number
from ...graph.product import product_of
from ...graph.writes import UnknownValueError
from ..spelling import GraphFacts
from .path import Link

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MIXES = {"linear", "conv1d", "conv2d", "conv3d"}
_REDUCTIONS = {"sum", "mean", "max", "min", "prod", "norm", "logsumexp"}


class MismatchError(Exception):
    """A spelling looks like attention but is not; the text tells a user why."""


class MixedHeadsError(MismatchError):
    """Another product mixes the heads of the scores or of the weights."""


class NoAttentionError(Exception):
    """A softmax between two products that are not those of an attention."""


@dataclass
class Term:
    """A tensor that a chain adds to the scores, or masks or multiplies them with.

    `fill` is what masked scores are set to, less what was added to all of them before. What is
    `of_rows` is added to all scores of a row alike.
    """

    kind: str  # "add", "allow", "block", "mul" or "div"
    node: fx.Node
    dims: Dims
    reader: fx.Node
    sign: int = 1
    scale: float = 1.0
    fill: float = -math.inf
    of_rows: bool = False


@dataclass
class Chain:
    """What happens to a product on its way: `nodes` do it, `dims` are the axes at the end.

    The value at the end is `scale * product + shift` and what `terms` say, in their order.
    `scales` holds the scale after each node. An `obstacle` is the first thing that is no part of a
    softmax attention; axes are then followed as far as they can be, and nothing else. `mixed` are
    axes that other products on the way have on both sides.
    """

    dims: Dims
    scale: float = 1.0
    shift: float = 0.0
    terms: list[Term] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    scales: dict[fx.Node, float] = field(default_factory=dict)
    obstacle: str | None = None
    mixed: set[int] = field(default_factory=set)

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        self.shift *= factor
        for term in self.terms:
            term.scale *= factor

    def passed(self, node: fx.Node) -> None:
        self.nodes.append(node)
        self.scales[node] = self.scale


def checked_call(operand: fx.Node, node: fx.Node, place: str) -> Call:
    """The call of a node of a path, on one tensor of floats and with one as its result."""
    call = call_of(node)
    assert call is not None
    if not (is_tensor(operand) and is_tensor(node)) or "out" in call.kwargs:
        raise MismatchError(f"`{call.name}` stands {place}")
    before, after = example(operand), example(node)
    if after.dtype not in _DTYPES or after.device != before.device:
        raise MismatchError(f"`{node.name}` ({after.dtype} on {after.device}) stands {place}")
    return call


def view(chain: Chain, call: Call, operand: fx.Node, node: fx.Node, axes: Axes) -> bool:
    """Follow a call that only moves or casts elements; False if it is none."""
    if call.name == "dropout":
        check_inactive(call)
    dims = axes.through(call, chain.dims, example(operand), example(node))
    if dims is None or len(dims) != example(node).dim():
        return False
    chain.dims = dims
    return True


def stands(call: Call, place: str) -> str:
    """That a call stands where it must not, in words."""
    mixes = ", a layer that mixes its heads," if call.name in _MIXES else ""
    return f"`{call.name}`{mixes} stands {place}"


def drift(chain: Chain, link: Link, axes: Axes, place: str) -> None:
    """Follow the axes past something that is no part of a softmax attention.

    Raises:
        MismatchError: they cannot be followed any further.
    """
    call = call_of(link.node)
    assert call is not None
    if product_of(link.node) is not None:
        chain.dims = _mixed(chain, link, axes, place)
        return
    chain.obstacle = chain.obstacle or stands(call, place)
    if not (is_tensor(link.operand) and is_tensor(link.node)):
        raise MismatchError(chain.obstacle)
    before, after = example(link.operand), example(link.node)
    dims = axes.through(call, chain.dims, before, after)
    chain.dims = dims if dims is not None else _guessed(call, chain, axes, before, after)


def _guessed(call: Call, chain: Chain, axes: Axes, before: Tensor, after: Tensor) -> Dims:
    dims = list(axes.resolve(chain.dims))
    if call.name in _MIXES and len(dims) == after.dim():
        at = -1 if call.name == "linear" else -(int(call.name[-2]) + 1)
        dims[at] = (axes.new(after.shape[at]),)
        return tuple(dims)
    if call.name in _REDUCTIONS and after.dim() < before.dim():
        reduced = call.argument(1, "dim")
        for dim in sorted(_as_dims(reduced, before.dim()), reverse=True):
            del dims[dim]
    if len(dims) != after.dim():
        assert chain.obstacle is not None
        raise MismatchError(chain.obstacle)
    return tuple(dims)


def _as_dims(given: Any, rank: int) -> list[int]:
    dims = given if isinstance(given, (tuple, list)) else [given]
    return [dim % rank for dim in dims if isinstance(dim, int)] if given is not None else []


def _mixed(chain: Chain, link: Link, axes: Axes, place: str) -> Dims:
    """The axes after another product on the way, which must leave rows and keys alone."""
    product = product_of(link.node)
    assert product is not None
    (left, left_letters), (right, right_letters) = product.sides
    if left is right:
        raise NoAttentionError
    letters = left_letters if left is link.operand else right_letters
    others = right_letters if left is link.operand else left_letters
    groups = dict(zip(letters, axes.resolve(chain.dims), strict=True))
    touched = {atom for x in others for atom in groups.get(x, ())}
    chain.obstacle = chain.obstacle or (f"its heads are mixed by `{link.node.name}` {place}")
    chain.mixed |= touched
    result = []
    for letter, size in zip(product.out_letters, example(link.node).shape, strict=True):
        result.append(groups.get(letter) or (axes.new(size),))
    return tuple(result)


def constant(value: Any, reader: fx.Node, facts: GraphFacts) -> float | None:
    """The number that an argument of `reader` is, or that all elements of a tensor are."""
    if is_tensor(value):
        try:
            state = facts.writes.value(value, reader)
        except UnknownValueError:
            return None
        known = facts.masks.facts.values(state)
        if known is not None and len(known) == 1:
            return next(iter(known))
        return _held(state)
    if isinstance(value, fx.Node):
        return number(value) if is_number(value) else None
    kinds = (bool, int, float, torch.SymInt, torch.SymFloat)
    return float(value) if isinstance(value, kinds) else None


def _held(node: fx.Node) -> float | None:
    """The number in a tensor of one element that the program holds, as export lifts them."""
    call = call_of(node)
    while call is not None and call.name in CASTS | {"clone", "lift"} and is_tensor(call.args[0]):
        node = call.args[0]
        call = call_of(node)
    held = node.meta.get("constant", getattr(node.meta.get("val"), "constant", None))
    if node.op == "get_attr" and "." not in str(node.target):
        held = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(held, Tensor) or isinstance(held, FakeTensor) or held.numel() != 1:
        return None
    return float(held.item())


def aligned(chain: Chain, other: fx.Node, axes: Axes) -> Dims:
    """The dims of a tensor that broadcasts against the chain's; size 1 is `()`."""
    shape = example(other).shape
    dims = axes.resolve(chain.dims)
    if len(shape) > len(dims):
        raise MismatchError(
            f"`{other.name}` has more dimensions than the scores it is combined with"
        )
    result: list[Group] = []
    for size, group in zip(shape, dims[len(dims) - len(shape) :], strict=True):
        if statically_known_true(size == 1):
            result.append(())
        elif statically_known_true(size == axes.size_of(group)):
            result.append(group)
        else:
            raise MismatchError(
                f"`{other.name}` has another shape than the scores it is combined with"
            )
    return tuple(result)


def check_inactive(call: Call) -> None:
    """Dropout does nothing at p = 0 or outside training."""
    training = call.argument(2, "training", "train", default=True)
    if training and not is_zero(call.argument(1, "p", default=0.5)):
        raise MismatchError("dropout is active on its attention weights; call model.eval() first")
