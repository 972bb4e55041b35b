"""`torch.ops.pisa.attention`: schema, fake implementation, FLOP formula. Needs torch alone.

Two ops, because the number of results is part of a schema: `attention` returns the output,
`attention_with_lse` the output and its log-sum-exp. What runs them is decided in
`kernels.dispatch`, when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..kernels import dispatch
from ..kernels.params import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_ORDER,
    DEFAULT_ROUTING,
    AttentionParams,
    block_count,
    exact_block_count,
    free_key_blocks,
    free_query_blocks,
)
from . import observation, validation

# One schema text for both ops. Keyword-only settings keep traced graphs readable. Torch leaves an
# argument that equals its default out of a traced graph, and caches and saved programs are known
# by that graph: a default that may ever change must be None, and what it stands for be passed.
# Exact ranges are SymInt: a text length may be symbolic.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor? density=None, "
    "Tensor? permutation=None, *, float? scale=None, float sparsity, int? block_size=None, "
    "int? key_block_size=None, str? routing=None, str? order=None, SymInt exact_prefix=0, "
    "SymInt exact_suffix=0, bool enable_gqa=False, str? impl=None"
)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
    return _attention_with_lse(query, key, value, *args, **settings)[0]


def _attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    *,
    enable_gqa: bool = False,
    impl: str | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    params = _params(query.shape[-1], **settings)
    validation.check_tensors(query, key, value, attn_mask, enable_gqa)
    validation.check_density(density, query)
    validation.check_permutation(permutation, query, key)
    validation.check_impl(impl)
    key_mask = None
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask[None]
        key_mask = attn_mask[:, 0, 0].expand(key.shape[0], key.shape[2])
    watched = observation.active()
    if watched:
        site = observation.next_site()
        density = observation.density_for(site, params, density)
    out, lse = dispatch.attention(
        query, key, value, key_mask, params, impl, density=density, permutation=permutation
    )
    if watched:
        observation.notify(
            site=site,
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


def _params(
    head_dim: int,
    *,
    sparsity: float,
    scale: float | None = None,
    block_size: int | None = None,
    key_block_size: int | None = None,
    routing: str | None = None,
    order: str | None = None,
    exact_prefix: int = 0,
    exact_suffix: int = 0,
) -> AttentionParams:
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    routing = DEFAULT_ROUTING if routing is None else routing
    order = DEFAULT_ORDER if order is None else order
    validation.check_sparsity(sparsity)
    validation.check_block_size(block_size)
    validation.check_key_block_size(key_block_size)
    validation.check_routing(routing)
    validation.check_order(order)
    validation.check_exact((exact_prefix, exact_suffix))
    return AttentionParams(
        scale=head_dim**-0.5 if scale is None else scale,
        sparsity=sparsity,
        block_size=block_size,
        key_block_size=key_block_size,
        routing=routing,
        order=order,
        exact=(exact_prefix, exact_suffix),
    )


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
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
    # [B, Tq, H, E] memory: what the models around it reshape to, and what SDPA gives.
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


@attention_with_lse.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)


def dense_flops(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], value_shape: tuple[int, ...]
) -> int:
    """FLOPs of dense attention: the two matrix products, 2 per multiply-add."""
    batch, heads, query_len, head_dim = query_shape
    return 2 * batch * heads * query_len * key_shape[2] * (head_dim + value_shape[3])


def attention_flops(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    params: AttentionParams,
) -> int:
    """FLOPs of the op's matrix products, 2 per multiply-add: routing scores, exact blocks,
    centroids, the first-order matrix with its product, and the variances of "corrected" with the
    mean squares. `threshold` counts its expected density,
    and a density that is data counts as `params.density`.
    """
    batch, heads, query_len, head_dim = query_shape
    key_len, value_dim = key_shape[2], value_shape[3]
    query_size, key_size = params.block_size, params.key_size
    dense = dense_flops(query_shape, key_shape, value_shape)
    if params.sparsity == 0:
        return dense
    first, last = free_key_blocks(key_len, params)
    blocks, query_blocks = block_count(key_len, key_size), block_count(query_len, query_size)
    exact = blocks - (last - first) + exact_block_count(params.density, last - first)
    if query_len == key_len:
        first, last = free_query_blocks(query_len, params)
        sparse_rows = max(0, min(last * query_size, query_len) - first * query_size)
    else:
        sparse_rows = query_len
    per_head = 2 * (
        (query_len - sparse_rows) * key_len * (head_dim + value_dim)
        + sparse_rows * min(exact * key_size, key_len) * (head_dim + value_dim)
        + query_blocks * blocks * head_dim
    )
    if params.order != "none":
        per_head += 2 * sparse_rows * (blocks - exact) * (head_dim + value_dim)
    if params.order == "corrected":
        per_head += 2 * blocks * head_dim
    if params.first_order:
        per_head += 2 * (key_len + sparse_rows) * head_dim * value_dim
    elif params.order == "blockwise":
        products = key_len + sparse_rows * (blocks - exact)
        per_head += 2 * products * head_dim * value_dim
    return batch * heads * per_head


@register_flop_formula([torch.ops.pisa.attention, torch.ops.pisa.attention_with_lse])
def _flop_formula(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    mask_shape: tuple[int, ...] | None = None,
    density_shape: tuple[int, ...] | None = None,
    permutation_shape: tuple[int, ...] | None = None,
    *,
    out_shape: Any = None,
    enable_gqa: bool = False,
    impl: str | None = None,
    **settings: Any,
) -> int:
    params = _params(query_shape[-1], **settings)
    return attention_flops(query_shape, key_shape, value_shape, params)
