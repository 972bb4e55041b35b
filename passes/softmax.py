"""Softmax in its spellings: one call, or written out with exp and sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import Call, call_of
from .fake import example


@dataclass(frozen=True)
class Softmax:
    """`node` is the softmax of `scores` over dimension `dim` (not negative).

    `interior` are the nodes of the spelling, `node` included.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    interior: tuple[fx.Node, ...]


def softmax_of(node: fx.Node) -> Softmax | None:
    """The softmax that `node` computes, or None."""
    call = call_of(node)
    if call is None or not isinstance(scores := call.argument(0, "input", "self"), fx.Node):
        return None
    if call.name == "softmax":
        return _called(node, call, scores)
    if call.name == "div":
        return _normalised(node, scores, call.argument(1, "other"))
    if call.name == "exp":
        return _exponential(node, scores)
    return None


def _called(node: fx.Node, call: Call, scores: fx.Node) -> Softmax | None:
    dim = call.argument(1, "dim")
    if dim is None:  # the choice that F.softmax warns about
        dim = 0 if example(scores).dim() in (0, 1, 3) else 1
    if not isinstance(dim, int):
        return None
    return Softmax(node, scores, dim % max(example(scores).dim(), 1), (node,))


def _normalised(node: fx.Node, weights: fx.Node, total: Any) -> Softmax | None:
    """`exp(scores) / exp(scores).sum(dim, keepdim=True)`"""
    exp = call_of(weights)
    if exp is None or exp.name != "exp" or not isinstance(exp.args[0], fx.Node):
        return None
    dim = _reduced_dim(total, "sum", weights)
    return None if dim is None else Softmax(node, exp.args[0], dim, (node, total, weights))


def _exponential(node: fx.Node, argument: fx.Node) -> Softmax | None:
    """`exp(log_softmax(scores))` and `exp(scores - logsumexp(scores, dim, keepdim=True))`"""
    call = call_of(argument)
    if call is None or not call.args or not isinstance(scores := call.args[0], fx.Node):
        return None
    if call.name == "log_softmax":
        found = _called(node, call, scores)
        return found and Softmax(node, scores, found.dim, (node, argument))
    if call.name == "sub":
        total = call.argument(1, "other")
        dim = _reduced_dim(total, "logsumexp", scores)
        if dim is not None:
            return Softmax(node, scores, dim, (node, argument, total))
    return None


def _reduced_dim(node: Any, name: str, source: fx.Node) -> int | None:
    """The dimension over which `node` reduces `source` and keeps it, or None."""
    call = call_of(node)
    if call is None or call.name != name or not call.args or call.args[0] is not source:
        return None
    dim = call.argument(1, "dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or not call.argument(2, "keepdim", default=False):
        return None
    return int(dim % example(source).dim())
