"""The attention backend "pisa" of diffusers, for models that run eager.

    from pisa_compile.integrations import diffusers as pisa_diffusers

    pisa_diffusers.register(pisa.Policy(sparsity=0.85))
    pipe.transformer.set_attention_backend("pisa")

Compiled models need none of this: `backend="pisa"` finds attention by itself, sees policies of
single modules, and reports. Under context parallelism this is the way to ring attention, which
needs the log-sum-exp; see `diffusers_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from ..policies.policy import Policy
from .call import AttentionCall, checked, sparse
from .diffusers_parallel import over_ranks


def register(policy: Policy | None = None, name: str = "pisa") -> None:
    """Make `set_attention_backend(name)` and `attention_backend(name)` known to diffusers.

    Args:
        policy: for all models that use the name; registering again replaces it.
        name: lower case; registering several names with a policy each is fine.

    Raises:
        ValueError: the name is one of diffusers' own, or not lower case.
        UnsupportedError: the policy has fields that single calls cannot follow.
    """
    taken = {member.value for member in AttentionBackendName} - _ours
    if name in taken or name != name.lower() or not name.isidentifier():
        raise ValueError(
            f"name must be a new lower-case identifier, got {name!r}; diffusers has "
            f"{', '.join(sorted(taken))}"
        )
    _ours.add(name)
    backend = _AttentionBackendRegistry.register(_member(name), supports_context_parallel=True)
    backend(_function(checked(policy)))


_ours: set[str] = set()


def _member(name: str) -> AttentionBackendName:
    """The member of diffusers' enumeration with that value; it has no way to add one."""
    if name in AttentionBackendName._value2member_map_:
        return AttentionBackendName(name)
    members: Any = AttentionBackendName
    member = str.__new__(members, name)
    member._name_, member._value_ = name.upper(), name
    member._sort_order_ = len(members._member_names_)
    members._member_names_.append(member._name_)
    members._member_map_[member._name_] = member
    members._value2member_map_[name] = member
    type.__setattr__(members, member._name_, member)
    return member  # type: ignore[no-any-return]


def _function(policy: Policy) -> Callable[..., Tensor]:
    # diffusers passes on what the signature names, and drops the rest with a word only in its
    # debugging mode: so it names all that can change the result.
    def pisa_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None:
            here = AttentionCall(query, key, value, attn_mask, scale, is_causal, dropout_p)
            return over_ranks(here, policy, _parallel_config)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, T, D]
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[:, None, None, :]
        call = AttentionCall(query, key, value, attn_mask, scale, is_causal, dropout_p)
        out = sparse(call, policy)
        if out is None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        return out.transpose(1, 2)

    return pisa_attention
