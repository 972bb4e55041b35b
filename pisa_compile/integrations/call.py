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

from .. import ops as ops  # registers torch.ops.pisa
from ..ops import dispatch
from ..passes.judge import rules
from ..passes.judge.rules import Candidate, Operand
from ..policies.policy import DEFAULT, Policy

log = logging.getLogger("pisa_compile")


@dataclass(frozen=True)
class AttentionCall:
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


def sparse(call: AttentionCall, policy: Policy) -> Tensor | None:
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
    out: Tensor = torch.ops.pisa.attention(
        call.query,
        call.key,
        call.value,
        call.mask,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
        impl=policy.impl,
        **policy.settings().as_arguments(),
    )
    return out


def refusal(call: AttentionCall, policy: Policy) -> str | None:
    """Why the call stays dense under a resolved policy, or None.

    Raises:
        UnsupportedError: the policy names an implementation that cannot run the call.
    """
    tensors = call.query, call.key, call.value
    query, key, value = map(Operand.of, tensors)
    candidate = Candidate(
        query=query,
        key=key,
        value=value,
        dtype=query.dtype,
        enable_gqa=query.shape[1] != key.shape[1],
        is_causal=call.is_causal,
        dropout=bool(call.dropout),
        gradients=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        mask=None if call.mask is None else _mask_refusal(call.mask, call.query, call.key),
    )
    return rules.refusal(candidate, policy)


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
