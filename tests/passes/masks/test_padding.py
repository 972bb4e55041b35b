"""Masks that only remove keys run sparse; all others keep their site dense, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pisa_compile.passes import rewrite_attention

from ..tracing import SPARSITY_ZERO, rewrite

B, H, T, D = 2, 3, 20, 8

Make = Callable[[Tensor], Tensor]


def inputs(heads: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a boolean [B, T] with holes, different for every batch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator) for _ in range(3))
    valid = torch.rand(B, T, generator=generator) > 0.3
    return q, k, v, valid


def negative(valid: Tensor) -> Tensor:
    return torch.zeros(B, T).masked_fill_(valid.logical_not(), -math.inf)


def in_place(valid: Tensor) -> Tensor:
    bias = torch.zeros(B, 1, 1, T)
    bias.masked_fill_(~valid[:, None, None], float("-inf"))
    return bias


def written(mask: Tensor, value: float = True) -> Tensor:
    """Some keys allowed (or forbidden) for all queries."""
    if mask.dim() == 2:
        mask = mask.clone()
        mask[:, 4:7] = value
    else:
        mask[:, :, :, 0] = value
    return mask


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


def outer(m: Tensor) -> Tensor:
    """As HunyuanVideo 1.5 builds it."""
    first = m.view(B, 1, 1, T).repeat(1, 1, T, 1)
    return (first & first.transpose(2, 3)).bool()


OUTER_PRODUCTS: dict[str, Make] = {
    "repeated_and_transposed": outer,
    "broadcast": lambda m: m[:, None, None, :] & m[:, None, :, None],
    "rank_three": lambda m: (m[:, None, :] & m[:, :, None])[:, None],
    "with_another_mask": lambda m: outer(m) & (torch.arange(T) < 18),
}

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


def attend(make: Make) -> Callable[..., Tensor]:
    return lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=make(m))


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


@pytest.mark.parametrize("name", OUTER_PRODUCTS)
def test_outer_product_masks_keys_and_clears_padded_rows(name: str) -> None:
    result = rewrite(attend(OUTER_PRODUCTS[name]), *inputs())
    assert result.reasons == []
    (op,) = result.ops
    assert op.args[3].meta["example_value"].shape == (B, 1, 1, T)
    valid = inputs()[3]
    assert result.error < 1e-5  # dense attention gives zeros for rows without a key, as we do
    assert not result.output.transpose(1, 2)[~valid].any()


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_keep_the_site_dense(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    result = rewrite(attend(make), *inputs())
    assert result.ops == []
    assert reason in result.decisions[0].reason


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


def test_mask_of_merged_batch_and_heads() -> None:
    """[B*H, 1, T] with [B*H, T, D], as older diffusers prepare it."""

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = m.repeat_interleave(H, 0)[:, None]
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), attn_mask=mask)

    result = rewrite(function, *inputs())
    (op,) = result.ops
    assert op.args[3].meta["example_value"].shape == (B * H, 1, 1, T)
    assert result.error < 1e-5


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
