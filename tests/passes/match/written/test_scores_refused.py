"""What scores do before their softmax that makes them another attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from .cases import B, Cases, H, NearMiss, T, check_dense, keys, name_of

cases = Cases()


@cases.near_miss("`tanh` stands between the product of query and key and its softmax")
def scores_capped(q, k, v):
    return (10 * torch.tanh(q @ k.mT / 10)).softmax(-1) @ v


@cases.near_miss("`clamp` stands between the product of query and key and its softmax")
def scores_clamped(q, k, v):
    return (q @ k.mT).clamp(min=-5).softmax(-1) @ v


@cases.near_miss("relative positions or ALiBi")
def relative_position_bias(q, k, v):
    position = torch.arange(T, dtype=torch.float)
    return (q @ k.mT + (position[:, None] - position[None]).sin()).softmax(-1) @ v


@cases.near_miss("relative positions or ALiBi")
def alibi(q, k, v):
    slope = 2.0 ** -torch.arange(1, H + 1)
    return (q @ k.mT + slope[:, None, None] * torch.arange(T)).softmax(-1) @ v


@cases.near_miss("relative positions or ALiBi")
def bias_from_a_second_product(q, k, v):
    return (q @ k.mT + q @ v.mT).softmax(-1) @ v


@cases.near_miss("varies over queries")
def causal(q, k, v):
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@cases.near_miss("differs between heads")
def mask_per_batch_and_head(q, k, v):
    allowed = torch.rand(B, H, 1, T) > -1
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@cases.near_miss("filled with 0 where masked")
def scores_zeroed(q, k, v):
    return (q @ k.mT).masked_fill(~keys()[:, None, None], 0.0).softmax(-1) @ v


@cases.near_miss("filled with 1e+09 where masked")
def masked_scores_negated(q, k, v):
    return (-(q @ k.mT).masked_fill(~keys()[:, None, None], -1e9)).softmax(-1) @ v


@cases.near_miss("filled with -10 where masked")
def masked_scores_scaled_down(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -10000.0)
    return (scores / 1000).softmax(-1) @ v


@cases.near_miss("add -inf to remove a key")
def added_mask_scaled_down(q, k, v):
    bias = (1 - keys().float())[:, None, None] * -10000.0
    return ((q @ k.mT + bias) / 1000).softmax(-1) @ v


@cases.near_miss("add -inf to remove a key")
def baddbmm_mask_scaled_down(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = ((1 - keys().float()) * -10000.0).repeat_interleave(H, 0)[:, None]
    return (torch.baddbmm(bias, q, k.mT) / 1000).softmax(-1) @ v


@cases.near_miss("`mul` stands")
def masked_scores_scaled_by_a_tensor(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -10000.0)
    return (scores * torch.full((1,), 0.001)).softmax(-1) @ v


@cases.near_miss("scales its scores differently per key")
def temperature_per_key(q, k, v):
    return (q @ k.mT * torch.arange(1.0, T + 1)).softmax(-1) @ v


@cases.near_miss("`setitem` stands")
def scores_partly_overwritten(q, k, v):
    scores = q @ k.mT
    scores[:, :, :, 15:] = -1e9
    return scores.softmax(-1) @ v


@cases.near_miss("has another shape than the scores")
def mask_that_is_larger_than_the_scores(q, k, v):
    bias = torch.zeros(B, 1, 1, T).masked_fill(~keys()[:, None, None], -math.inf)
    return (q[:1] @ k[:1].mT + bias).softmax(-1) @ v


@cases.near_miss("multiplies its mask by a tensor too")
def factor_per_head_after_a_mask(q, k, v):
    bias = torch.zeros(B, 1, 1, T).masked_fill(~keys()[:, None, None], -1e4)
    return ((q @ k.mT + bias) * (1e-4 * v.new_ones(H, 1, 1))).softmax(-1) @ v


@cases.near_miss("multiplies its mask by a tensor too")
def divided_per_head_after_a_fill(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -1e4)
    return (scores / (1e4 * v.new_ones(H, 1, 1))).softmax(-1) @ v


@cases.near_miss("scales its scores differently per key")
def divided_per_key(q, k, v):
    return (q @ k.mT / torch.arange(1.0, T + 1)).softmax(-1) @ v


@cases.near_miss("scales its scores differently per key")
def multiplied_by_a_boolean_mask(q, k, v):
    return (q @ k.mT * keys()[:, None, None]).softmax(-1) @ v


@cases.near_miss("something is divided by its scores")
def number_divided_by_scores(q, k, v):
    return torch.div(torch.ones(T), q @ k.mT).softmax(-1) @ v


@cases.near_miss("something is divided by its scores")
def one_divided_by_scores(q, k, v):
    return (1 / (q @ k.mT)).softmax(-1) @ v


@cases.near_miss("`div` stands")
def scores_divided_and_rounded(q, k, v):
    return torch.div(q @ k.mT, 0.25, rounding_mode="floor").softmax(-1) @ v


@cases.near_miss("`floordiv` stands")
def scores_divided_without_remainder(q, k, v):
    return (q @ k.mT // 0.25).softmax(-1) @ v


@cases.near_miss("`mul` stands")
def scores_squared(q, k, v):
    scores = q @ k.mT
    return (scores * scores).softmax(-1) @ v


@cases.near_miss("multiplies its scores by 0")
def scores_multiplied_by_zero(q, k, v):
    return (q @ k.mT * 0).softmax(-1) @ v


@cases.near_miss("multiplies its scores by 0")
def scores_subtracted_from_themselves(q, k, v):
    scores = q @ k.mT
    return (scores - scores).softmax(-1) @ v


@cases.near_miss("`addcmul` stands")
def scores_plus_a_product(q, k, v):
    return torch.addcmul(q @ k.mT, v[0, 0, :, 0], v[0, 0, :, 1]).softmax(-1) @ v


@cases.near_miss("is added to all its scores")
def large_number_added(q, k, v):
    """In float32 all scores are the same afterwards."""
    return (q @ k.mT + 1e9).softmax(-1) @ v


@cases.near_miss("is added to all scores of a row")
def large_numbers_added_to_rows(q, k, v):
    rows = torch.zeros(T).masked_fill(torch.arange(T) > 15, -1e9)
    return (q @ k.mT + rows[:, None]).softmax(-1) @ v


@cases.near_miss("is added to all scores of a row")
def row_moved_before_it_is_filled(q, k, v):
    scores = q @ k.mT - 20000 * v[0, 0, :, :1].abs()
    return scores.masked_fill(~keys()[:, None, None], -10000).softmax(-1) @ v


@cases.near_miss("is added to all scores of a row")
def maximum_of_other_scores_subtracted(q, k, v):
    scores = q @ k.mT
    return (scores * 1e-6 - scores.amax(-1, keepdim=True)).softmax(-1) @ v


@cases.near_miss("is added to all scores of a row")
def place_of_the_maximum_subtracted(q, k, v):
    scores = q @ k.mT
    return (scores - scores.max(-1, keepdim=True)[1].float()).softmax(-1) @ v


@cases.near_miss("is added to all scores of a row")
def mean_of_masked_scores_subtracted(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -1e9)
    return (scores - scores.mean(-1, keepdim=True)).softmax(-1) @ v


@cases.near_miss("filled with -984 where masked")
def number_subtracted_before_it_is_filled(q, k, v):
    scores = q @ k.mT - 16
    return scores.masked_fill(~keys()[:, None, None], -1000).softmax(-1) @ v


@cases.near_miss("filled with -10000 where masked")
def large_scores_filled(q, k, v):
    return (q @ k.mT * 1e6).masked_fill(~keys()[:, None, None], -1e4).softmax(-1) @ v


@cases.near_miss("masked with a tensor of values")
def filled_with_a_tensor_of_several_numbers(q, k, v):
    return torch.where(keys()[:, None, None], q @ k.mT, -v[0, 0, :, 0] * 1e9).softmax(-1) @ v


@cases.near_miss("masked with a tensor of values")
def filled_with_a_tensor_that_was_written_to(q, k, v):
    fill = torch.full((1,), -math.inf)
    fill[v[0, 0, 0, :1] < 100] = 0.0
    return torch.where(keys()[:, None, None], q @ k.mT, fill).softmax(-1) @ v


@cases.near_miss("relative positions or ALiBi")
def bias_of_zeros_that_was_written_to(q, k, v):
    bias = torch.zeros(T)
    bias.add_(v[0, 0, :, 0])
    return (q @ k.mT + bias).softmax(-1) @ v


@cases.near_miss("torch.int32 on cpu")
def scores_as_integers(q, k, v):
    return (4 * (q @ k.mT)).int().float().softmax(-1) @ v


@cases.near_miss("`setitem` stands")
def filled_by_an_index_of_leading_dimensions(q, k, v):
    """Which would broadcast as one of trailing dimensions: there are as many batches as queries."""
    scores = torch.stack([q[0, 0]] * T) @ k[0, 0].mT
    scores[q[0, 0] @ q[0, 0].mT > 2] = -1e9
    return scores.softmax(-1) @ v[0, 0]


@cases.near_miss("`cat` stands")
def softmax_with_a_sink(q, k, v):
    scores = torch.cat([q @ k.mT, v.new_zeros(B, H, T, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@cases.near_miss("`roll` stands")
def scores_rolled(q, k, v):
    return (q @ k.mT).roll(1, -1).softmax(-1) @ v


@cases.near_miss("`mean` stands")
def scores_averaged_over_heads(q, k, v):
    return (q @ k.mT).mean(1, keepdim=True).softmax(-1) @ v


@cases.near_miss("`layer_norm` stands")
def scores_normalised(q, k, v):
    return F.layer_norm(q @ k.mT, (T,)).softmax(-1) @ v


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)
