"""What became of one attention, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...policies.policy import Policy
from ..graph.fake import example, four_sizes, sizes
from .modules import module_stack
from .site import AttentionSite, NearMiss


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
        conditional: whether it stands in the body of control flow, which may run never or often.
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
    conditional: bool = False


def decision_on(
    found: AttentionSite | NearMiss,
    policy: Policy,
    reason: str | None,
    expected: bool,
    conditional: bool,
    notes: tuple[str, ...] = (),
) -> Decision:
    """The record of a decision; `reason` is None for a site that is replaced."""
    modules = module_stack(found.node)
    if isinstance(found, NearMiss):
        shapes = [four_sizes(example(x)) for x in (found.query, found.key, found.value)]
        if found.token_first:
            shapes = [(batch, heads, count, width) for batch, count, heads, width in shapes]
        result = example(found.query)
    else:
        shapes = [sizes(x.example()) for x in (found.query, found.key, found.value)]
        result = example(found.node)
    return Decision(
        module=modules[-1][1] if modules else "",
        modules=modules,
        query_shape=shapes[0],
        key_shape=shapes[1],
        value_shape=shapes[2],
        dtype=result.dtype,
        replaced=reason is None,
        reason=reason or "eligible",
        policy=policy,
        notes=notes,
        expected=expected,
        conditional=conditional,
    )
