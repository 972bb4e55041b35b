"""Rows that a mask leaves without any key give what dense attention makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pisa_compile.policies.policy import Policy

from ..tracing import rewrite
from .shared import B, D, H, Make, T, attend, inputs, outer

LOWEST = torch.finfo(torch.float32).min


def some_empty(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `inputs`, but the second batch entry is padding alone."""
    *tensors, valid = inputs()
    valid[1] = False
    return *(x.to(dtype) for x in tensors), valid  # type: ignore[return-value]


OUTER_PRODUCTS: dict[str, Make] = {
    "repeated_and_transposed": outer,
    "broadcast": lambda m: m[:, None, None, :] & m[:, None, :, None],
    "rank_three": lambda m: (m[:, None, :] & m[:, :, None])[:, None],
    "with_another_mask": lambda m: outer(m) & (torch.arange(T) < 18),
}


@pytest.mark.parametrize("name", OUTER_PRODUCTS)
def test_outer_product_masks_keys_and_clears_padded_rows(name: str) -> None:
    result = rewrite(attend(OUTER_PRODUCTS[name]), *inputs())
    assert result.reasons == []
    (op,) = result.ops
    assert op.args[3].meta["example_value"].shape == (B, 1, 1, T)
    valid = inputs()[3]
    assert result.error < 1e-5  # dense attention gives zeros for rows without a key, as we do
    assert not result.output.transpose(1, 2)[~valid].any()


# Added by SDPA, in float32 or wider whatever the inputs: what becomes of a row of padding alone.
ADDED = [
    (torch.float32, -10000.0, "softmax"),
    (torch.float32, -1e9, "average"),
    (torch.float32, LOWEST, "average"),
    (torch.float32, -math.inf, "zeros"),
    (torch.float64, -1e9, "softmax"),
    (torch.float64, torch.finfo(torch.float64).min, "average"),
    (torch.bfloat16, -10000.0, "softmax"),
    (torch.bfloat16, torch.finfo(torch.bfloat16).min, "average"),
    (torch.float16, -10000.0, "softmax"),
    (torch.float16, torch.finfo(torch.float16).min, "softmax"),
    (torch.float16, -1e9, "zeros"),  # -inf in float16
]


@pytest.mark.parametrize(("dtype", "fill", "kind"), ADDED)
def test_number_that_sdpa_adds(dtype: torch.dtype, fill: float, kind: str) -> None:
    def make(m: Tensor) -> Tensor:
        return torch.zeros(B, T, dtype=dtype).masked_fill(~m, fill)[:, None, None]

    def by_product(m: Tensor) -> Tensor:
        return ((1 - m.to(dtype)) * fill)[:, None, None]

    given = some_empty(dtype)
    q, k, v, _ = given
    expected = {
        "zeros": torch.zeros_like(v),
        "average": v.mean(2, keepdim=True).expand_as(v),
        "softmax": F.scaled_dot_product_attention(q, k, v),
    }[kind]
    makes: list[Make] = []
    if math.isinf(fill) or fill >= torch.finfo(dtype).min:
        makes.append(make)
    if math.isfinite(fill):
        makes.append(by_product)
    for mask in makes:
        result = rewrite(attend(mask), *given)
        assert result.reasons == []
        # Scores next to -10000 and -65504 are multiples of 2**-10 and 2**-8 for dense attention.
        assert result.error < max(4 * torch.finfo(dtype).eps, 4e-3 if kind == "softmax" else 1e-6)
        assert float((result.output[1] - expected[1]).abs().max()) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "minus_infinity"])
def test_zeros_of_dense_attention_without_a_key(backend: SDPBackend, boolean: bool) -> None:
    """What the op follows: torch defines no result for such rows."""
    q, k, v, valid = some_empty()
    mask = valid[:, None, None]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, mask if boolean else mask.float().log())
    assert not out[1].any()
    assert out[0].any()


Spelling = Callable[[Tensor, Tensor, float], Tensor]
SPELLINGS: dict[str, Spelling] = {
    "masked_fill": lambda s, m, x: s.masked_fill(~m, x),
    "where": lambda s, m, x: torch.where(m, s, x),
    "where_of_tensors": lambda s, m, x: torch.where(m, s, torch.full_like(s, x)),
    "added": lambda s, m, x: s + (1 - m.float()) * x,
    "subtracted": lambda s, m, x: s - (1 - m.float()) * -x,
    "added_and_scaled": lambda s, m, x: (2 * s + (1 - m.float()) * x) * 0.5,
    "added_and_negated": lambda s, m, x: -(-s - (1 - m.float()) * x),
}


def written_out(spelling: Spelling, fill: float, scale: float = D**-0.5) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = spelling((q @ k.mT) * scale, m[:, None, None], fill)
        return scores.softmax(-1) @ v

    return function


@pytest.mark.parametrize("fill", [-20000.0, -1e4 * 2**17, LOWEST])
@pytest.mark.parametrize("name", SPELLINGS)
def test_number_in_written_out_attention(name: str, fill: float) -> None:
    result = rewrite(written_out(SPELLINGS[name], fill), *some_empty())
    assert result.reasons == []
    assert result.error < (4e-3 if fill == -20000.0 else 1e-6)
    averaged = fill < -20000.0 or name in ("masked_fill", "where", "where_of_tensors")
    mean = some_empty()[2].mean(2, keepdim=True)[1]
    assert torch.allclose(result.output[1], mean, atol=1e-6) == averaged


def test_infinity_in_written_out_attention_gives_zeros_in_place_of_nan() -> None:
    for name in ("masked_fill", "where"):
        result = rewrite(written_out(SPELLINGS[name], -math.inf), *some_empty())
        assert len(result.ops) == 1
        assert result.expected[1].isnan().all()
        assert not result.output[1].any()
        torch.testing.assert_close(result.output[0], result.expected[0])


def test_half_precision_written_out() -> None:
    """Next to -10000, float16 has steps of 8 and bfloat16 steps of 64."""

    def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        bias = (1 - m.to(q.dtype))[:, None, None] * -10000.0
        return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v

    result = rewrite(added, *some_empty(torch.float16))
    assert "multiples of 8" in result.reasons[0]
    result = rewrite(added, *some_empty(torch.bfloat16))
    assert len(result.ops) == 1
    assert result.error < 2e-2


NO_ZERO: dict[str, Make] = {
    "shifted": lambda m: (1.0 - m.float()) * -10000.0 - 10000.0,
    "raised": lambda m: m.float() * 10000.0,
    "small_shift": lambda m: torch.where(m, 3.0, -math.inf),
    "three_levels": lambda m: (1.0 - m.float()) * -10000.0 + (torch.arange(T) >= 9) * -20000.0,
    "two_levels_and_infinity": lambda m: ((1.0 - m.float()) * -10000.0).masked_fill(
        torch.arange(T) >= 9, -math.inf
    ),
    "far_below": lambda m: (1.0 - m.float()) * -1e9 + (torch.arange(T) >= 9) * -1e10,
}


@pytest.mark.parametrize("name", NO_ZERO)
def test_only_differences_within_a_row_count(name: str) -> None:
    result = rewrite(attend(lambda m: NO_ZERO[name](m)[:, None, None]), *some_empty())
    assert result.reasons == []
    assert result.error < 4e-3


@pytest.mark.parametrize("fill", [-1e4, -1e9, LOWEST])
def test_padded_rows_of_an_outer_product_are_averages_too(fill: float) -> None:
    """Those of padding queries weigh all keys alike, padding too."""

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~(m[:, None, None] & m[:, None, :, None]), fill)
        return scores.softmax(-1) @ v

    for given in (inputs(), some_empty()):
        result = rewrite(function, *given)
        assert len(result.ops) == 1
        assert result.error < 1e-6


def test_averages_of_grouped_heads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        scores = (q @ k.mT).masked_fill(~(m[:, None, None] & m[:, None, :, None]), -1e9)
        return scores.softmax(-1) @ v

    *tensors, valid = inputs(heads=4)
    valid[1] = False
    result = rewrite(function, *tensors, valid)
    assert len(result.ops) == 1
    assert result.error < 1e-6


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "several_numbers": (
        lambda q, k, v, m: (
            (q @ k.mT + (1 - m.float())[:, None, None] * -1e4)
            .masked_fill((torch.arange(T) > 9), -1e4)
            .softmax(-1)
            @ v
        ),
        "several masks remove keys by finite numbers",
    ),
    "infinity_replaced_again": (
        lambda q, k, v, m: (
            (q @ k.mT)
            .masked_fill((torch.arange(T) > 9), -math.inf)
            .masked_fill(~m[:, None, None], -1e4)
            .softmax(-1)
            @ v
        ),
        "after others removed keys by -inf",
    ),
    "between_softmax_and_average": (
        attend(lambda m: ((1 - m.float()) * -1e7)[:, None, None]),
        "multiples of 1; use a boolean mask",
    ),
    "much_added_to_what_takes_part": (
        attend(lambda m: (m.float() * 1e9)[:, None, None]),
        "add 0 to them",
    ),
    "lowest_number_for_whole_rows": (
        attend(lambda m: ((1 - m.float()) * LOWEST)[:, None, :, None]),
        "round their scores away",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_reproduced_stay_dense(name: str) -> None:
    function, reason = REFUSED[name]
    result = rewrite(function, *some_empty())
    assert result.ops == []
    assert reason in result.reasons[0]


def test_number_that_a_whole_row_shares_changes_nothing() -> None:
    make = attend(lambda m: ((1 - m.float()) * -1e4)[:, None, :, None])
    result = rewrite(make, *some_empty())
    assert result.ops[0].args[3] is None
    assert result.error < 4e-3


def test_rows_without_a_key_are_averages_at_any_sparsity() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = (1 - m.float()) * LOWEST
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])

    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, H, 256, D, generator=generator) for _ in range(3))
    valid = torch.ones(B, 256, dtype=torch.bool)
    valid[1] = False
    sparse = Policy(sparsity=0.7, min_tokens=0, block_size=16, impl="reference")
    result = rewrite(function, q, k, v, valid, policy=sparse)
    assert len(result.ops) == 1
    torch.testing.assert_close(result.output[1], result.expected[1], atol=1e-5, rtol=1e-5)
    assert result.error > 1e-3  # the other entry is approximated


@pytest.mark.parametrize("fill", [-1e4, LOWEST])
def test_dynamic_lengths(fill: float) -> None:
    make = attend(lambda m: ((1 - m.float()) * fill)[:, None, None])
    result = rewrite(make, *some_empty(), dynamic=True)
    assert len(result.ops) == 1
    assert result.error < 4e-3
