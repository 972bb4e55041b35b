"""The rules, asked about sites of a graph."""

from __future__ import annotations

from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...policies.policy import Policy
from ..graph.fake import example, four_sizes
from ..masks.padding import Padding
from ..sites.site import AttentionSite, NearMiss
from ..tokens.channels import attends_channels
from ..tokens.exchange import exchanges_joint_shares
from ..tokens.joint import is_joint
from . import rules
from .rules import Candidate, Operand


def candidate_of(
    site: AttentionSite, padding: Padding | str, gradients: bool | None = None
) -> Candidate:
    """What the rules need to know of a site.

    Args:
        padding: what its masks amount to, or why they cannot be taken.
        gradients: whether any will be asked for; None if the traced tensors tell.
    """
    query, key, value = (Operand.of(x.example()) for x in (site.query, site.key, site.value))
    nested = query.is_nested or key.is_nested
    return Candidate(
        query=query,
        key=key,
        value=value,
        dtype=site.dtype,
        enable_gqa=site.enable_gqa,
        is_causal=site.is_causal,
        dropout=site.dropout,
        gradients=bool(example(site.node).requires_grad) if gradients is None else gradients,
        joint=not nested
        and not statically_known_true(query.shape[2] == key.shape[2])
        and is_joint(site),
        channels=not nested and attends_channels(site),
        mask=padding if isinstance(padding, str) else None,
        alternating=exchanges_joint_shares(site),
    )


def is_expected_near_miss(near: NearMiss, policy: Policy) -> bool:
    """As `rules.is_expected`, for attention that was recognised in part."""
    if not policy.enabled:
        return True
    key = four_sizes(example(near.key))
    length = four_sizes(example(near.query))[1 if near.token_first else -2]
    least = rules.fixed_least_tokens(example(near.query).device, policy)
    # A key may stand there transposed, so its length is any of its sizes.
    return length not in key or 0 <= length < least
