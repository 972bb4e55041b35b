"""`F.scaled_dot_product_attention`, one node in a Dynamo graph on every device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from ..graph.axes import Step
from ..graph.fake import example, is_zero, number
from ..sites.site import AttentionSite, Mask, NearMiss, View
from .spelling import GraphFacts, Spelling

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


class ScaledDotProductAttention(Spelling):
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        if node.op != "call_function" or node.target not in _TARGETS:
            return None
        given: dict[str, Any] = (
            _PARAMETERS | dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
        )
        inputs = given["query"], given["key"], given["value"]
        layout = _layout(*map(example, inputs))
        if layout is None:
            reason = "query, key and value have different or unknown leading dimensions"
            return NearMiss(node, *inputs, reason)
        to_four, back = layout
        masks: tuple[Mask, ...] = ()
        if given["attn_mask"] is not None:
            steps = _mask_steps(example(given["attn_mask"]).dim(), example(node).dim())
            if steps is None:
                reason = "its mask has more dimensions than [B, 1, Tq, Tk]; flatten the batch"
                return NearMiss(node, *inputs, reason)
            boolean = example(given["attn_mask"]).dtype == torch.bool
            masks = (Mask("allow" if boolean else "add", View(given["attn_mask"], steps)),)
        query, key, value = (View(x, to_four) for x in inputs)
        return AttentionSite(
            node=node,
            query=query,
            key=key,
            value=value,
            dtype=example(node).dtype,
            masks=masks,
            dropout=not is_zero(given["dropout_p"]),
            is_causal=bool(given["is_causal"]),
            scale=number(given["scale"]),
            enable_gqa=bool(given["enable_gqa"]),
            result=back,
        )


def _layout(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Step, ...], tuple[Step, ...]] | None:
    """Steps to [B, H, T, D] and back, or None if the ranks do not allow it."""
    rank = query.dim()
    if not rank == key.dim() == value.dim():
        return None
    if rank == 4:
        return (), ()
    if rank == 3:  # [N, T, D] is N batches of one head
        return (("unsqueeze", (1,)),), (("squeeze", (1,)),)
    if rank == 2:
        return (("unsqueeze", (0,)),) * 2, (("squeeze", (0,)),) * 2
    leading = tuple(size if isinstance(size, int) else -1 for size in query.shape[: rank - 3])
    if rank < 2 or leading.count(-1) > 1:
        return None
    return (("flatten", (0, rank - 4)),), (("unflatten", (0, leading)),)


def _mask_steps(rank: int, site_rank: int) -> tuple[Step, ...] | None:
    """Steps that bring a mask of a `site_rank`-dimensional attention to four dimensions."""
    if site_rank == 3 and rank == 3:
        return (("unsqueeze", (1,)),)
    if rank > 4 or (rank == 4 and site_rank != 4):
        return None
    return (("unsqueeze", (0,)),) * (4 - rank)
