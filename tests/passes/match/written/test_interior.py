"""Who else reads or changes what goes with the attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .cases import B, Cases, H, NearMiss, Spelling, T, check_dense, check_found, keys, name_of

cases = Cases()


@cases.spelling()
def value_changed_afterwards(q, k, v):
    values = v.clone()
    out = (q @ k.mT).softmax(-1) @ values
    values.zero_()
    return out + values


@cases.near_miss("attention weights are also returned or used by")
def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@cases.near_miss("attention weights are also returned or used by")
def weights_averaged(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


@cases.near_miss("scores are also returned or used by")
def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


@cases.near_miss("scores are also returned or used by")
def scores_used_twice(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.sum()


@cases.near_miss("in place")
def query_changed_after_its_product(q, k, v):
    q = q + 1
    scores = q @ k.mT
    q.zero_()
    return scores.softmax(-1) @ v + q


@cases.near_miss("through a view")
def scores_changed_through_a_view(q, k, v):
    scores = q @ k.mT
    scores[:, :, :, 0].mul_(2)
    return scores.softmax(-1) @ v


@cases.spelling()
def mask_expanded_to_the_scores(q, k, v):
    scores = q @ k.mT
    mask = (~keys())[:, None, None].expand_as(scores)
    return scores.masked_fill(mask, -math.inf).softmax(-1) @ v


@cases.spelling()
def mask_of_zeros_like_the_scores(q, k, v):
    scores = q @ k.mT
    mask = torch.zeros_like(scores).masked_fill(~keys()[:, None, None], -math.inf)
    return (scores + mask).softmax(-1) @ v


@cases.spelling()
def fill_like_the_scores(q, k, v):
    scores = q @ k.mT
    fill = torch.full_like(scores, -math.inf)
    return torch.where(keys()[:, None, None], scores, fill).softmax(-1) @ v


@cases.spelling()
def shapes_of_the_scores_returned(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    return weights @ v, torch.ones_like(scores), weights.new_zeros(scores.shape[-1])


@cases.spelling()
def values_cast_like_the_weights(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v.double().type_as(weights), v.to(weights)


@cases.near_miss("scores are also returned or used by")
def zeros_in_the_memory_order_of_the_scores(q, k, v):
    scores = (q @ k.mT).mT
    return scores.softmax(-2).mT @ v, torch.zeros_like(scores)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)


def test_no_memory_for_all_pairs_of_tokens_is_left() -> None:
    result = check_found(Spelling(fill_like_the_scores))
    made = [node.meta.get("example_value") for node in result.graphs[0].graph.nodes]
    tensors = [x for x in made if isinstance(x, Tensor)]
    assert all(x.untyped_storage().nbytes() < 4 * B * H * T * T for x in tensors)
