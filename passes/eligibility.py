"""Which sites may be replaced. Each refusal is one sentence that tells a user what to change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from ..kernels import dispatch
from ..policy import DEFAULT_MIN_TOKENS, DEFAULT_MIN_TOKENS_GPU, Policy
from .site import AttentionSite, example, sizes

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refusal(site: AttentionSite, policy: Policy) -> str | None:
    """Why the site stays dense, or None if it may be replaced.

    Raises:
        UnsupportedError: the policy names an implementation that cannot run this site.
    """
    if not policy.enabled:
        return "its policy is DENSE"
    query, key, value = example(site.query), example(site.key), example(site.value)
    return (
        _tensor_refusal(query, key, value)
        or _kind_refusal(site, query, key)
        or (None if site.attn_mask is None else mask_refusal(example(site.attn_mask), query))
        or _length_refusal(query, policy)
        or _implementation_refusal(site, query, value, policy)
    )


def _tensor_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if any(x.is_nested for x in (query, key, value)):
        return "nested tensors are not supported"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return f"query has {query.dim()} dimensions; 3 or 4 are supported"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not supported"
    return dispatch.device_refusal(query.device.type)


def _kind_refusal(site: AttentionSite, query: Tensor, key: Tensor) -> str | None:
    if site.is_causal:
        return "it is causal; only bidirectional attention is approximated"
    if site.dropout:
        return "dropout is active; call model.eval() first"
    if example(site.node).requires_grad:
        return (
            "gradients are needed; run under torch.no_grad() or torch.inference_mode(), "
            "or call model.requires_grad_(False)"
        )
    if not statically_known_true(query.shape[-2] == key.shape[-2]):
        lengths = f"{sizes(query)[-2]} query and {sizes(key)[-2]} key tokens"
        return f"it is cross-attention ({lengths}); only self- and joint attention is approximated"
    if site.enable_gqa and query.dim() != 4:
        return "grouped queries need 4 dimensions"
    return None


def mask_refusal(mask: Tensor, query: Tensor) -> str | None:
    """Why `mask` is not a key-padding mask that the op takes, judged by dtype and shape alone."""
    shape = list(mask.shape)
    if mask.dtype != torch.bool:
        return f"its mask is additive ({mask.dtype}); only boolean key-padding masks are supported"
    if query.dim() != 4 or len(shape) > 4:
        return f"its mask has shape {tuple(shape)} for a {query.dim()}-dimensional query"
    row_and_head = shape[-3:-1]
    if any(not statically_known_true(size == 1) for size in row_and_head):
        return (
            f"its mask {tuple(sizes(mask))} varies over queries or heads; only key-padding masks, "
            "[B, 1, 1, Tk], are supported"
        )
    return None


def _length_refusal(query: Tensor, policy: Policy) -> str | None:
    minimum = policy.min_tokens
    if minimum is None:
        minimum = DEFAULT_MIN_TOKENS.get(query.device.type, DEFAULT_MIN_TOKENS_GPU)
    # A length that is only known at run time cannot be judged here, and stays dense.
    if guard_or_false(query.shape[-2] >= minimum):
        return None
    return f"{sizes(query)[-2]} tokens is too short to gain; min_tokens is {minimum}"


def _implementation_refusal(
    site: AttentionSite, query: Tensor, value: Tensor, policy: Policy
) -> str | None:
    if policy.impl is None:
        return None
    reason = dispatch.refusal(
        policy.impl,
        query.device,
        example(site.node).dtype,
        query.shape[-1],
        value.shape[-1],
        policy.params(scale=1.0),
    )
    if reason is not None:
        raise dispatch.UnsupportedError(
            f"the policy asks for impl={policy.impl!r}, which cannot run this attention: {reason}"
        )
    return None
