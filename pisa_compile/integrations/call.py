"""Piecewise sparse attention for a library that calls attention by name, where no graph is seen.

Each call decides for itself, by the rules that the rewrite of a graph follows: what cannot be
approximated stays dense, and the log says why, once.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import dispatch
from ..ops.functional import attention
from ..policies.policy import DEFAULT, DEFAULT_MIN_TOKENS, DEFAULT_MIN_TOKENS_GPU, Policy

log = logging.getLogger("pisa_compile")


@dataclass(frozen=True)
class Call:
    """One call of attention: what it computes besides softmax(scale * query @ key^T) @ value.

    Attributes:
        query: [B, H, Tq, D].
        key: [B, G, Tk, D] where G divides H.
        value: [B, G, Tk, E].
        mask: as `scaled_dot_product_attention` takes it, or None.
        scale: None for `D ** -0.5`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    dropout: float = 0.0


def checked(policy: Policy | None) -> Policy:
    """The policy, if single calls can follow it.

    Raises:
        UnsupportedError: it asks for what only a graph or a pipeline tells.
    """
    policy = policy or Policy()
    for name in ("schedule", "grid", "curve"):
        value = getattr(policy, name)
        if value not in (None, "auto", "raster"):
            raise dispatch.UnsupportedError(
                f"a policy with {name}={value!r} needs a model compiled with backend='pisa'; a "
                "single call of attention does not say where it stands"
            )
    return policy


def sparse(call: Call, policy: Policy) -> Tensor | None:
    """The result [B, H, Tq, E], or None where the caller must compute it densely.

    Raises:
        UnsupportedError: the policy names an implementation that cannot run the call.
    """
    policy = policy.over(DEFAULT)
    reason = refusal(call, policy)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _say_once(reason)
        return None
    params = policy.params(scale=1.0)
    return attention(
        call.query,
        call.key,
        call.value,
        sparsity=params.sparsity,
        scale=call.scale,
        block_size=params.block_size,
        key_block_size=params.key_block_size,
        routing=params.routing,
        order=params.order,
        attn_mask=call.mask,
        exact=params.exact,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
        impl=policy.impl,
    )


def refusal(call: Call, policy: Policy) -> str | None:
    """Why the call stays dense under a resolved policy, or None."""
    query, key = call.query, call.key
    tensors = (query, key, call.value)
    if not policy.enabled:
        return "the policy is DENSE"
    if call.is_causal:
        return "it is causal; only bidirectional attention is approximated"
    if call.dropout:
        return "dropout is active; call model.eval() first"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are needed; run under torch.no_grad() or torch.inference_mode()"
    if query.shape[2] != key.shape[2]:
        return "it is cross-attention; only self- and joint attention is approximated"
    if query.shape[0] != key.shape[0] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return "its key broadcasts against its query"
    if call.mask is not None and (reason := _mask_refusal(call.mask, query, key)):
        return reason
    minimum = policy.min_tokens
    if minimum is None:
        minimum = DEFAULT_MIN_TOKENS.get(query.device.type, DEFAULT_MIN_TOKENS_GPU)
    if query.shape[2] < minimum:
        return f"{query.shape[2]} tokens is too short to gain; min_tokens is {minimum}"
    name = policy.impl or dispatch.preferred(query.device)
    reason = dispatch.refusal(
        name,
        query.device,
        query.dtype,
        query.shape[3],
        call.value.shape[3],
        policy.params(scale=1.0),
    )
    if reason is not None and policy.impl is None:
        return f"the {name!r} implementation cannot run it: {reason}"
    return None  # an implementation that was asked for by name raises by itself


def _mask_refusal(mask: Tensor, query: Tensor, key: Tensor) -> str | None:
    if mask.dtype != torch.bool:
        return f"its mask has dtype {mask.dtype}; a boolean key-padding mask is supported"
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    wanted = f"a key-padding mask [B, 1, 1, Tk] is supported, its mask is {tuple(mask.shape)}"
    if len(shape) != 4 or shape[0] not in (1, query.shape[0]) or shape[3] not in (1, key.shape[2]):
        return wanted
    return wanted if shape[1] != 1 or shape[2] != 1 else None


@functools.cache
def _say_once(reason: str) -> None:
    log.info("attention stays dense: %s", reason)
