"""`torch.ops.pisa.attention`: schema, fake implementation, FLOP formula. Needs torch alone.

Two ops, because the number of results is part of a schema: `attention` returns the output,
`attention_with_lse` the output and its log-sum-exp. What runs them is decided in
`ops.dispatch`, when they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..kernels.params import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_ORDER,
    DEFAULT_ROUTING,
    AttentionParams,
    Settings,
)
from . import dispatch, observation, validation
from .flops import attention_flops

# One schema text for both ops. Keyword-only settings keep traced graphs readable. Torch leaves an
# argument that equals its default out of a traced graph, and caches and saved programs are known
# by that graph: a default that may ever change must be None, and what it stands for be passed.
# Exact ranges are SymInt: a text length may be symbolic. `site` is the number of the decision that
# put the op into its graph; in a region that is called several times it is an index into `calls`,
# an int32 vector that each of them passes in. Both are read by observers alone.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor? density=None, "
    "Tensor? permutation=None, Tensor? calls=None, *, float? scale=None, float sparsity, "
    "int? block_size=None, int? key_block_size=None, str? routing=None, str? order=None, "
    "SymInt exact_prefix=0, SymInt exact_suffix=0, bool enable_gqa=False, str? impl=None, "
    "int? site=None"
)
_DEFAULTS = {
    "block_size": DEFAULT_BLOCK_SIZE,
    "routing": DEFAULT_ROUTING,
    "order": DEFAULT_ORDER,
}


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **arguments: Any) -> Tensor:
    return _attention_with_lse(query, key, value, *args, **arguments)[0]


def _attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    calls: Tensor | None = None,
    *,
    site: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    tensors = query, key, value, attn_mask, density, permutation
    params, impl = _checked(*tensors, **arguments)
    key_mask = None
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask[None]
        key_mask = attn_mask[:, 0, 0].expand(key.shape[0], key.shape[2])
    watched = observation.active()
    if watched:
        decision = observation.called(site, calls)
        density = observation.density_for(decision, params, density)
    out, lse = dispatch.attention(
        query, key, value, key_mask, params, impl, density=density, permutation=permutation
    )
    if watched:
        observation.notify(
            site=decision,
            query=query,
            key=key,
            value=value,
            key_mask=key_mask,
            params=params,
            density=density,
            permutation=permutation,
            out=out,
        )
    return out, lse


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    calls: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
    site: int | None = None,
    **settings: Any,
) -> tuple[AttentionParams, str | None]:
    """The settings of a call and the implementation that it names, once it is known to be right."""
    given = _named(settings)
    validation.check_call(
        query, key, value, attn_mask, density, permutation, scale=scale, enable_gqa=enable_gqa,
        settings=vars(given) | {"impl": impl},
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return given.scaled(scale), impl


def _named(settings: Mapping[str, Any]) -> Settings:
    """Arguments of the op as settings, not checked; those that are open have the defaults."""
    given = {name: value for name, value in settings.items() if value is not None}
    return Settings.from_arguments({**_DEFAULTS, **given})


attention = torch.library.custom_op(
    "pisa::attention", _attention, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
attention_with_lse = torch.library.custom_op(
    "pisa::attention_with_lse",
    _attention_with_lse,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any, **arguments: Any) -> Tensor:
    _checked(query, key, value, *args, **arguments)
    # [B, Tq, H, E] memory: what the models around it reshape to, and what SDPA gives.
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


@attention_with_lse.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **arguments: Any
) -> tuple[Tensor, Tensor]:
    _checked(query, key, value, *args, **arguments)
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)


@register_flop_formula([torch.ops.pisa.attention, torch.ops.pisa.attention_with_lse])
def _flop_formula(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    mask_shape: tuple[int, ...] | None = None,
    density_shape: tuple[int, ...] | None = None,
    permutation_shape: tuple[int, ...] | None = None,
    calls_shape: tuple[int, ...] | None = None,
    *,
    out_shape: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
    site: int | None = None,
    **settings: Any,
) -> int:
    return attention_flops(query_shape, key_shape, value_shape, _named(settings))
