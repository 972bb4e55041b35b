"""Modules of torch that Dynamo leaves as one node: `nn.MultiheadAttention` and the fast path of
`nn.TransformerEncoderLayer`.

Such a node is traced into a graph of its own, in which the other rewrites look for attention. Only
if one of them replaced something does that graph take the place of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..graph.fake import example, is_tensor
from ..graph.writes import is_in_place
from ..sites.site import NearMiss
from .transforms import transform_of


def is_opaque(node: fx.Node) -> bool:
    """Whether attention may be hidden inside the one call that `node` makes."""
    return node.op == "call_function" and node.target in _EQUIVALENTS


def out_of_reach(node: fx.Node) -> NearMiss | None:
    """The attention of an opaque node that cannot be traced, and why."""
    reason = transform_of(node.all_input_nodes)
    if reason is None:
        return None
    given = [x for x in node.args[:3] if is_tensor(x)]
    query, key, value = given if len(given) == 3 else node.all_input_nodes[:1] * 3
    return NearMiss(node, query, key, value, reason)


def expand(node: fx.Node) -> fx.GraphModule | None:
    """What an opaque node computes, as a graph of its own with the node's tensors as inputs.

    The graph returns a tuple of the results that are used: all of them, or those that `getitem`
    nodes pick, in ascending order.
    """
    wanted = _wanted(node)
    if wanted is None:
        return None
    inputs = [source for source in node.all_input_nodes if is_tensor(source)]

    def function(*tensors: Tensor) -> tuple[Any, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda source: given[source] if source in given else _plain(example(source)),
        )
        result = _EQUIVALENTS[node.target](*args, **kwargs)
        return tuple(result[index] for index in wanted) if wanted else (result,)

    fakes = [example(source) for source in inputs]
    with fakes[0].fake_mode, torch.no_grad():
        expanded = make_fx(function, pre_dispatch=True)(*fakes)
    if any(inner.op == "get_attr" for inner in expanded.graph.nodes):
        return None
    _erase_unused(expanded.graph)
    origin = {name: value for name, value in node.meta.items() if name not in _VALUES}
    for inner in expanded.graph.nodes:
        inner.meta.update(origin)
    return expanded


def inputs_of(node: fx.Node, expanded: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """The inputs of the graph that `expand` made, each with the node that it stands for."""
    sources = [source for source in node.all_input_nodes if is_tensor(source)]
    inputs = [inner for inner in expanded.graph.nodes if inner.op == "placeholder"]
    return list(zip(inputs, sources, strict=True))


def inline(node: fx.Node, expanded: fx.GraphModule) -> None:
    """Put the graph that `expand` made in the place of the node."""
    copies = dict(inputs_of(node, expanded))
    results: tuple[fx.Node, ...] = ()
    with node.graph.inserting_before(node):
        for inner in expanded.graph.nodes:
            if inner.op == "output":
                results = tuple(copies[result] for result in inner.args[0])
            elif inner.op != "placeholder":
                copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta["example_value"] = inner.meta.get("val")
    wanted = _wanted(node)
    if not wanted:
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        user.replace_all_uses_with(results[(wanted or ()).index(user.args[1])])
        user.graph.erase_node(user)
    node.graph.erase_node(node)


_VALUES = ("example_value", "val", "tensor_meta")


def _wanted(node: fx.Node) -> tuple[int, ...] | None:
    """Indices of the results that are used; empty for a node with one tensor as its result."""
    if is_tensor(node):
        return ()
    indices: set[Any] = set()
    for user in node.users:
        if user.op != "call_function" or getattr(user.target, "__name__", "") != "getitem":
            return None
        indices.add(user.args[1])
    return tuple(sorted(indices)) or None


def _plain(value: Any) -> Any:
    """A Python number for a symbolic one; reading it installs a guard."""
    if isinstance(value, torch.SymInt):
        return int(value)
    return float(value) if isinstance(value, torch.SymFloat) else value


def _erase_unused(graph: fx.Graph) -> None:
    """Erase what only led to results that nobody wants. The graph holds no in-place operations."""
    if any(is_in_place(node) for node in graph.nodes):
        return
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _encoder_layer(
    source: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd` written out."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, eps)

    def attention(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
        q, k, v = (y.view(*y.shape[:2], heads, -1).transpose(1, 2) for y in (q, k, v))
        allowed = _allowed(mask, mask_type)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return F.linear(y.transpose(1, 2).flatten(2), out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = source + attention(norm(source, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(source + attention(source), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def _allowed(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """The mask of the fast path, in which whatever is not zero is blocked, for SDPA."""
    if mask is None:
        return None
    allowed = mask.to(torch.bool).logical_not()
    return allowed[:, None, None] if mask_type == 1 else allowed


_EQUIVALENTS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
