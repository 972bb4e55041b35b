"""Attention inside transforms of torch.func: it compiles, stays dense, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..tracing import rewrite

# Of torch's own, in eager mode.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

B, H, T, D = 2, 3, 20, 8


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    return q, k, v


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written(q, k, v).sum()


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.vmap(written)(q, k, v)


def mapped_operator(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.vmap(F.scaled_dot_product_attention)(q, k, v)


def mapped_over_the_queries_alone(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.vmap(lambda q: written(q, k, v))(q)


def mapped_over_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Any:
    masks = torch.ones(B, T, dtype=torch.bool).cumsum(1) < 9
    return torch.vmap(lambda m: F.scaled_dot_product_attention(q, k, v, m))(masks[:, None])


def gradient(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.func.grad(total)(q, k, v)


def gradient_of_the_operator(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q)


def tangent(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.func.jvp(lambda q: written(q, k, v), (q,), (v,))


def mapped_gradient(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.vmap(torch.func.grad(total))(q, k, v)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (mapped, "inside torch.vmap"),
        (mapped_operator, "inside torch.vmap"),
        (mapped_over_the_queries_alone, "inside torch.vmap"),
        (mapped_over_a_mask, "inside torch.vmap"),
        (gradient, "inside a derivative of torch.func"),
        (gradient_of_the_operator, "inside a derivative of torch.func"),
        (tangent, "inside a derivative of torch.func"),
        (mapped_gradient, "torch."),
    ],
)
def test_transform_keeps_attention_dense(function: Callable[..., Any], reason: str) -> None:
    result = rewrite(function, *inputs())
    assert len(result.decisions) == 1
    assert reason in result.reasons[0]
    assert result.error < 1e-6


def test_opaque_module_under_vmap() -> None:
    layer = nn.MultiheadAttention(D, 2, batch_first=True).eval()
    result = rewrite(
        lambda x: torch.vmap(lambda x: layer(x, x, x, need_weights=False)[0])(x), inputs()[0]
    )
    assert all("inside torch.vmap" in reason for reason in result.reasons)
    assert len(result.decisions) == 1
    assert result.error < 1e-6


def test_attention_beside_a_transform_is_replaced() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return written(q, k, v) + torch.vmap(torch.sin)(q)

    result = rewrite(function, *inputs())
    assert len(result.ops) == 1
    assert result.error < 1e-5
