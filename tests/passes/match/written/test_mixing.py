"""Heads that are mixed, and what stands between products without being attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from ...tracing import rewrite
from .cases import (
    B,
    Cases,
    D,
    Function,
    H,
    NearMiss,
    Spelling,
    T,
    check_dense,
    check_found,
    inputs,
    name_of,
)

cases = Cases()


@cases.spelling()
def heads_averaged_after_the_attention(q, k, v):
    return ((q @ k.mT).softmax(-1) @ v).mean(1)


@cases.near_miss("its heads are mixed by `einsum` between the product of query and key")
def heads_mixed_before_the_softmax(q, k, v):
    return torch.einsum("bhij,hg->bgij", q @ k.mT, mixture(v)).softmax(-1) @ v


@cases.near_miss("its heads are mixed by `einsum` between its softmax and the product")
def heads_mixed_after_the_softmax(q, k, v):
    return torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), mixture(v)) @ v


@cases.near_miss("its heads are mixed by `matmul")
def heads_mixed_by_a_matrix(q, k, v):
    scores = (mixture(v) @ (q @ k.mT).flatten(2)).view(B, H, T, T)
    return scores.softmax(-1) @ v


@cases.near_miss("`linear`, a layer that mixes its heads, stands between the product of query")
def heads_mixed_by_a_layer(q, k, v):
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), mixture(v)).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


@cases.near_miss("`conv2d`, a layer that mixes its heads, stands between its softmax")
def heads_mixed_by_a_convolution(q, k, v):
    weights = F.conv2d((q @ k.mT).softmax(-1), mixture(v)[:, :, None, None])
    return weights @ v


def mixture(v):
    return v[0, 0, :H, :H] + 1


def router(x):
    """Weights of experts, from a layer behind another attention."""
    return F.linear((x @ x.mT) @ x, x[0, 0, :T, :D]).softmax(-1)


NOT_ATTENTION = [
    lambda q, k, v: (q @ k.mT).softmax(-1),
    lambda q, k, v: q.softmax(-1) @ v.mT,
    lambda q, k, v: F.softmax(q, dim=-1) @ (F.softmax(k, dim=-2).mT @ v),
    lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    lambda q, k, v: F.relu(q @ k.mT) @ v,
    lambda q, k, v: (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True) @ v,
    lambda q, k, v: (q @ k.mT).exp() @ v,
    lambda q, k, v: router(q) @ v,
    lambda q, k, v: F.linear((q @ k.mT) @ v, v[0, 0, :1]).softmax(2).mT @ v,
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)


@pytest.mark.parametrize("function", NOT_ATTENTION)
def test_what_is_not_attention_is_not_reported(function: Function) -> None:
    assert rewrite(function, *inputs()).decisions == []
