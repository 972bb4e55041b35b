"""Masks that do more than to remove keys keep their site dense, with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..tracing import rewrite
from .shared import B, H, Make, T, attend, inputs, outer

REFUSED: dict[str, tuple[Make, str]] = {
    "causal": (lambda m: torch.ones(T, T).bool().tril(), "varies over queries"),
    "window": (
        lambda m: (torch.arange(T)[:, None] - torch.arange(T)).abs() < 4,
        "varies over queries",
    ),
    "same_segment": (lambda m: (m[:, :, None] == m[:, None])[:, None], "varies over queries"),
    "outer_product_by_or": (lambda m: m[:, None, None] | m[:, None, :, None], "varies over"),
    "outer_product_then_overwritten": (lambda m: _overwritten(m), "varies over queries"),
    "some_rows_overwritten": (
        lambda m: _some_rows(m[:, None, None].repeat(1, 1, T, 1)),
        "varies over queries",
    ),
    "one_row_through_a_view": (
        lambda m: _through_a_view(m[:, None, None].repeat(1, 1, T, 1)),
        "cannot be read",
    ),
    "per_head": (lambda m: torch.rand(H, 1, T) > -1, "differs between heads"),
    "heads_last_batch_first": (
        lambda m: m[:, None, None].expand(B, H, 1, T).transpose(0, 1).reshape(B, H, 1, T),
        "differs between heads",
    ),
    "window_of_the_length_less_one": (
        lambda m: (torch.arange(T)[:, None] - torch.arange(T)).abs() <= T - 2,
        "varies over queries",
    ),
    "positions_that_may_be_zero": (
        lambda m: (torch.arange(T)[:, None] > 0) | (torch.arange(T) > 3),
        "varies over queries",
    ),
    "picked_per_query": (
        lambda m: (
            m[torch.arange(B)[:, None, None], torch.arange(T)[:, None].flip(0)][:, None]
            | m[:, None, None]
        ),
        "varies over queries",
    ),
    "picked_by_both_indices": (
        lambda m: (m[:, :, None] | m[:, None])[
            torch.arange(B)[:, None, None], torch.arange(T)[:, None], torch.arange(T)
        ][:, None],
        "varies over queries",
    ),
    "bits_of_floats": (
        lambda m: ((1 - m.float()).view(torch.int32) == 0)[:, None, :, None] | m[:, None, None],
        "varies over queries",
    ),
    "added_thousand": (lambda m: (1 - m.float())[:, None, None] * -1000.0, "add -inf"),
    "unsigned_integers_that_wrap": (
        lambda m: (m.to(torch.uint8) - 1)[:, None, None] * -10000.0,
        "should be boolean",
    ),
    "largest_of_a_row": (
        lambda m: (
            ((1 - m.float()) * -1e9)[:, None].amax(-1, keepdim=True)[..., None, :]
            + (torch.arange(T)[:, None] > torch.arange(T)) * -1e9
        ),
        "varies over queries",
    ),
    "bias": (lambda m: torch.randn(T, T), "relative positions or ALiBi"),
    "bias_per_key": (lambda m: torch.arange(T).float()[None], "relative positions or ALiBi"),
    "mask_of_floats": (lambda m: m.float().cumsum(1)[:, None, None], "should be boolean"),
    "added_one": (lambda m: m.float()[:, None, None], "add -inf to remove a key"),
    "added_small_number": (lambda m: (1 - m.float())[:, None, None] * -5.0, "add -inf"),
    "nan": (lambda m: ((1 - m.float()) * -math.inf)[:, None, None], "should be boolean"),
}


def _overwritten(m: Tensor) -> Tensor:
    """As HunyuanVideo's token refiner builds it."""
    mask = outer(m)
    mask[:, :, :, 0] = True
    return mask


def _some_rows(mask: Tensor) -> Tensor:
    mask[:, :, 3:, 0] = True
    return mask


def _through_a_view(mask: Tensor) -> Tensor:
    mask[:, :, 3].fill_(True)
    return mask


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_keep_the_site_dense(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    result = rewrite(attend(make), *inputs())
    assert result.ops == []
    assert reason in result.decisions[0].reason


def test_mask_as_an_input_is_never_read() -> None:
    """Its values are unknown, so even a mask that happens to be all true is passed on."""
    q, k, v, valid = inputs()
    mask = torch.ones_like(valid)[:, None, None]
    result = rewrite(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), q, k, v, mask)
    assert result.ops[0].args[3] is not None
    result = rewrite(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), q, k, v, mask.float().log()
    )
    assert "should be boolean" in result.reasons[0]


def test_rows_that_only_an_expand_made_equal_at_run_time_stay_dense() -> None:
    q, k, v, valid = inputs()
    mask = valid[:, None, None].expand(B, 1, T, T).contiguous()
    result = rewrite(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), q, k, v, mask)
    assert "cannot be proven" in result.reasons[0]
