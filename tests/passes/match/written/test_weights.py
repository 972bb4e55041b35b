"""What happens to attention weights after their softmax."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .cases import Cases, NearMiss, Spelling, check_dense, check_found, keys, name_of

cases = Cases()


@cases.spelling()
def dropout_of_zero(q, k, v):
    return nn.Dropout(0.0)((q @ k.mT).softmax(-1)) @ v


@cases.spelling()
def dropout_in_eval(q, k, v):
    return nn.Dropout(0.5).eval()((q @ k.mT).softmax(-1)) @ v


@cases.spelling()
def functional_dropout_not_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), p=0.3, training=False) @ v


@cases.near_miss("call model.eval()")
def dropout_active(q, k, v):
    return nn.Dropout(0.5).train()((q @ k.mT).softmax(-1)) @ v


@cases.near_miss("call model.eval()")
def functional_dropout_by_default(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


@cases.near_miss("between its softmax and the product with the values")
def weights_scaled(q, k, v):
    return ((q @ k.mT).softmax(-1) * 0.9) @ v


@cases.near_miss("between its softmax and the product with the values")
def weights_masked(q, k, v):
    return ((q @ k.mT).softmax(-1) * keys()[:, None, None].float()) @ v


@cases.near_miss("between its softmax and the product with the values")
def weights_gated(q, k, v):
    return (q @ k.mT).softmax(-1).square() @ v


@cases.spelling()
def weights_plus_nothing(q, k, v):
    return ((q @ k.mT).softmax(-1) * 1.0 + 0) @ v


@cases.spelling()
def rows_without_a_key_set_to_zero(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.where(empty, 0.0, scores.softmax(-1)) @ v


@cases.spelling()
def rows_with_a_key_kept(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    some = (scores != -math.inf).any(-1, True)
    weights = scores.softmax(-1)
    return torch.where(some, weights, torch.zeros_like(weights)) @ v


@cases.near_miss("`where` stands")
def rows_with_a_key_set_to_zero(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    some = (scores != -math.inf).any(-1, True)
    return torch.where(some, 0.0, scores.softmax(-1)) @ v + 1


@cases.near_miss("`where` stands")
def rows_with_a_removed_key_set_to_zero(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    removed = (scores == -math.inf).any(-1, True)
    return torch.where(removed, 0.0, scores.softmax(-1)) @ v + 1


@cases.near_miss("`where` stands")
def rows_without_a_key_set_to_one(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.where(empty, 1.0, scores.softmax(-1)) @ v


@cases.near_miss("`where` stands")
def columns_without_a_query_set_to_zero(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf)
    empty = (scores == -math.inf).all(dim=-2, keepdim=True)
    return torch.where(empty, 0.0, scores.softmax(-1)) @ v


@cases.near_miss("0.1 is added to its attention weights")
def number_added(q, k, v):
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


@cases.near_miss("0.1 is added to its attention weights")
def number_added_from_the_left(q, k, v):
    return torch.einsum("bhts,bhsd->bhtd", 0.1 + (q @ k.mT).softmax(-1), v)


@cases.near_miss("0.1 is added to its attention weights")
def number_added_by_a_method(q, k, v):
    return (q @ k.mT).softmax(-1).add(0.1) @ v


@cases.near_miss("0.1 is added to its attention weights")
def number_added_in_place(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights += 0.1
    return weights @ v


@cases.near_miss("0.1 is added to its attention weights")
def number_added_by_a_statement(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights.add_(0.1)
    return weights @ v


@cases.near_miss("1 and its attention weights are subtracted from each other")
def number_subtracted(q, k, v):
    return ((q @ k.mT).softmax(-1) - 1) @ v


@cases.near_miss("1 and its attention weights are subtracted from each other")
def subtracted_from_a_number(q, k, v):
    return (1 - (q @ k.mT).softmax(-1)) @ v


@cases.near_miss("0.5 is added to its attention weights")
def number_added_to_exponentials_before_their_product(q, k, v):
    weights = (q @ k.mT).exp()
    return ((weights + 0.5) @ v) / weights.sum(-1, keepdim=True)


@cases.near_miss("0.5 is added to its attention weights")
def number_added_to_exponentials_in_place(q, k, v):
    weights = (q @ k.mT).exp()
    total = weights.sum(-1, keepdim=True)
    weights.add_(0.5)
    return (weights @ v) / total


@cases.near_miss("`mul` is added to its attention weights")
def tensor_added(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights + v[0, 0, :, 0] * 0.5) @ v


@cases.near_miss("between its softmax and the product with the values")
def divided_by_a_number(q, k, v):
    return ((q @ k.mT).softmax(-1) / 2) @ v


@cases.near_miss("`negative` stands between its softmax")
def negated(q, k, v):
    return -(q @ k.mT).softmax(-1) @ v


@cases.near_miss("`masked_fill` stands between its softmax")
def masked_afterwards(q, k, v):
    return (q @ k.mT).softmax(-1).masked_fill(~keys()[:, None, None], 0.0) @ v


@cases.near_miss("`mul` by")
def masked_and_normalised_again(q, k, v):
    weights = (q @ k.mT).softmax(-1) * keys()[:, None, None]
    return (weights / weights.sum(-1, keepdim=True)) @ v


@cases.near_miss("`roll` stands between its softmax")
def weights_rolled(q, k, v):
    return (q @ k.mT).softmax(-1).roll(1, -1) @ v


@cases.near_miss("`round` stands between its softmax")
def weights_rounded(q, k, v):
    return (q @ k.mT).softmax(-1).round() @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)
