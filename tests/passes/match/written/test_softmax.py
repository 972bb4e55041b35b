"""How the softmax is written."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from ...tracing import rewrite
from .cases import Cases, NearMiss, Spelling, check_dense, check_found, inputs, keys, name_of, wide

cases = Cases()


@cases.spelling(0.5)
def softmax_module(q, k, v):
    return nn.Softmax(dim=-1)(q @ k.mT * 0.5) @ v


@cases.spelling(0.5)
def softmax_written_out(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@cases.spelling(0.5)
def softmax_written_out_with_maximum(q, k, v):
    scores = q @ k.mT * 0.5
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    weights = scores.exp()
    return torch.matmul(weights / torch.sum(weights, -1, True), v)


@cases.spelling(0.5)
def softmax_written_out_with_values_of_the_maximum(q, k, v):
    scores = q @ k.mT * 0.5
    weights = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
    return weights.div(weights.sum(-1, keepdim=True)) @ v


@cases.spelling(0.5)
def maximum_subtracted_before_softmax(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - torch.amax(scores, dim=-1, keepdim=True)).softmax(-1) @ v


@cases.spelling(0.5)
def softmax_written_out_with_a_new_dimension(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights / weights.sum(dim=-1)[..., None]) @ v


@cases.spelling(0.5)
def product_normalised_afterwards(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


@cases.spelling(0.5)
def product_normalised_afterwards_by_einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhts,bhsd->bhtd", weights, v) / weights.sum(-1).unsqueeze(-1)


@cases.spelling(0.5)
def product_normalised_in_place(q, k, v):
    weights = (q @ k.mT * 0.5).masked_fill(~keys()[:, None, None], -math.inf).exp()
    out = weights @ v
    out /= weights.sum(-1, keepdim=True)
    return out


@cases.spelling(0.5)
def exponential_of_log_softmax(q, k, v):
    return (q @ k.mT * 0.5).log_softmax(-1).exp() @ v


@cases.spelling(0.5)
def exponential_minus_logsumexp(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


@cases.near_miss("has another layout")
def product_normalised_over_queries(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ wide(v)) / weights.sum(dim=-2, keepdim=True)


@cases.near_miss("has another layout")
def product_normalised_across_channels(q, k, v):
    """The sums of the queries on the channels of a result that has them in columns."""
    weights = (q @ k.mT).exp()
    return (wide(v).mT @ weights.mT) / weights.sum(-1, keepdim=True)


@cases.near_miss("does not run over the dimension that the product with the values sums")
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@cases.near_miss("over a batch dimension")
def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@cases.near_miss("attention weights are also returned or used by")
def product_used_before_it_is_normalised(q, k, v):
    weights = (q @ k.mT).exp()
    out = weights @ v
    return out / weights.sum(-1, keepdim=True), out


@cases.spelling(0.5)
def softmax_of_aten(q, k, v):
    return torch.ops.aten._softmax(q @ k.mT * 0.5, -1, False) @ v


@cases.spelling(0.5)
def safe_softmax(q, k, v):
    return torch.ops.aten._safe_softmax(q @ k.mT * 0.5, -1) @ v


@cases.spelling(-0.5)
def softmin(q, k, v):
    return F.softmin(q @ k.mT * 0.5, dim=-1) @ v


@cases.spelling(0.5)
def base_two_with_the_scale_folded_in(q, k, v):
    weights = torch.exp2(q @ k.mT * (0.5 * math.log2(math.e)))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.spelling(0.5)
def base_two_with_maximum(q, k, v):
    scores = q @ k.mT * 0.5
    weights = ((scores - scores.amax(-1, keepdim=True)) * math.log2(math.e)).exp2()
    return (weights @ v) / weights.sum(-1, keepdim=True)


@cases.spelling(math.log(2.0))
def base_two_as_it_is(q, k, v):
    weights = torch.special.exp2(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.spelling(math.log(2.0))
def power_of_two(q, k, v):
    weights = torch.pow(2.0, q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.spelling(math.log(2.0))
def power_of_two_by_operator(q, k, v):
    weights = 2 ** (q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.spelling(0.5)
def multiplied_by_the_reciprocal_of_the_sum(q, k, v):
    weights = (q @ k.mT * 0.5).exp()
    return (weights * weights.sum(-1, keepdim=True).reciprocal()) @ v


@cases.spelling(0.5)
def multiplied_by_one_over_the_sum(q, k, v):
    weights = (q @ k.mT * 0.5).exp()
    return ((1 / weights.sum(-1, keepdim=True)) * weights) @ v


@cases.spelling(0.5)
def exponentials_in_place(q, k, v):
    scores = q @ k.mT * 0.5
    scores -= scores.amax(-1, keepdim=True)
    scores.exp_()
    scores /= scores.sum(-1, keepdim=True)
    return scores @ v


@cases.near_miss("not divided by just their own sum")
def small_number_added_to_the_sum(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ v


@cases.near_miss("not divided by just their own sum")
def one_added_to_the_sum(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


@cases.near_miss("not divided by just their own sum")
def exponentials_masked(q, k, v):
    weights = (q @ k.mT).exp() * keys()[:, None, None]
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.near_miss("not divided by just their own sum")
def number_added_to_exponentials(q, k, v):
    weights = (q @ k.mT).exp() + 0.5
    return (weights @ v) / weights.sum(-1, keepdim=True)


@cases.near_miss("changed before it is normalised")
def product_cast_before_it_is_normalised(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ v).double() / weights.sum(-1, keepdim=True)


@cases.near_miss("not divided by just their own sum")
def product_and_sum_rearranged(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ v).transpose(1, 2) / weights.sum(-1, keepdim=True).transpose(1, 2)


@cases.near_miss("not divided by just their own sum")
def sum_clamped_after_the_product(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=10)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)


def test_random_softmax_is_refused() -> None:
    result = rewrite(lambda q, k, v: F.gumbel_softmax(q @ k.mT, dim=-1) @ v, *inputs())
    assert result.reasons == ["`gumbel_softmax` is no plain softmax"]
