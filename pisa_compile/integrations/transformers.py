"""The attention implementation "pisa" of HF transformers.

    from pisa_compile.integrations import transformers as pisa_transformers

    pisa_transformers.register(pisa.Policy(sparsity=0.85))
    model.set_attn_implementation("pisa")

For vision transformers and language models that denoise: bidirectional attention over long
sequences. What is causal, short or otherwise unsuitable is computed as by "sdpa". Compiled models
need none of this: `backend="pisa"` finds attention whatever its implementation is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    sdpa_mask,
)

from ..policies.policy import Policy
from .call import AttentionCall, checked, sparse


def register(policy: Policy | None = None, name: str = "pisa") -> None:
    """Make `attn_implementation=name` known to transformers.

    Args:
        policy: for all models that use the name; registering again replaces it.
        name: registering several names with a policy each is fine.

    Raises:
        UnsupportedError: the policy has fields that single calls cannot follow.
    """
    AttentionInterface.register(name, _forward(checked(policy)))
    AttentionMaskInterface.register(name, _mask)


def _forward(policy: Policy) -> Callable[..., tuple[Tensor, None]]:
    def pisa_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # A mask that is given says all there is to say, as for "sdpa".
        causal = bool(causal) and attention_mask is None
        call = AttentionCall(query, key, value, attention_mask, scaling, causal, dropout)
        changed = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
        out = None if changed else sparse(call, policy)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return result

    return pisa_attention_forward


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of "sdpa", except that pure padding stays a row: boolean [B, 1, 1, Tk].

    Written out to [B, 1, Tq, Tk] it could only be told apart from other masks by reading it.
    """
    plain = mask_function is bidirectional_mask_function and q_length == kv_length
    padding = attention_mask is not None and attention_mask.shape == (batch_size, kv_length)
    if plain and padding and kwargs.get("allow_is_bidirectional_skip"):  # nobody reads its rows
        assert attention_mask is not None
        return attention_mask[:, None, None, :].to(torch.bool)
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        **kwargs,
    )  # fmt: skip
    return mask
