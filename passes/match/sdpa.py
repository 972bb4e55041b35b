"""`F.scaled_dot_product_attention`, one node in a Dynamo graph on every device.

Programs that were decomposed for a device hold the operator of that device's kernel instead.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from ..graph.axes import Step
from ..graph.fake import example, is_tensor, is_zero, number
from ..sites.site import AttentionSite, Mask, NearMiss, View
from .spelling import GraphFacts, Spelling
from .transforms import transform_of

_TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
# What it becomes on a device: several results, the first of which is that of the attention.
_KERNELS = {
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
    "_scaled_dot_product_attention_math_for_mps",
}
_NAMES = {"attn_bias": "attn_mask"}
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
        given = _arguments(node)
        if given is None:
            return None
        inputs = given["query"], given["key"], given["value"]
        end, *unread = (node,) if is_tensor(node) else _results(node) or (None,)
        if end is None:
            return NearMiss(node, *inputs, "more than its output is used, such as its log-sum-exp")
        reason = transform_of((*inputs, given["attn_mask"], end))
        if reason is None and given.get("dropout_mask") is not None:
            reason = "it is given a mask of its dropout; call model.eval() first"
        layout = _layout(*map(example, inputs))
        if layout is None:
            reason = "query, key and value have different or unknown leading dimensions"
        mask = given["attn_mask"]
        steps = None if mask is None else _mask_steps(example(mask).dim(), example(end).dim())
        if mask is not None and steps is None:
            reason = "its mask has more dimensions than [B, 1, Tq, Tk]; flatten the batch"
        if reason is not None:
            return NearMiss(end, *inputs, reason)
        assert layout is not None
        to_four, back = layout
        masks: tuple[Mask, ...] = ()
        if steps is not None:
            boolean = example(mask).dtype == torch.bool
            masks = (Mask("allow" if boolean else "add", View(mask, steps)),)
        query, key, value = (View(x, to_four) for x in inputs)
        return AttentionSite(
            node=end,
            query=query,
            key=key,
            value=value,
            dtype=example(end).dtype,
            masks=masks,
            dropout=not is_zero(given["dropout_p"]),
            is_causal=bool(given["is_causal"]),
            scale=number(given["scale"]),
            enable_gqa=bool(given["enable_gqa"]),
            result=back,
            interior=() if end is node else (node, *unread),
        )


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of scaled_dot_product_attention, or of a kernel of it, by its names."""
    if node.op != "call_function":
        return None
    if node.target in _TARGETS:
        return _PARAMETERS | dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target._opname not in _KERNELS:
        return None
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return _PARAMETERS | {_NAMES.get(name, name): value for name, value in given.items()}


def _results(node: fx.Node) -> tuple[fx.Node, ...]:
    """What picks results of a kernel, that of the attention first; () if others are read too."""
    picked = [user for user in node.users if user.target is operator.getitem]
    read = [user for user in picked if user.users]
    if len(picked) != len(node.users) or len(read) != 1 or read[0].args[1] != 0:
        return ()
    return (*read, *(user for user in picked if not user.users))


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
