"""Insert calls into a graph, in the dialect that the graph is written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .fake import example, example_key

aten = torch.ops.aten

# Graphs of export and make_fx hold nothing but overloads of operators.
_OVERLOADS: dict[Callable[..., Any] | str, Callable[..., Any]] = {
    "amax": aten.amax.default,
    "any": aten.any.dim,
    "contiguous": aten.contiguous.default,
    "expand": aten.expand.default,
    "flatten": aten.flatten.using_ints,
    "masked_fill": aten.masked_fill.Scalar,
    "mean": aten.mean.dim,
    "narrow": aten.narrow.default,
    "permute": aten.permute.default,
    "repeat_interleave": aten.repeat_interleave.self_int,
    "size": aten.sym_size.int,
    "squeeze": aten.squeeze.dim,
    "to": aten.to.dtype,
    "unflatten": aten.unflatten.int,
    "unsqueeze": aten.unsqueeze.default,
    torch.bitwise_and: aten.bitwise_and.Tensor,
    torch.bitwise_or: aten.bitwise_or.Tensor,
    torch.div: aten.div.Tensor,
    torch.eq: aten.eq.Scalar,
    torch.ge: aten.ge.Tensor,
    torch.le: aten.le.Scalar,
    torch.logical_not: aten.logical_not.default,
    torch.mul: aten.mul.Tensor,
    torch.ne: aten.ne.Scalar,
    torch.neg: aten.neg.default,
    torch.where: aten.where.self,
}


def emit(
    like: fx.Node, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """Insert a call (a method if `target` is a string) with true fake-tensor metadata.

    Origin and module stack are copied from `like`, so later passes and error messages know where
    the call comes from.
    """
    graph = like.graph
    if example_key(like) == "val":
        args = _as_lists(args) if target in ("expand", "permute") else args
        target = _OVERLOADS.get(target, target)
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    node.meta.update({name: value for name, value in like.meta.items() if name != "tensor_meta"})
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), example)
    with example(like).fake_mode, torch.no_grad():
        if isinstance(target, str):
            value = getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
        else:
            value = target(*fake_args, **fake_kwargs)
    node.meta[example_key(like)] = value
    return node


def _as_lists(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.expand(2, 3)` as `expand(x, [2, 3])`."""
    tensor, *sizes = args
    return (tensor, list(sizes[0] if isinstance(sizes[0], tuple) else sizes))
