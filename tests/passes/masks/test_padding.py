"""Masks that only remove keys run sparse, in whatever shape and form they come."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..tracing import rewrite
from .shared import B, H, Make, T, attend, inputs, negative, written


def in_place(valid: Tensor) -> Tensor:
    bias = torch.zeros(B, 1, 1, T)
    bias.masked_fill_(~valid[:, None, None], float("-inf"))
    return bias


def behind(mask: Tensor) -> Tensor:
    mask[..., 2:4] = False
    mask[..., -1] = True
    return mask


KEY_PADDING: dict[str, Make] = {
    "B11T": lambda m: m[:, None, None],
    "B11T_by_view": lambda m: m.view(B, 1, 1, T),
    "B1TT_expanded": lambda m: m[:, None, None].expand(-1, -1, T, -1),
    "BHTT_expanded": lambda m: m[:, None, None].expand(B, H, T, T),
    "BH1T_repeated": lambda m: m[:, None, None].repeat(1, H, 1, 1),
    "B1TT_repeated_and_copied": lambda m: m[:, None, None].repeat(1, 1, T, 1).clone(),
    "B1TT_expanded_and_inverted": lambda m: ~((~m)[:, None, None].expand(B, 1, T, T)),
    "heads_merged_and_split": lambda m: (
        m[:, None, None].expand(-1, H, -1, -1).reshape(B * H, 1, T).view(B, H, 1, T)
    ),
    "heads_interleaved": lambda m: m.repeat_interleave(H, 0).unflatten(0, (B, H))[:, :, None],
    "one_row_for_all_batches": lambda m: m[:1],
    "joined_with_ones": lambda m: torch.cat([m[:, :8], torch.ones(B, T - 8).bool()], 1)[
        :, None, None
    ],
    "padded": lambda m: F.pad(m[:, 4:], (4, 0), value=True)[:, None, None],
    "ones_with_holes": lambda m: torch.ones(B, T, dtype=torch.bool).masked_fill(~m, False)[
        :, None, None
    ],
    "lengths": lambda m: (torch.arange(T) < m.sum(1)[:, None])[:, None, None],
    "two_masks_multiplied": lambda m: (m * (torch.arange(T) < 15))[:, None, None],
    "sizes_as_tuples": lambda m: m.view((B, 1, 1, T)).expand((B, 1, T, T)).repeat((1, 1, 1, 1)),
    "written_in_place": lambda m: written(m)[:, None, None],
    "written_twice": lambda m: written(written(m, True), False)[:, None, None],
    "written_for_all_rows": lambda m: written(m[:, None, None].expand(-1, 1, T, -1).clone()),
    "written_behind_an_ellipsis": lambda m: behind(m[:, None, None].repeat(1, 1, T, 1)),
    "added_and_written": lambda m: written(negative(m), -math.inf)[:, None, None],
    "two_masks": lambda m: m[:, None, None] & (torch.arange(T) < 15),
    "added": lambda m: negative(m)[:, None, None],
    "added_in_place": in_place,
    "added_by_where": lambda m: torch.where(m[:, None, None], 0.0, -math.inf),
    "added_from_numbers": lambda m: (1.0 - m.float())[:, None, None] * -10000.0,
    "added_lowest_number": lambda m: (1 - m.float())[:, None, None] * torch.finfo(torch.half).min,
    "added_expanded": lambda m: negative(m)[:, None, None].expand(B, H, T, T),
    "added_as_logarithm": lambda m: m.float().log()[:, None, None],
    "added_by_where_of_tensors": lambda m: torch.where(
        m[:, None, None], torch.zeros(()), torch.tensor(-math.inf)
    ),
    "added_by_full": lambda m: torch.where(m, torch.zeros(1), torch.full((), -math.inf))[
        :, None, None
    ],
    "added_by_a_filled_tensor": lambda m: torch.zeros(B, 1, 1, T).masked_fill(
        ~m[:, None, None], torch.tensor(torch.finfo(torch.float32).min)
    ),
    "added_by_new_tensor": lambda m: torch.where(
        m, m.new_zeros((), dtype=torch.float), torch.scalar_tensor(-1e9)
    )[:, None, None],
    "added_and_limited": lambda m: torch.maximum(m.float().log(), torch.tensor(-1e9))[
        :, None, None
    ],
    "positions_that_are_not_negative": lambda m: (
        (torch.arange(T)[None, None, :, None] >= 0) & m[:, None, None]
    ),
    "positions_within_a_long_window": lambda m: (
        ((torch.arange(T)[:, None] - torch.arange(T)).abs() <= T - 1) & m[:, None, None]
    ),
    "picked_by_indices": lambda m: m[
        torch.arange(B)[:, None, None, None], torch.arange(T)[None, None, None]
    ].expand(B, 1, T, T),
    "both_joined_and_expanded": lambda m: (
        (torch.arange(T)[:, None] > -1) & m[:, None, None] & torch.ones((), dtype=torch.bool)
    ).expand(B, -1, T, T),
    "added_in_steps": lambda m: negative(m).unsqueeze(1).unsqueeze(1).to(torch.float32),
}

ALL_TRUE: dict[str, Make] = {
    "ones": lambda m: torch.ones(B, 1, 1, T, dtype=torch.bool),
    "ones_varying_in_shape_alone": lambda m: torch.ones(B, H, T, T, dtype=torch.bool),
    "ones_cast": lambda m: torch.ones_like(m).bool()[:, None, None].expand(B, 1, T, T),
    "not_zeros": lambda m: ~torch.zeros(B, 1, 1, T, dtype=torch.bool),
    "zeros_added": lambda m: torch.zeros(B, 1, T, T),
    "full": lambda m: torch.full((T, T), True),
    "ones_inverted_and_added": lambda m: (1 - torch.ones(T, T)) * -10000.0,
}


@pytest.mark.parametrize("name", KEY_PADDING)
def test_key_padding_reaches_the_op_as_a_row_per_batch(name: str) -> None:
    result = rewrite(attend(KEY_PADDING[name]), *inputs())
    assert result.reasons == []
    (op,) = result.ops
    mask = op.args[3].meta["example_value"]
    assert mask.dtype == torch.bool
    assert mask.shape in ((B, 1, 1, T), (1, 1, 1, T))
    assert result.error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_additive_mask_of_any_float_dtype(dtype: torch.dtype) -> None:
    q, k, v, valid = inputs()
    result = rewrite(
        lambda q, k, v, m: F.scaled_dot_product_attention(
            q, k, v, attn_mask=(1 - m.to(dtype))[:, None, None] * torch.finfo(dtype).min
        ),
        *(x.to(dtype) for x in (q, k, v)),
        valid,
    )
    assert len(result.ops) == 1
    assert result.error < 2e-2


@pytest.mark.parametrize("name", ALL_TRUE)
def test_mask_without_effect_is_dropped(name: str) -> None:
    result = rewrite(attend(ALL_TRUE[name]), *inputs())
    (op,) = result.ops
    assert op.args[3] is None
    assert result.error < 1e-5


def test_mask_of_merged_batch_and_heads() -> None:
    """[B*H, 1, T] with [B*H, T, D], as older diffusers prepare it."""

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = m.repeat_interleave(H, 0)[:, None]
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), attn_mask=mask)

    result = rewrite(function, *inputs())
    (op,) = result.ops
    assert op.args[3].meta["example_value"].shape == (B * H, 1, 1, T)
    assert result.error < 1e-5


@pytest.mark.parametrize("name", ["B11T", "B1TT_expanded", "added_in_place"])
def test_dynamic_lengths(name: str) -> None:
    q, k, v, valid = inputs()
    function = {
        "B11T": lambda m: m[:, None, None],
        "B1TT_expanded": lambda m: m[:, None, None].expand(-1, -1, m.shape[1], -1),
        "added_in_place": lambda m: torch.zeros_like(m, dtype=torch.float).masked_fill_(
            ~m, -math.inf
        )[:, None, None],
    }[name]
    result = rewrite(attend(function), q, k, v, valid, dynamic=True)
    assert len(result.ops) == 1
    assert result.error < 1e-5
