"""Context parallelism of diffusers for its attention backend "pisa": Ulysses, ring, and both.

diffusers moves tokens and heads between ranks and merges what the parts of the keys give, by their
log-sum-exps; here is the attention in between.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import _templated_context_parallel_attention
from torch import Tensor

from .. import ops as ops  # registers torch.ops.pisa
from ..ops.dispatch import UnsupportedError
from ..policies.policy import DEFAULT, Policy
from .call import AttentionCall, refusal


def over_ranks(call: AttentionCall, policy: Policy, parallel_config: Any) -> Tensor:
    """Attention of a rank's queries over the keys of all ranks.

    Sparsity applies to the sequence that a rank sees at once: the whole with Ulysses, and with a
    ring each part of it.

    Args:
        call: the rank's tokens, [B, T, H, D] as diffusers has them.
        policy: of the attention backend.
        parallel_config: of diffusers.

    Returns:
        [B, T, H, E].

    Raises:
        UnsupportedError: the call or the policy asks for what is not known on a single rank.
    """
    ring = parallel_config.context_parallel_config.ring_degree > 1
    if call.is_causal or call.dropout:
        raise UnsupportedError("context parallelism is for attention without causality or dropout")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value)):
        raise UnsupportedError("gradients are needed; run under torch.no_grad()")
    if ring and call.mask is not None:
        raise UnsupportedError(
            "diffusers' ring attention does not pass masks from rank to rank; use Ulysses, or "
            "leave the padding out"
        )
    if policy.exact not in (None, "auto", (0, 0)):
        raise UnsupportedError(
            f"exact={policy.exact} counts tokens of the whole sequence in the order of one "
            "process, which no rank sees under context parallelism; leave exact out"
        )
    result: Tensor = _templated_context_parallel_attention(
        call.query,
        call.key,
        call.value,
        call.mask,
        scale=call.scale,
        forward_op=functools.partial(_part, policy.over(DEFAULT)),
        backward_op=None,
        _parallel_config=parallel_config,
    )
    return result


def _part(
    policy: Policy,
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    **_: Any,
) -> Any:
    """Attention [B, T, H, E] over what is on this rank now, and its log-sum-exp [B, T, H]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask[:, None, None, :]
    settings = policy.settings()
    # Where it would not pay the op computes densely: the log-sum-exp is needed all the same.
    if refusal(AttentionCall(query, key, value, attn_mask, scale), policy) is not None:
        settings = dataclasses.replace(settings, sparsity=0.0)
    out, lse = torch.ops.pisa.attention_with_lse(
        query, key, value, attn_mask, scale=scale, impl=policy.impl, **settings.as_arguments()
    )
    out = out.transpose(1, 2)
    return (out, lse.transpose(1, 2)) if return_lse else out
