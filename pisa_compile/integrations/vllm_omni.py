"""A plugin for vLLM-Omni's `SPARSE_ATTN` dispatcher, found by its entry point.

    vllm-omni serve MODEL --diffusion-attention-config.per_role.self.backend pisa \
        --diffusion-attention-config.per_role.self.extra.sparsity 0.875

The contract is that of vLLM-Omni's page "Diffusion Attention Backends", section "Sparse attention
(plugin)": a callable in the entry-point group `vllm_omni.sparse_attn`, tensors in
[batch, tokens, heads, head_dim], kernel settings and the host's own state in one flat `params`, and
a `capabilities` attribute. vLLM-Omni is not imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..policies.policy import POLICY_FIELDS, Policy
from .call import AttentionCall, checked, sparse

log = logging.getLogger("pisa_compile")

# What the dispatcher puts into `params` besides the settings of the kernel.
_OF_THE_HOST = {
    "attn_mask", "denoise_step_idx", "full_attn_spans", "latent_shape", "patch_size",
    "patches_per_frame", "total_denoise_steps", "total_latent_frames",
}  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Piecewise sparse attention where it applies, dense attention elsewhere.

    Args:
        query: [B, Tq, H, D].
        key: [B, Tk, G, D] where G divides H.
        value: [B, Tk, G, E].
        params: fields of `pisa.Policy` such as "sparsity" and "min_tokens"; "attn_mask", boolean
            [B, Tk] or [B, 1, 1, Tk]. Keys of the host are accepted and not read; the log names any
            others.
        is_causal: causal attention is computed densely.
        softmax_scale: factor on the logits.

    Returns:
        [B, Tq, H, E].

    Raises:
        TypeError, ValueError: a setting has a bad value.
        UnsupportedError: a setting cannot be followed in a single call.
    """
    ours = {name: params[name] for name in POLICY_FIELDS if name in params}
    policy = checked(Policy(**ours))
    _name_unknown(frozenset(params) - set(ours) - _OF_THE_HOST)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = params.get("attn_mask")
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    call = AttentionCall(query, key, value, mask, softmax_scale, is_causal)
    out = sparse(call, policy)
    if out is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return out.transpose(1, 2)


attention.capabilities = {"supports_attention_mask": True}  # type: ignore[attr-defined]


@functools.cache
def _name_unknown(names: frozenset[str]) -> None:
    if names:
        log.warning(
            "parameters without a meaning here: %s; settings are %s",
            ", ".join(sorted(names)),
            ", ".join(POLICY_FIELDS),
        )
