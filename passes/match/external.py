"""Attention kernels of other libraries: one opaque operator each, reported and left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph.fake import example, is_tensor, sizes
from ..sites.site import AttentionSite, NearMiss
from .spelling import GraphFacts, Spelling

_WORDS = ("attention", "attn", "fmha", "flash")
_OTHER_WORDS = ("backward", "bwd", "rotary", "rope", "norm", "mask", "cache")
# Recognised elsewhere, or not attention at all.
_KNOWN = (
    *("pisa", "aten::scaled_dot_product_attention", "aten::_transformer_encoder_layer_fwd"),
    "aten::_scaled_dot_product",
)


def attention_kernel(target: Any) -> str | None:
    """`namespace::name` of an operator that is an attention kernel by its name, or None."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}::{target._opname}"
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
    else:
        return None
    words = name.lower()
    if name.startswith(_KNOWN) or any(word in words for word in _OTHER_WORDS):
        return None
    return name if any(word in words for word in _WORDS) else None


class ExternalKernel(Spelling):
    """Never a site: the layout and the meaning of its arguments are the library's own."""

    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        name = attention_kernel(node.target) if node.op == "call_function" else None
        if name is None:
            return None
        inputs = [x for x in (*node.args, *node.kwargs.values()) if is_tensor(x)][:3]
        if len(inputs) < 3 or not _attend(*map(example, inputs)):
            return None
        reason = (
            f"`{name}` is a kernel that cannot be looked into; "
            "call F.scaled_dot_product_attention instead"
        )
        # Kernels outside of torch take [B, T, H, D].
        token_first = not name.startswith("aten::")
        query, key, value = inputs
        return NearMiss(node, query, key, value, reason, token_first)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether three tensors can be query, key and value."""
    if {query.dim(), key.dim(), value.dim()} not in ({3}, {4}) or not query.is_floating_point():
        return False
    first, second, third = sizes(query), sizes(key), sizes(value)
    return first[-1] == second[-1] and second[:-1] == third[:-1]
