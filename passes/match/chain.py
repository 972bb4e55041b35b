"""The path from a product to a softmax, and from the softmax to the next product.

Walking back finds the path; walking forward along it follows the axes and multiplies out the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import SAME, Axes, Dims, Group
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor, is_zero, number
from ..graph.product import product_of
from ..graph.writes import Writes
from ..masks.facts import NEGLIGIBLE

_LENGTH = 16
_VIEWS = {
    *("transpose", "permute", "unsqueeze", "getitem", "expand", "reshape", "flatten"),
    *("unflatten", "view_as", "reshape_as", "squeeze", ".mT", ".T", "t"),
}
_EITHER = {"add", "mul"}  # the path may run through either operand
_FIRST = {"div", "sub", "masked_fill", "setitem", "negative"}
# Not part of any softmax attention, but of what nearly is one: followed to name the obstacle.
_OBSTACLES = {
    *("tanh", "clamp", "clip", "clamp_min", "clamp_max", "sigmoid", "relu", "gelu", "silu", "pow"),
    *("square", "sqrt", "abs", "exp", "log", "nan_to_num", "softplus", "addcmul", "minimum"),
    *("maximum", "tril", "triu", "scatter", "lerp", "round", "threshold", "leaky_relu"),
}


class MismatchError(Exception):
    """A spelling looks like attention but is not; the text tells a user why."""


@dataclass
class Term:
    """A tensor that a chain adds to the scores, or masks or multiplies them with."""

    kind: str  # "add", "allow", "block", "mul" or "div"
    node: fx.Node
    dims: Dims
    reader: fx.Node
    sign: int = 1
    scale: float = 1.0
    fill: float = -math.inf  # what masked scores are set to, before the scaling


@dataclass
class Chain:
    """What happens to a product on its way: `nodes` do it, `dims` are the axes at the end."""

    dims: Dims
    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """One node of a path. `operand` is the argument through which the path enters it.

    After an in-place operation the operand is the tensor that was changed, while the link before
    is the node that changed it.
    """

    node: fx.Node
    operand: fx.Node


def back_to_product(node: fx.Node, reader: fx.Node, writes: Writes) -> list[Link] | None:
    """The path from a product to `node`, both included, or None if there is none near.

    Raises:
        UnknownValueError: a tensor on the way is changed in place through a view.
    """
    budget = [4 * _LENGTH]

    def search(node: Any, reader: fx.Node, depth: int) -> list[Link] | None:
        budget[0] -= 1
        if not isinstance(node, fx.Node) or depth == 0 or budget[0] < 0:
            return None
        node = writes.value(node, reader)
        if product_of(node) is not None:
            return [Link(node, node)]
        for operand in _operands(call_of(node)):
            found = search(operand, node, depth - 1)
            if found is not None:
                return [*found, Link(node, operand)]
        return None

    return search(node, reader, _LENGTH)


def forward_to_product(node: fx.Node) -> list[Link] | None:
    """The path from `node` to a product that reads its result, both included."""
    frontier = [[Link(node, node)]]
    for _ in range(_LENGTH):
        following = []
        for path in frontier:
            last = path[-1].node
            for user in last.users:
                link = [*path, Link(user, last)]
                if product_of(user) is not None:
                    return link
                if last in _operands(call_of(user)):
                    following.append(link)
        frontier = following[:_LENGTH]
    return None


def _operands(call: Call | None) -> tuple[Any, ...]:
    if call is None:
        return ()
    if call.name in _EITHER:
        return call.args[:2]
    if call.name == "where":
        return call.args[1:3]
    if call.name in _FIRST | _VIEWS | SAME | _OBSTACLES:
        return call.args[:1]
    return ()


def follow(path: list[Link], chain: Chain, axes: Axes, place: str) -> None:
    """Lead `chain` from the first node of `path` to the last.

    Args:
        place: where the path runs, for the text of a mismatch.

    Raises:
        MismatchError: something on the path is not part of a softmax attention.
    """
    for link in path[1:]:
        _advance(chain, link.operand, link.node, axes, place)
        chain.nodes.append(link.node)
    for term in chain.terms:
        if term.kind in ("allow", "block") and not term.fill * term.scale <= NEGLIGIBLE:
            raise MismatchError(
                f"its scores are filled with {term.fill * term.scale:g} where masked; only -inf, "
                f"or a number below {NEGLIGIBLE:g}, removes keys"
            )


def _advance(chain: Chain, operand: fx.Node, node: fx.Node, axes: Axes, place: str) -> None:
    call = call_of(node)
    assert call is not None
    unknown = MismatchError(f"`{call.name}` stands {place}")
    if call.name == "setitem":
        _mask(chain, call.args[1], call.args[2], "block", node, axes, unknown)
        return
    if not (is_tensor(operand) and is_tensor(node)) or "out" in call.kwargs:
        raise unknown
    before, after = example(operand), example(node)
    if not after.is_floating_point() or after.device != before.device:
        raise MismatchError(f"`{node.name}` ({after.dtype} on {after.device}) stands {place}")
    if call.name in _EITHER | {"div", "sub"}:
        _combine(chain, operand, node, call, axes, unknown)
    elif call.name == "masked_fill":
        value = call.argument(2, "value")
        _mask(chain, call.argument(1, "mask"), value, "block", node, axes, unknown)
    elif call.name == "where" and len(call.args) == 3:
        condition, if_true, if_false = call.args
        if operand is if_true:
            _mask(chain, condition, if_false, "allow", node, axes, unknown)
        else:
            _mask(chain, condition, if_true, "block", node, axes, unknown)
    elif call.name == "negative":
        _multiply(chain, -1.0)
    elif call.name == "dropout":
        _check_inactive(call)
    else:
        dims = axes.through(call, chain.dims, before, after)
        if dims is None:
            raise unknown
        chain.dims = dims
    if call.name not in _VIEWS and after.dim() != len(chain.dims):
        raise unknown


def _combine(
    chain: Chain, operand: fx.Node, node: fx.Node, call: Call, axes: Axes, unknown: MismatchError
) -> None:
    first, second = call.argument(0, "input"), call.argument(1, "other")
    other = second if first is operand else first
    if call.kwargs.get("rounding_mode") is not None or call.kwargs.get("alpha", 1) != 1:
        raise unknown
    if call.name in ("sub", "div") and first is not operand:
        raise unknown
    plain = number(other) if not is_tensor(other) else None
    if call.name in ("mul", "div"):
        if plain is not None:
            if plain == 0.0:
                raise unknown
            _multiply(chain, plain if call.name == "mul" else 1.0 / plain)
            return
        if other is operand or any(term.kind in ("add", "allow", "block") for term in chain.terms):
            raise unknown
        chain.terms.append(Term(call.name, other, aligned(chain, other, axes), node))
    elif plain is None:  # a number added to all scores changes nothing
        sign = -1 if call.name == "sub" else 1
        chain.terms.append(Term("add", other, aligned(chain, other, axes), node, sign))


def _multiply(chain: Chain, factor: float) -> None:
    chain.scale *= factor
    for term in chain.terms:
        term.scale *= factor


def _mask(
    chain: Chain, mask: Any, fill: Any, kind: str, node: fx.Node, axes: Axes, unknown: MismatchError
) -> None:
    """Scores replaced by `fill` where `mask` says so: a mask if `fill` is very low."""
    if is_tensor(fill):
        raise MismatchError("its scores are masked with a tensor of values; fill with -inf instead")
    if not is_tensor(mask) or example(mask).dtype != torch.bool:
        raise unknown
    value = number(fill)
    if value is None:
        raise unknown
    chain.terms.append(Term(kind, mask, aligned(chain, mask, axes), node, fill=value))


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


def _check_inactive(call: Call) -> None:
    """Dropout does nothing at p = 0 or outside training."""
    training = call.argument(2, "training", "train", default=True)
    if training and not is_zero(call.argument(1, "p", default=0.5)):
        raise MismatchError("dropout is active on its attention weights; call model.eval() first")
