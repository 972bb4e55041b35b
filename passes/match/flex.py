"""`flex_attention` as plain attention: without a score modification, with a mask or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.fake import example, number
from ..masks.block_mask import body_of, dense_mask
from ..sites.site import AttentionSite, Mask, NearMiss, View
from .spelling import GraphFacts, Spelling

# What torch calls a block that covers any sequence: there is no block mask then.
_WHOLE_SEQUENCE = 1 << 30


class FlexAttention(Spelling):
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
        reason = _score_refusal(score_mod)
        if results:
            reason = reason or "its log-sum-exp is used; call it with return_lse=False"
        mask = None if reason or _covers_all(block_mask) else dense_mask(node, facts.writes)
        if isinstance(mask, str):
            reason = mask
        if reason is not None:
            return NearMiss(out, query, key, value, reason)
        return AttentionSite(
            node=out,
            query=View(query),
            key=View(key),
            value=View(value),
            dtype=example(out).dtype,
            masks=(Mask("allow", View(mask)),) if isinstance(mask, fx.Node) else (),
            scale=number(scale),
            enable_gqa=example(query).shape[1] != example(key).shape[1],
            interior=(node,),
        )


def _score_refusal(score_mod: Any) -> str | None:
    """The traced score modification must return the score, its first input."""
    body = body_of(score_mod)
    if body is not None:
        (output,) = body.graph.find_nodes(op="output")
        inputs = body.graph.find_nodes(op="placeholder")
        if output.args[0] in (inputs[0], (inputs[0],)):
            return None
    return "flex_attention modifies its scores (score_mod); only plain attention is approximated"


def _covers_all(block_mask: Any) -> bool:
    """No block mask: blocks as long as any sequence, and a `mask_mod` that allows everything."""
    *_, query_block, key_block, mask_mod = block_mask
    body = body_of(mask_mod)
    if body is None or not query_block == key_block == _WHOLE_SEQUENCE:
        return False
    (output,) = body.graph.find_nodes(op="output")
    result = output.args[0]
    result = result[0] if isinstance(result, tuple) else result
    return isinstance(result, fx.Node) and "ones" in str(result.target)
