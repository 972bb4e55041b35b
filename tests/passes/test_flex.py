from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .tracing import rewrite

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")

Function = Callable[[Tensor, Tensor, Tensor], object]


def inputs(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 64, 16, generator=generator)
    k, v = (torch.randn(2, kv_heads, 64, 16, generator=generator) for _ in range(2))
    return q, k, v


def block_mask(allowed: Callable[..., Tensor]) -> object:
    return create_block_mask(allowed, 2, None, 64, 64, device="cpu")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_flex_attention(scale: float | None, dynamic: bool) -> None:
    result = rewrite(
        lambda q, k, v: flex_attention(q, k, v, scale=scale), *inputs(), dynamic=dynamic
    )
    (op,) = result.ops
    assert op.kwargs["scale"] == pytest.approx(scale or 0.25)
    assert result.error < 1e-5


def test_grouped_queries() -> None:
    result = rewrite(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *inputs(2))
    assert result.ops[0].kwargs["enable_gqa"]
    assert result.error < 1e-5


REFUSED: dict[str, tuple[Function, str]] = {
    "score_mod": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)),
        "score_mod",
    ),
    "causal": (
        lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask(lambda b, h, i, j: i >= j)),
        "block mask",
    ),
    "padding": (
        lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask(lambda b, h, i, j: j < 40)),
        "F.scaled_dot_product_attention",
    ),
    "lse": (lambda q, k, v: flex_attention(q, k, v, return_lse=True), "return_lse=False"),
}


@pytest.mark.filterwarnings("ignore:.*return_lse is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_other_flex_attention_stays_dense(name: str) -> None:
    function, reason = REFUSED[name]
    result = rewrite(function, *inputs())
    assert result.ops == []
    assert [reason in decision.reason for decision in result.decisions] == [True]
