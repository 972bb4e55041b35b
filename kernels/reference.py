"""The specification of piecewise sparse attention in plain torch.

Method: PISA (arXiv 2602.01077), with the threshold routing of Sol-Attn (arXiv 2607.24027). Every
other implementation is tested against this file, so it is written to be read, in any float dtype
up to float64 and on any device. It loops over query blocks, which bounds its memory at one
`[B, H, block_size, Tk]` tile of logits.

Shapes: B batch, H query heads, G key/value heads (H is a multiple of G), Tq and Tk tokens,
D head_dim of query and key, E head_dim of value, N key blocks, M query blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .params import (
    MASS_FACTOR_LIMIT,
    ROUTING_WEIGHT,
    AttentionParams,
    block_count,
    exact_block_count,
    exact_block_counts,
    free_key_blocks,
    free_query_blocks,
)
from .permutation import check_values

# Added to a covariance norm before its logarithm; blocks of identical keys have norm zero.
COVARIANCE_EPS = 1e-6


@dataclass(frozen=True)
class BlockStatistics:
    """What the approximation knows of each key block; masked keys count nowhere."""

    length: Tensor  # [B, 1, N]     number of valid keys, b_j
    key_mean: Tensor  # [B, H, N, D]  kbar_j
    value_mean: Tensor  # [B, H, N, E]  vbar_j = Vsum_j / b_j
    centred_key: Tensor  # [B, H, N, block, D]  k_n - kbar_j, zero where masked
    value: Tensor  # [B, H, N, block, E]  zero where masked

    @property
    def valid(self) -> Tensor:  # [B, 1, N]
        return self.length > 0

    def first_order(self) -> Tensor:
        """`H = sum_j (K_j - kbar_j)^T V_j` without forming any block's own matrix. [B, H, D, E]"""
        return self.centred_key.flatten(2, 3).transpose(-1, -2) @ self.value.flatten(2, 3)

    def first_order_per_block(self) -> Tensor:
        """`H_j` of every block. [B, H, N, D, E]"""
        return self.centred_key.transpose(-1, -2) @ self.value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Piecewise sparse attention.

    Args:
        query: [B, H, Tq, D].
        key: [B, G, Tk, D].
        value: [B, G, Tk, E].
        key_mask: boolean [B, Tk], True where a key takes part, or None.
        params: validated settings.
        density: float32 [] or [H], the fraction of blocks that is exact, per head; it takes the
            place of `params.density`, and 1 or more is dense attention.
        permutation: integer [T], the order in which the tokens of self-attention are cut into
            blocks: place i holds token `permutation[i]`. The exact ranges count places.

    Returns:
        Output [B, H, Tq, E] in the query's dtype, in [B, Tq, H, E] memory order, and the natural
        log-sum-exp [B, H, Tq] of the approximated denominator in float32. Rows that have no valid
        key give zeros and -inf.
    """
    if permutation is not None:
        return _in_order(query, key, value, key_mask, params, density, permutation)
    batch, heads, query_len, _ = query.shape
    out = query.new_empty(batch, query_len, heads, value.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, heads, query_len, dtype=torch.float32, device=query.device)
    if lse.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    dtype = torch.promote_types(query.dtype, torch.float32)
    size = params.block_size
    q = query.to(dtype)
    k = key.to(dtype).repeat_interleave(heads // key.shape[1], dim=1)
    v = value.to(dtype).repeat_interleave(heads // value.shape[1], dim=1)
    if key_mask is None:
        key_mask = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)

    stats = block_statistics(k, v, key_mask, params.key_size)
    kv_heads = key.shape[1]
    selected = route(q, stats, key.shape[2], params, density, kv_heads=kv_heads)  # [B, H, M, N]
    first_order = _first_order_matrix(stats, params)
    log_weight = block_log_weight(q, stats, params, kv_heads)
    key_block = torch.arange(key.shape[2], device=key.device) // params.key_size

    for i in range(block_count(query_len, size)):
        rows = slice(i * size, (i + 1) * size)
        exact = selected[:, :, i, :]  # [B, H, N]
        token_logit = params.scale * (q[:, :, rows] @ k.transpose(-1, -2))
        token_logit = token_logit.masked_fill(
            ~(exact[..., key_block] & key_mask[:, None])[:, :, None], -torch.inf
        )
        block_logit = params.scale * (q[:, :, rows] @ stats.key_mean.transpose(-1, -2))
        approximated = stats.valid & ~exact
        if params.order == "none":
            approximated = torch.zeros_like(approximated)
        block_logit = block_logit + log_weight[:, :, None]
        block_logit = block_logit.masked_fill(~approximated[:, :, None], -torch.inf)

        # One softmax over the selected tokens and the centroids of all other blocks.
        logit = torch.cat([token_logit, block_logit], dim=-1)
        # Not exp(logit - logsumexp): among logits of 1e8 the sum's logarithm is below rounding.
        log_sum = logit.logsumexp(dim=-1)
        no_key = (log_sum == -torch.inf)[..., None]
        weight = logit.softmax(dim=-1).masked_fill(no_key, 0.0)
        token_weight, block_weight = weight[..., : k.shape[2]], weight[..., k.shape[2] :]
        block_out = token_weight @ v.masked_fill(~key_mask[:, None, :, None], 0.0)
        block_out = block_out + block_weight @ stats.value_mean
        if params.first_order:
            valid_keys = stats.length.sum(-1).clamp(min=1)[..., None, None]  # [B, 1, 1, 1]
            tail_mass = block_weight.sum(-1, keepdim=True) / valid_keys
            block_out = block_out + tail_mass * (params.scale * q[:, :, rows]) @ first_order
        elif params.order == "blockwise":
            # exp(s(q, kbar_j)) is the block's weight divided by its length.
            mass = block_weight / stats.length.clamp(min=1)[:, :, None]
            block_out = block_out + torch.einsum(
                "bhtn,bhtd,bhnde->bhte", mass, params.scale * q[:, :, rows], first_order
            )
        out[:, :, rows] = block_out.to(query.dtype)
        lse[:, :, rows] = log_sum.to(torch.float32)
    return out, lse


def _in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    density: Tensor | None,
    permutation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of the permuted tokens, its rows back in the tokens' own places."""
    check_values(permutation)
    query, key, value = (x[:, :, permutation] for x in (query, key, value))
    key_mask = None if key_mask is None else key_mask[:, permutation]
    permuted, permuted_lse = attention(query, key, value, key_mask, params, density=density)
    out, lse = torch.empty_like(permuted), torch.empty_like(permuted_lse)
    out[:, :, permutation] = permuted
    lse[:, :, permutation] = permuted_lse
    return out, lse


def block_log_weight(
    q: Tensor, stats: BlockStatistics, params: AttentionParams, kv_heads: int
) -> Tensor:
    """Logarithm of the mass of each block in units of `exp(s(q, kbar_j))`. [B, 1 or H, N]"""
    log_weight = stats.length.clamp(min=1).to(q.dtype).log()  # [B, 1, N]
    if params.order == "corrected":
        log_weight = log_weight + tail_mass_correction(q, stats, params.scale, kv_heads)
    return log_weight


def tail_mass_correction(q: Tensor, stats: BlockStatistics, scale: float, kv_heads: int) -> Tensor:
    """Logarithm of the factor by which the scatter of its keys raises a block's mass. [B, H, N]

    The Taylor series of `mean_n exp(s(q, k_n - kbar_j))` up to second order is 1 + 0 + beta with
    `beta = 1/2 scale^2 q^T Cov_j q`. This takes the diagonal of the covariance, and the mean of
    `q_d^2` over all queries that share the key head: one number per key head and block. It is
    limited, because an expansion says little where the scatter is not small.
    """
    batch, heads, tokens, head_dim = q.shape
    group = q.view(batch, kv_heads, heads // kv_heads, tokens, head_dim)
    energy = group.square().mean(dim=(2, 3)).repeat_interleave(heads // kv_heads, dim=1)
    length = stats.length.clamp(min=1)[..., None]
    variance = stats.centred_key.square().sum(dim=3) / length  # [B, H, N, D]
    beta = 0.5 * scale**2 * (variance @ energy[..., None])[..., 0]
    # Written so that a beta that has overflowed meets the limit too, NaN (0 * inf) included.
    return torch.where(beta < MASS_FACTOR_LIMIT - 1, beta.log1p(), math.log(MASS_FACTOR_LIMIT))


def block_statistics(k: Tensor, v: Tensor, key_mask: Tensor, size: int) -> BlockStatistics:
    """Means and centred keys of the blocks of `k` [B, H, Tk, D] and `v` [B, H, Tk, E]."""
    batch, heads, tokens, _ = k.shape
    blocks = block_count(tokens, size)
    pad = blocks * size - tokens
    valid = torch.nn.functional.pad(key_mask, (0, pad)).view(batch, 1, blocks, size, 1)
    # masked_fill and not a product: a masked key may hold anything, NaN included.
    k = torch.nn.functional.pad(k, (0, 0, 0, pad)).view(batch, heads, blocks, size, -1)
    v = torch.nn.functional.pad(v, (0, 0, 0, pad)).view(batch, heads, blocks, size, -1)
    k, v = k.masked_fill(~valid, 0.0), v.masked_fill(~valid, 0.0)
    length = valid.sum(dim=(3, 4))
    divisor = length.clamp(min=1)[..., None]
    key_mean = k.sum(dim=3) / divisor
    return BlockStatistics(
        length=length,
        key_mean=key_mean,
        value_mean=v.sum(dim=3) / divisor,
        centred_key=(k - key_mean[:, :, :, None]).masked_fill(~valid, 0.0),
        value=v,
    )


def route(
    q: Tensor,
    stats: BlockStatistics,
    key_len: int,
    params: AttentionParams,
    density: Tensor | None = None,
    *,
    kv_heads: int | None = None,
) -> Tensor:
    """The exact set S_i of every query block, boolean [B, H, M, N].

    Blocks that overlap the exact prefix or suffix are always in it; `sparsity` (or `density`, []
    or [H]) applies to the remaining ("free") blocks. Blocks without a valid key are never in it.
    `kv_heads` is the number of distinct heads in `stats`, by default all.
    """
    batch, heads, query_len, _ = q.shape
    blocks, query_blocks = stats.length.shape[-1], block_count(query_len, params.block_size)
    selected = torch.ones(batch, heads, query_blocks, blocks, dtype=torch.bool, device=q.device)
    first, last = free_key_blocks(key_len, params)
    if first < last:
        fraction, count = _budget(density, last - first, params, q.device)
        valid = stats.valid[:, :, None, first:last]
        score = _proxy_score(q, stats, params, kv_heads or heads)[..., first:last]
        score = score.masked_fill(~valid, -torch.inf)
        if params.routing == "threshold":
            chosen = _above_threshold(score, valid, fraction)
        else:
            ranked = score.argsort(dim=-1, descending=True, stable=True)
            rank = torch.empty_like(ranked).scatter_(
                -1, ranked, torch.arange(last - first, device=q.device).expand_as(ranked)
            )
            chosen = rank < count
        selected[..., first:last] = chosen | (fraction >= 1)
    if query_len == key_len and params.exact != (0, 0):
        first, last = free_query_blocks(query_len, params)
        selected[:, :, :first] = True
        selected[:, :, last:] = True
    return selected & stats.valid[:, :, None]


def _budget(
    density: Tensor | None, blocks: int, params: AttentionParams, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Fraction and number of exact blocks out of `blocks`, per head: [1 or H, 1, 1] each."""
    if density is None:
        count = exact_block_count(params.density, blocks)
        return (
            torch.full((1, 1, 1), params.density, dtype=torch.float64, device=device),
            torch.full((1, 1, 1), count, device=device),
        )
    fraction = density.to(torch.float64).reshape(-1, 1, 1)
    return fraction, exact_block_counts(fraction, blocks)


def _proxy_score(
    q: Tensor, stats: BlockStatistics, params: AttentionParams, kv_heads: int
) -> Tensor:
    """`scale * qbar_i . kbar_j`, plus a term for each key block where asked for. [B, H, M, N]

    The error of approximating a block grows with its mass and once more with the scatter of its
    keys. Order "corrected" knows both, so there the log weight of the block counts twice.
    """
    size = params.block_size
    tokens = q.shape[2]
    pad = block_count(tokens, size) * size - tokens
    rows = torch.full((block_count(tokens, size),), size, device=q.device)
    rows[-1] -= pad
    padded = torch.nn.functional.pad(q, (0, 0, 0, pad))
    query_mean = padded.view(*q.shape[:2], len(rows), size, q.shape[3]).sum(3)
    query_mean = query_mean / rows[:, None]
    score = params.scale * (query_mean @ stats.key_mean.transpose(-1, -2))
    if params.routing == "topk_covariance":
        per_block = stats.first_order_per_block()
        valid_blocks = stats.valid.sum(-1).clamp(min=1)[..., None, None]
        mean = per_block.sum(2) / valid_blocks
        norm = (per_block - mean[:, :, None]).flatten(-2).norm(dim=-1)  # [B, H, N]
        score = score + (norm + COVARIANCE_EPS).log()[:, :, None]
    elif params.weighs_routing:
        log_weight = block_log_weight(q, stats, params, kv_heads)
        score = score + ROUTING_WEIGHT * log_weight[:, :, None]
    return score


def _above_threshold(score: Tensor, valid: Tensor, density: Tensor) -> Tensor:
    """Blocks whose score exceeds `mu + beta * sigma` of their row, and always the best one.

    `beta` is such that a normal distribution has the fraction `density` [H, 1, 1] above it.
    """
    beta: Tensor = torch.special.ndtri(1 - density.clamp(0, 1)).to(score.dtype)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    finite = score.masked_fill(~valid, 0.0)
    mean = finite.sum(-1, keepdim=True) / count
    deviation = (finite - mean).masked_fill(~valid, 0.0)
    sigma = (deviation.square().sum(-1, keepdim=True) / count).sqrt()
    best = torch.zeros_like(score, dtype=torch.bool).scatter(
        -1, score.argmax(-1, keepdim=True), True
    )
    return (score > mean + beta * sigma) | best


def _first_order_matrix(stats: BlockStatistics, params: AttentionParams) -> Tensor:
    if params.first_order:
        return stats.first_order()
    return stats.first_order_per_block() if params.order == "blockwise" else stats.key_mean
