"""The specification against an independent loop over single queries, and its properties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from attention_cases import one_hot_inputs
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import (
    ORDERS,
    ROUTINGS,
    AttentionParams,
    exact_block_count,
    exact_block_counts,
    free_key_blocks,
    free_query_blocks,
)
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2

PARAMS = AttentionParams(scale=0.25, sparsity=0.6, block_size=16)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose to several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def double_inputs(**kwargs: Any) -> Inputs:
    return random_inputs(**{"head_dim": 16, **kwargs}).to(torch.float64)


def naive(
    inputs: Inputs, params: AttentionParams, density: list[float] | None = None
) -> tuple[Tensor, Tensor]:
    """PISA's formulas (arXiv 2602.01077, section 3) one query at a time, in float64.

    `density` replaces `params.density` for each head.
    """
    query, key, value, mask = inputs.astuple()
    batch, heads, query_len, _ = query.shape
    out = torch.zeros(batch, heads, query_len, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, query_len), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        valid = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[b]
        for h in range(heads):
            group = heads // key.shape[1]
            g = h // group
            peers = query[b, g * group : (g + 1) * group].flatten(0, 1)
            share = params.density if density is None else density[h]
            k, v = key[b, g], value[b, g]
            naive_head(query[b, h], k, v, valid, params, share, peers, out[b, h], lse[b, h])
    return out, lse


def naive_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    params: AttentionParams,
    density: float,
    peers: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    size, scale = params.block_size, params.scale
    key_size = params.key_block_size or size
    blocks = []  # the valid tokens of each key block
    for start in range(0, len(k), key_size):
        tokens = torch.arange(start, min(start + key_size, len(k)))
        blocks.append(tokens[valid[tokens]])
    filled = [j for j, tokens in enumerate(blocks) if len(tokens)]
    if not filled:
        return
    mean = {j: k[blocks[j]].mean(0) for j in filled}
    matrix = {j: (k[blocks[j]] - mean[j]).T @ v[blocks[j]] for j in filled}
    all_matrices = sum(matrix.values(), torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype))
    factor = dict.fromkeys(filled, 1.0)  # on the mass of a block
    if params.order == "corrected":
        for j in filled:
            # The mean over queries and keys of the second-order term, one channel at a time.
            logits = scale * peers[:, None] * (k[blocks[j]] - mean[j])  # [queries, keys, D]
            factor[j] = min(8.0, 1.0 + 0.5 * float(logits.square().sum(-1).mean()))
    tokens_in_all = sum(len(blocks[j]) for j in filled)
    for start in range(0, len(q), size):
        rows = range(start, min(start + size, len(q)))
        weight = {j: len(blocks[j]) * factor[j] for j in filled}
        exact = naive_exact_set(
            q, len(k), start, mean, matrix, weight, len(blocks), params, density
        )
        for t in rows:
            numerator = torch.zeros(v.shape[1], dtype=torch.float64)
            denominator, tail = 0.0, 0.0
            for j in filled:
                if j in exact:
                    weights = (scale * (k[blocks[j]] @ q[t])).exp()
                    numerator += weights @ v[blocks[j]]
                    denominator += float(weights.sum())
                elif params.order != "none":
                    weight = factor[j] * math.exp(scale * float(q[t] @ mean[j]))
                    numerator += weight * v[blocks[j]].sum(0)
                    if params.order == "blockwise":
                        numerator += weight * scale * (q[t] @ matrix[j])
                    tail += weight * len(blocks[j])
            if params.order in ("hybrid", "corrected"):
                numerator += tail / tokens_in_all * scale * (q[t] @ all_matrices)
            out[t] = numerator / (denominator + tail)
            lse[t] = math.log(denominator + tail)


def naive_exact_set(
    q: Tensor,
    key_len: int,
    start: int,
    mean: dict[int, Tensor],
    matrix: dict[int, Tensor],
    weight: dict[int, float],
    blocks: int,
    params: AttentionParams,
    density: float,
) -> set[int]:
    size = params.key_block_size or params.block_size
    prefix, suffix = params.exact
    end = min(start + params.block_size, len(q))
    if len(q) == key_len and (start < prefix or (suffix and end > key_len - suffix)):
        return set(mean)
    forced = {
        j
        for j in range(blocks)
        if j * size < prefix or (suffix and min((j + 1) * size, key_len) > key_len - suffix)
    }
    free = [j for j in range(blocks) if j not in forced]
    if density >= 1 or not free:
        return set(mean)
    centroid = q[start:end].mean(0)
    score = {j: params.scale * float(centroid @ mean[j]) for j in free if j in mean}
    if params.routing == "topk_covariance":
        average = sum(matrix.values(), torch.zeros_like(matrix[next(iter(mean))])) / len(mean)
        for j in score:
            score[j] += math.log(float((matrix[j] - average).norm()) + 1e-6)
    if params.routing == "topk" and params.order == "corrected":
        for j in score:  # by mass, and by how wrong the mass without correction would be
            score[j] += 2 * math.log(weight[j])
    ranked = sorted(score, key=lambda j: -score[j])
    if params.routing == "threshold":
        mu = sum(score.values()) / max(1, len(score))
        sigma = math.sqrt(sum((x - mu) ** 2 for x in score.values()) / max(1, len(score)))
        threshold = mu + NormalDist().inv_cdf(1 - density) * sigma
        chosen = {j for j in score if score[j] > threshold} | set(ranked[:1])
    else:
        chosen = set(ranked[: max(1, math.ceil(density * len(free) - 1e-6))])
    return (chosen | forced) & set(mean)


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["unmasked", "masked"])
@pytest.mark.parametrize("key_block_size", [None, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_formulas(routing: str, order: str, key_block_size: int | None, masked: float) -> None:
    inputs = double_inputs(query_len=75, head_dim=8, value_dim=5, heads=2, masked=masked, seed=3)
    params = replace(PARAMS, routing=routing, order=order, key_block_size=key_block_size)
    out, lse = reference.attention(*inputs.astuple(), params)
    expected, expected_lse = naive(inputs, params)
    assert relative_l2(out, expected) < 1e-12
    assert (lse - expected_lse).abs().max() < 1e-6  # lse is float32


@pytest.mark.parametrize(
    ("shape", "exact"),
    [
        ({"query_len": 75}, (20, 0)),
        ({"query_len": 75}, (0, 20)),
        ({"query_len": 80}, (16, 5)),
        ({"query_len": 40, "key_len": 90}, (20, 7)),
        ({"query_len": 90, "key_len": 33}, (0, 0)),
        ({"query_len": 33, "heads": 4, "kv_heads": 2, "batch": 2}, (0, 0)),
        ({"query_len": 70}, (200, 0)),
    ],
    ids=["prefix", "suffix", "both", "cross-exact", "cross", "grouped", "all-exact"],
)
def test_formulas_for_lengths_and_exact_tokens(
    shape: dict[str, int], exact: tuple[int, int]
) -> None:
    inputs = double_inputs(head_dim=8, seed=5, **shape)
    params = replace(PARAMS, exact=exact)
    out, lse = reference.attention(*inputs.astuple(), params)
    expected, expected_lse = naive(inputs, params)
    assert relative_l2(out, expected) < 1e-12
    assert (lse - expected_lse).abs().max() < 1e-6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("exact", [(0, 0), (20, 9)], ids=["free", "exact-tokens"])
def test_permutation_and_density_for_each_head(
    routing: str, order: str, exact: tuple[int, int]
) -> None:
    """As if the tokens had been permuted by hand, with grouped queries and masked keys."""
    inputs = double_inputs(
        query_len=61, head_dim=8, value_dim=5, heads=4, kv_heads=2, batch=2, masked=0.3, seed=8
    )
    query, key, value, mask = inputs.astuple()
    assert mask is not None
    mask[1, 16:32] = False
    tokens = torch.randperm(61, generator=torch.Generator().manual_seed(2))
    density = torch.tensor([0.3, 0.75, 1.0, 0.1])
    params = replace(PARAMS, routing=routing, order=order, exact=exact)
    out, lse = reference.attention(
        *inputs.astuple(), params, density=density, permutation=tokens.int()
    )
    moved = Inputs(query[:, :, tokens], key[:, :, tokens], value[:, :, tokens], mask[:, tokens])
    expected, expected_lse = naive(moved, params, density.tolist())
    assert relative_l2(out[:, :, tokens], expected) < 1e-12
    assert (lse[:, :, tokens] - expected_lse).abs().max() < 1e-6
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("density", [1 / 16, 0.25, 0.7])
def test_density_is_the_complement_of_sparsity(routing: str, density: float) -> None:
    inputs = double_inputs(query_len=160)
    params = replace(PARAMS, routing=routing)
    expected, _ = reference.attention(*inputs.astuple(), replace(params, sparsity=1 - density))
    for tensor in (torch.tensor(density), torch.full((2,), density)):
        out, _ = reference.attention(*inputs.astuple(), params, density=tensor)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("density", [0.9, 0.1, 0.3, 0.05, 1 / 3, 0.07, 1e-9, 1.0, 2.0])
def test_a_float32_density_counts_the_same_blocks(density: float) -> None:
    """Rounded up, but 30 % of 10 blocks are 3, although the nearest float32 is above 0.3."""
    for blocks in (1, 9, 10, 30, 100, 1000, 2100):
        counted = exact_block_counts(torch.tensor([density]).double(), blocks)
        assert int(counted) == exact_block_count(density, blocks)


def test_bad_permutations_are_refused() -> None:
    inputs = double_inputs(query_len=40)
    tokens = torch.arange(40)
    for change, words in ((40, "from 1 to 40"), (-1, "from -1 to 39"), (7, "1 of them not at all")):
        wrong = tokens.clone()
        wrong[0] = change
        with pytest.raises(ValueError, match=f"every token from 0 to 39 once, got .*{words}"):
            reference.attention(*inputs.astuple(), PARAMS, permutation=wrong)


def test_correction_brings_the_mass_closer() -> None:
    """Against the true denominator, for keys that scatter around the means of their blocks."""
    inputs = double_inputs(query_len=512, head_dim=16, seed=2)
    params = replace(PARAMS, sparsity=0.9)
    query, key, _, _ = inputs.astuple()
    dense = (params.scale * query @ key.mT).logsumexp(-1)
    error = {}
    for order in ("hybrid", "corrected"):
        _, lse = reference.attention(*inputs.astuple(), replace(params, order=order))
        error[order] = float((lse - dense).abs().mean())
    assert error["corrected"] < 0.5 * error["hybrid"]


def test_correction_is_limited() -> None:
    """One key far from the others: its block counts for eight times its mean, not more."""
    inputs = double_inputs(query_len=64, seed=3)
    key = inputs.key.clone()
    key[:, :, 20] *= 1e3
    mask = torch.ones(1, 64, dtype=torch.bool)
    stats = reference.block_statistics(key, inputs.value, mask, 16)
    bias = reference.tail_mass_correction(inputs.query, stats, 0.25, 2)
    torch.testing.assert_close(bias[:, :, 1], torch.full((1, 2), math.log(8)).double())
    assert (bias[:, :, [0, 2, 3]] < math.log(8)).all()
    assert (bias > 0).all()
    alone = reference.block_statistics(key, inputs.value, mask, 1)
    assert (reference.tail_mass_correction(inputs.query, alone, 0.25, 2) == 0).all()
    beyond = reference.block_statistics(1e200 * key, inputs.value, mask, 16)
    bias = reference.tail_mass_correction(0 * inputs.query, beyond, 0.25, 2)  # inf * 0
    torch.testing.assert_close(bias, torch.full_like(bias, math.log(8)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_no_sparsity_is_dense_attention(routing: str, order: str) -> None:
    inputs = double_inputs(query_len=90, key_len=150, heads=4, kv_heads=2, batch=2, masked=0.3)
    params = replace(PARAMS, sparsity=0.0, routing=routing, order=order)
    out, lse = reference.attention(*inputs.astuple(), params)
    query, key, value, mask = inputs.astuple()
    assert mask is not None
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask[:, None, None], scale=params.scale, enable_gqa=True
    )
    logits = params.scale * query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)
    dense_lse = logits.masked_fill(~mask[:, None, None], -torch.inf).logsumexp(-1)
    assert relative_l2(out, dense) < 1e-13
    assert (lse - dense_lse).abs().max() < 1e-6


@pytest.mark.parametrize("order", ["zeroth", "hybrid", "corrected", "blockwise"])
def test_keys_constant_per_block_give_the_dense_result(order: str) -> None:
    inputs = double_inputs(query_len=130, seed=1)
    key = inputs.key[:, :, ::16].repeat_interleave(16, dim=2)[:, :, :130]
    params = replace(PARAMS, sparsity=0.8, order=order)
    out, _ = reference.attention(inputs.query, key, inputs.value, None, params)
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, key, inputs.value, scale=params.scale
    )
    assert relative_l2(out, dense) < 1e-13
    dropped, _ = reference.attention(
        inputs.query, key, inputs.value, None, replace(params, order="none")
    )
    assert relative_l2(dropped, dense) > 1e-2  # so the approximation is what made them equal


@pytest.mark.parametrize("routing", ROUTINGS)
def test_batch_and_heads_are_independent(routing: str) -> None:
    inputs = double_inputs(query_len=100, batch=3, heads=4, masked=0.2)
    params = replace(PARAMS, routing=routing)
    out, lse = reference.attention(*inputs.astuple(), params)
    assert inputs.key_mask is not None
    batch, head = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    shuffled = (x[batch][:, head] for x in (inputs.query, inputs.key, inputs.value))
    again, lse_again = reference.attention(*shuffled, inputs.key_mask[batch], params)
    torch.testing.assert_close(again, out[batch][:, head], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse_again, lse[batch][:, head])
    assert relative_l2(again, out) > 0.1  # the permutation did something


@pytest.mark.parametrize("order", ORDERS)
def test_masking_blocks_is_removing_them(order: str) -> None:
    inputs = double_inputs(query_len=48, key_len=8 * 16)
    keep = torch.ones(8, dtype=torch.bool)
    keep[[1, 4]] = False
    tokens = keep.repeat_interleave(16)
    params = replace(PARAMS, sparsity=0.75, order=order)  # two exact blocks of 8 as of 6
    out, lse = reference.attention(inputs.query, inputs.key, inputs.value, tokens[None], params)
    expected, expected_lse = reference.attention(
        inputs.query, inputs.key[:, :, tokens], inputs.value[:, :, tokens], None, params
    )
    assert relative_l2(out, expected) < 1e-13
    torch.testing.assert_close(lse, expected_lse)


def test_masked_keys_do_not_leak_and_empty_rows_are_zero() -> None:
    inputs = double_inputs(query_len=60, batch=2, masked=0.5)
    assert inputs.key_mask is not None
    inputs.key_mask[1] = False
    out, lse = reference.attention(*inputs.astuple(), PARAMS)
    poison = ~inputs.key_mask[:, None, :, None]
    poisoned = (x.masked_fill(poison, torch.nan) for x in (inputs.key, inputs.value))
    again, _ = reference.attention(inputs.query, *poisoned, inputs.key_mask, PARAMS)
    assert torch.equal(out, again)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert torch.isfinite(lse[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = random_inputs(query_len=100, dtype=dtype)
    out, lse = reference.attention(*inputs.astuple(), PARAMS)
    expected, expected_lse = reference.attention(*inputs.to(torch.float64).astuple(), PARAMS)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert relative_l2(out, expected) <= 1.05 * relative_l2(expected.to(dtype), expected) + 1e-6
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["zeroth", "hybrid", "corrected", "blockwise"])
def test_maximum_in_an_unselected_block(order: str) -> None:
    """Queries that point elsewhere than their block's mean find their maximum in the tail."""
    inputs = double_inputs(query_len=64, key_len=96, heads=1, head_dim=8)
    inputs.query[:, :, 5] *= -40.0
    params = replace(PARAMS, order=order, sparsity=0.7)
    out, _ = reference.attention(*inputs.astuple(), params)
    expected, _ = naive(inputs, params)
    assert torch.isfinite(out).all()
    assert relative_l2(out[:, :, 5], expected[:, :, 5]) < 1e-12


@pytest.mark.parametrize("order", ["zeroth", "hybrid", "corrected", "blockwise"])
def test_entries_of_ten_thousand(order: str) -> None:
    """Logits of 1e8: each query attends to the keys that equal it and to nothing else."""
    inputs, expected = one_hot_inputs(torch.float64)
    params = AttentionParams(scale=1.0, sparsity=0.5, block_size=16, order=order)
    out, lse = reference.attention(*inputs.astuple(), params)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, torch.full_like(lse, 1e8) + math.log(16))


@pytest.mark.parametrize("routing", ["topk", "topk_covariance"])
@pytest.mark.parametrize(
    ("sparsity", "blocks", "count"),
    [(0.9, 10, 1), (0.9, 11, 2), (0.875, 64, 8), (0.99, 5, 1), (0.5, 5, 3), (0.1, 10, 9)],
)
def test_size_of_the_exact_set(routing: str, sparsity: float, blocks: int, count: int) -> None:
    """max(1, ceil(density * N)), where 0.1 * 10 is one block whatever its rounding."""
    inputs = double_inputs(query_len=40, key_len=16 * blocks)
    params = replace(PARAMS, sparsity=sparsity, routing=routing)
    selected = routed(inputs, params)
    assert exact_block_count(params.density, blocks) == count
    assert (selected.sum(-1) == count).all()


def test_size_of_the_exact_set_with_exact_tokens() -> None:
    inputs = double_inputs(query_len=160, key_len=160)
    params = replace(PARAMS, sparsity=0.75, exact=(20, 16))
    first, last = free_key_blocks(160, params)
    assert (first, last) == free_query_blocks(160, params) == (2, 9)
    selected = routed(inputs, params)
    assert selected[..., [0, 1, 9]].all()
    assert (selected[:, :, 2:9].sum(-1) == 3 + 2).all()  # ceil(0.25 * 7) of the free blocks
    assert selected[:, :, [0, 1, 9]].all()  # text queries attend densely


def test_exact_tokens_where_key_blocks_are_smaller() -> None:
    """Keys and queries are rounded to blocks of their own size."""
    inputs = double_inputs(query_len=320, key_len=320)
    params = replace(PARAMS, sparsity=0.75, block_size=64, key_block_size=16, exact=(70, 20))
    assert free_key_blocks(320, params) == (5, 18)
    assert free_query_blocks(320, params) == (2, 4)
    selected = routed(inputs, params)
    assert selected.shape[2:] == (5, 20)
    assert selected[..., :5].all()
    assert selected[..., 18:].all()
    assert (selected[:, :, 2:4, 5:18].sum(-1) == 4).all()  # ceil(0.25 * 13) of the free blocks
    assert selected[:, :, [0, 1, 4]].all()  # text queries attend densely


@pytest.mark.parametrize("sparsity", [0.84, 0.93])
def test_threshold_density_is_close_to_the_one_asked_for(sparsity: float) -> None:
    """Normal scores: the fraction above mu + beta * sigma is 1 - Phi(beta)."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 400 * 16, 8, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 1, 800, 8, generator=generator, dtype=torch.float64)
    inputs = Inputs(query, key, key, None)
    selected = routed(inputs, replace(PARAMS, sparsity=sparsity, routing="threshold"))
    assert abs(float(selected.double().mean()) - (1 - sparsity)) < 0.01


def test_of_two_blocks_that_score_alike_the_scattered_one_is_exact() -> None:
    """Because its mean says least about it; only order "corrected" knows the scatter."""
    inputs = double_inputs(query_len=48, heads=1, seed=4)
    key = inputs.key.clone()
    key[:, :, :16] = key[:, :, :1]
    offset = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key[:, :, 16:32] = 0.99 * key[:, :, :1] + torch.cat([offset, -offset])
    inputs = replace(inputs, key=key, query=key[:, :, :1].expand(1, 1, 48, 16))
    for order, chosen in (("hybrid", 0), ("corrected", 1)):
        selected = routed(inputs, replace(PARAMS, sparsity=0.7, order=order))[0, 0]
        assert selected.nonzero()[:, 1].tolist() == [chosen] * 3


def routed(inputs: Inputs, params: AttentionParams) -> Tensor:
    """The exact sets [B, H, M, N] of unmasked inputs."""
    mask = torch.ones(inputs.key.shape[0], inputs.key.shape[2], dtype=torch.bool)
    stats = reference.block_statistics(inputs.key, inputs.value, mask, params.key_size)
    return reference.route(inputs.query, stats, inputs.key.shape[2], params)
