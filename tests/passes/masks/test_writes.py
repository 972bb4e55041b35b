"""Masks that are written in place are read as they are when the attention reads them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pisa_compile.passes import rewrite_attention

from ..tracing import SPARSITY_ZERO, rewrite
from .shared import T, inputs, written


@pytest.mark.parametrize("pre_dispatch", [True, False], ids=["pre_dispatch", "decomposed"])
def test_masks_written_in_place_in_graphs_of_operators(pre_dispatch: bool) -> None:
    """There a write is an operator of its own, and `setitem` nodes of Dynamo have no value."""
    q, k, v, valid = inputs()

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = q @ k.mT
        scores = scores.masked_fill(~written(written(m, False))[:, None, None], -math.inf)
        return scores.softmax(-1) @ v

    gm = make_fx(function, pre_dispatch=pre_dispatch, tracing_mode="fake")(q, k, v, valid)
    (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
    expected = function(q, k, v, valid)
    torch.testing.assert_close(gm(q, k, v, valid), expected, rtol=1e-5, atol=1e-5)
    assert decision.replaced or "in place" in decision.reason


def test_part_of_a_mask_that_changes_later_is_not_read_late() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        some, other = ~m, torch.arange(T) < 15
        mask = (some & other)[:, None, None]
        some[:, :9] = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out + some[:, None, :, None]

    result = rewrite(function, *inputs())
    assert len(result.ops) == 1
    assert result.error < 1e-5


def test_scores_masked_by_a_chain_of_writes() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = torch.einsum("bhqc,bhkc->bqkh", q, k)
        blocked = ~m
        blocked[:, 0] = False
        blocked[:, 1:3] = True
        scores = scores.masked_fill(blocked[:, None, :, None], -math.inf)
        return torch.einsum("bqkh,bhkc->bhqc", scores.softmax(2), v)

    result = rewrite(function, *inputs())
    assert len(result.ops) == 1
    assert result.error < 1e-5
