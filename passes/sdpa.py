"""`F.scaled_dot_product_attention`, one node in a Dynamo graph on every device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from .rewrite import AttentionRewrite
from .site import AttentionSite, is_zero, number

_TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_PARAMETERS = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


class ScaledDotProductAttention(AttentionRewrite):
    def match(self, node: fx.Node) -> AttentionSite | None:
        if node.op != "call_function" or node.target not in _TARGETS:
            return None
        given: dict[str, Any] = (
            _PARAMETERS | dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
        )
        return AttentionSite(
            node=node,
            query=given["query"],
            key=given["key"],
            value=given["value"],
            attn_mask=given["attn_mask"],
            dropout=not is_zero(given["dropout_p"]),
            is_causal=bool(given["is_causal"]),
            scale=number(given["scale"]),
            enable_gqa=bool(given["enable_gqa"]),
        )
