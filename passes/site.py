"""The neutral record of one attention in a graph, however it was spelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..policy import Policy


@dataclass(frozen=True)
class AttentionSite:
    """softmax(scale * query @ key^T + mask) @ value, computed by `node`.

    Tensors are graph nodes, [B, H, T, D] or [N, T, D]. `scale` is None for `D ** -0.5`.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout: bool
    is_causal: bool
    scale: float | None
    enable_gqa: bool


@dataclass(frozen=True)
class Decision:
    """What became of one site, and why.

    Attributes:
        module: path of the innermost module as far as the trace knows it.
        modules: `(id, path)` of the modules around the site, outermost first; the id is that of
            the traced module object.
        query_shape, key_shape, value_shape: sizes; symbolic ones by the size that was traced.
        replaced: whether piecewise sparse attention took its place.
        reason: in words, for a user.
        policy: the policy in force, every field resolved.
    """

    module: str
    modules: tuple[tuple[str, str], ...]
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    replaced: bool
    reason: str
    policy: Policy


def example(node: fx.Node) -> Any:
    """The fake value of a node: Dynamo keeps it as `example_value`, export and make_fx as `val`."""
    return node.meta[example_key(node)]


def example_key(node: fx.Node) -> str:
    return "example_value" if "example_value" in node.meta else "val"


def emit(
    like: fx.Node, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """Insert a call (a method if `target` is a string) with true fake-tensor metadata.

    Origin and module stack are copied from `like`, so later passes and error messages know where
    the call comes from.
    """
    graph = like.graph
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    node.meta.update(like.meta)
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), example)
    with example(like).fake_mode, torch.no_grad():
        if isinstance(target, str):
            value = getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
        else:
            value = target(*fake_args, **fake_kwargs)
    node.meta[example_key(like)] = value
    return node


def number(argument: Any) -> float | None:
    """A Python number for a number, a symbolic number or a node that holds one.

    Dynamic shapes turn float arguments into graph inputs. Reading one installs a guard, which is
    right: another value is another graph.
    """
    if isinstance(argument, fx.Node):
        argument = example(argument)
    return None if argument is None else float(argument)


def is_zero(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        argument = example(argument)
    return bool(guard_or_false(argument == 0))


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes for a report. A symbolic size gives the traced value and no guard; unknown is -1."""
    return tuple(
        size if isinstance(size, int) else (size.node.hint if size.node.has_hint() else -1)
        for size in tensor.shape
    )


def module_stack(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """`(id, path)` of the modules that `node` was traced in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((str(key), _readable(str(path))) for key, (path, *_) in stack.items())


def _readable(path: str) -> str:
    """`L['self']._modules['blocks']._modules['0'].attn` as `blocks.0.attn`."""
    # set_policy puts a bound forward on instances, through which Dynamo then names what is inside.
    path = path.replace(".forward.args[0]", "")
    for old, new in (("._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    parts = path.split(".")
    return ".".join(parts[2:] if parts[0] in ("L", "G") else parts)
