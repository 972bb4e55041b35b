"""What became of one attention, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...policies.policy import Policy


@dataclass(frozen=True)
class Decision:
    """What became of one site, and why.

    Attributes:
        module: path of the innermost module as far as the trace knows it.
        modules: `(id, path)` of the modules around the site, outermost first; the id is that of
            the traced module object.
        query_shape, key_shape, value_shape: sizes; symbolic ones by the size that was traced.
        replaced: whether piecewise sparse attention took its place.
        reason: in words, for a user.
        policy: the policy in force, every field resolved. Of a site that was replaced, `exact` and
            `grid` say what was found, by the traced sizes.
        notes: what else a user should know of a site that was replaced, in words.
        expected: whether a dense site is so by its policy, or as one that sparsity is not meant
            for: cross-attention and short sequences.
    """

    module: str
    modules: tuple[tuple[str, str], ...]
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    replaced: bool
    reason: str
    policy: Policy
    notes: tuple[str, ...] = ()
    expected: bool = False
