"""`flex_attention` as plain attention: without a score modification and without a block mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .fake import example, number
from .rewrite import AttentionRewrite, GraphFacts
from .site import AttentionSite, NearMiss, View

# What torch calls a block that covers any sequence: there is no block mask then.
_WHOLE_SEQUENCE = 1 << 30


class FlexAttention(AttentionRewrite):
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        if node.op != "call_function" or node.target is not torch.ops.higher_order.flex_attention:
            return None
        query, key, value, score_mod, block_mask, scale = node.args[:6]
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        results = {user.args[1]: user for user in node.users}
        if 0 not in results:
            return None
        out = results.pop(0)
        reason = _score_refusal(score_mod) or _block_refusal(block_mask)
        if results:
            reason = reason or "its log-sum-exp is used; call it with return_lse=False"
        if reason is not None:
            return NearMiss(out, query, key, value, reason)
        return AttentionSite(
            node=out,
            query=View(query),
            key=View(key),
            value=View(value),
            dtype=example(out).dtype,
            scale=number(scale),
            enable_gqa=example(query).shape[1] != example(key).shape[1],
            interior=(node,),
        )


def _score_refusal(score_mod: Any) -> str | None:
    """The traced score modification must return the score, its first input."""
    body = _body(score_mod)
    if body is not None:
        (output,) = body.graph.find_nodes(op="output")
        inputs = body.graph.find_nodes(op="placeholder")
        if output.args[0] in (inputs[0], (inputs[0],)):
            return None
    return "flex_attention modifies its scores (score_mod); only plain attention is approximated"


def _block_refusal(block_mask: Any) -> str | None:
    """No block mask: blocks as long as any sequence, and a `mask_mod` that allows everything."""
    *_, query_block, key_block, mask_mod = block_mask
    body = _body(mask_mod)
    if body is not None and query_block == key_block == _WHOLE_SEQUENCE:
        (output,) = body.graph.find_nodes(op="output")
        result = output.args[0]
        result = result[0] if isinstance(result, tuple) else result
        if isinstance(result, fx.Node) and "ones" in str(result.target):
            return None
    # Blocks may be skipped that `mask_mod` allows, so the function alone proves nothing.
    return (
        "flex_attention has a block mask; for padding, pass a boolean key-padding mask to "
        "F.scaled_dot_product_attention"
    )


def _body(node: Any) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    body = getattr(owner, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None
