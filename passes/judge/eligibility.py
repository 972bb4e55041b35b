"""Which sites may be replaced. Each refusal is one sentence that tells a user what to change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from ... import cost
from ...kernels import dispatch
from ...policies.policy import DEFAULT_MIN_TOKENS, DEFAULT_MIN_TOKENS_GPU, Policy
from ..graph.fake import example, four_sizes, sizes
from ..masks.padding import MaskAnalysis
from ..sites.site import AttentionSite, NearMiss
from ..tokens.exchange import exchanges_joint_shares
from ..tokens.joint import is_joint

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refusal(
    site: AttentionSite, policy: Policy, masks: MaskAnalysis, gradients: bool | None = None
) -> str | None:
    """Why the site stays dense, or None if it may be replaced.

    Args:
        gradients: whether any will be asked for; None if the traced tensors tell.

    Raises:
        UnsupportedError: the policy names an implementation that cannot run this site.
    """
    if not policy.enabled:
        return "its policy is DENSE"
    query, key, value = (view.example() for view in (site.query, site.key, site.value))
    return (
        _tensor_refusal(query, key, value)
        or _kind_refusal(site, gradients)
        or _shape_refusal(site, query, key, value)
        or _mask_refusal(site, masks)
        or _exact_refusal(site, policy)
        or _length_refusal(site, query, key, value, policy)
        or _implementation_refusal(site, query, value, policy)
    )


def is_expected(site: AttentionSite | NearMiss, policy: Policy) -> bool:
    """Whether nobody would expect a site to be sparse, whatever its spelling: by its policy, or
    because sparsity is not meant for cross-attention and sequences too short to gain.
    """
    if not policy.enabled:
        return True
    if isinstance(site, NearMiss):
        key = four_sizes(example(site.key))
        length = four_sizes(example(site.query))[1 if site.token_first else -2]
        device = example(site.query).device
        minimum = policy.min_tokens
        if minimum is None:
            minimum = DEFAULT_MIN_TOKENS.get(device.type, DEFAULT_MIN_TOKENS_GPU)
        # A key may stand there transposed, so its length is any of its sizes.
        return length not in key or 0 <= length < minimum
    tensors = [view.example() for view in (site.query, site.key, site.value)]
    least, _ = _least_tokens(site, tensors[0], tensors[1], tensors[2], policy)
    length, keys = sizes(tensors[0])[-2], sizes(tensors[1])[-2]
    return length != keys or least is None or 0 <= length < least


def _tensor_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested:
            return f"its {name} is a nested tensor; pad it and pass a key-padding mask"
        if tensor.dtype not in _DTYPES:
            return f"its {name} has dtype {tensor.dtype}; floating point is supported"
        if tensor.device != query.device:
            return f"its query is on {query.device}, its {name} on {tensor.device}"
    return None


def _kind_refusal(site: AttentionSite, gradients: bool | None) -> str | None:
    if site.is_causal:
        return "it is causal; only bidirectional attention is approximated"
    if site.dropout:
        return "dropout is active; call model.eval() first"
    if example(site.node).requires_grad if gradients is None else gradients:
        return (
            "gradients are needed; run under torch.no_grad() or torch.inference_mode(), "
            "or call model.requires_grad_(False)"
        )
    return None


def _shape_refusal(site: AttentionSite, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not statically_known_true(query.shape[-2] == key.shape[-2]) and not is_joint(site):
        lengths = f"{sizes(query)[-2]} query and {sizes(key)[-2]} key tokens"
        return f"it is cross-attention ({lengths}); only self- and joint attention is approximated"
    heads = 0 if site.enable_gqa else 1
    for name, tensor in (("key", key), ("value", value)):
        for mine, its in zip(tensor.shape[: 1 + heads], query.shape, strict=False):
            if not guard_or_false(mine == its):
                return (
                    f"its {name} {tuple(sizes(tensor))} broadcasts against its query "
                    f"{tuple(sizes(query))}; expand it, or use enable_gqa=True for shared heads"
                )
    return None


def _mask_refusal(site: AttentionSite, masks: MaskAnalysis) -> str | None:
    padding = masks.padding(site)
    return padding if isinstance(padding, str) else None


def _least_tokens(
    site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, policy: Policy
) -> tuple[int | None, str]:
    """The length from which sparsity pays, if there is one, and where that is from."""
    if policy.min_tokens is not None:
        return policy.min_tokens, "min_tokens is {}"
    profile = cost.profile_of(query.device, site.dtype, sizes(query)[-1], sizes(value)[-1])
    if profile is None:
        least = DEFAULT_MIN_TOKENS.get(query.device.type, DEFAULT_MIN_TOKENS_GPU)
        return least, "min_tokens is {}"
    batch, heads, _, head_dim = sizes(query)
    work = cost.Workload(
        batch, heads, sizes(key)[1], 0, head_dim, sizes(value)[-1], policy.params(scale=1.0)
    )
    why = "on this device it pays from {} on; min_tokens overrides that"
    return cost.break_even(work, profile), why


def _exact_refusal(site: AttentionSite, policy: Policy) -> str | None:
    if policy.exact in (None, "auto", (0, 0)) or not exchanges_joint_shares(site):
        return None
    return (
        f"exact={policy.exact} counts tokens in the order of one process, but ranks exchange their "
        "shares of several joined sequences, which then alternate; leave exact on 'auto'"
    )


def _length_refusal(
    site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, policy: Policy
) -> str | None:
    minimum, why = _least_tokens(site, query, key, value, policy)
    if minimum is None:
        return (
            "sparse attention was measured to be slower here at any length; "
            "min_tokens overrides that"
        )
    # A length that is only known at run time cannot be judged here, and stays dense.
    if guard_or_false(query.shape[-2] >= minimum):
        return None
    return f"{sizes(query)[-2]} tokens is too short to gain; {why.format(minimum)}"


def _implementation_refusal(
    site: AttentionSite, query: Tensor, value: Tensor, policy: Policy
) -> str | None:
    name = policy.impl or dispatch.preferred(query.device)
    reason = dispatch.refusal(
        name,
        query.device,
        site.dtype,
        query.shape[-1],
        value.shape[-1],
        policy.params(scale=1.0),
        value.shape[-2],
    )
    if reason is not None and policy.impl is not None:
        raise dispatch.UnsupportedError(
            f"the policy asks for impl={name!r}, which cannot run this attention: {reason}"
        )
    return reason and f"the {name!r} implementation cannot run it: {reason}"
