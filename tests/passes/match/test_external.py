"""Attention kernels of other libraries are named in the report and left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.passes import attention_kernel

from ...models import tiny, tokens
from ..tracing import rewrite

B, T, H, D = 2, 40, 3, 16


@torch.library.custom_op("flash_attn_like::_flash_attn_forward", mutates_args=())
def flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """[B, T, H, D], with a log-sum-exp, as flash-attn registers it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lse = (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous(), lse


@flash_attn_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q).contiguous(), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("xformers_like::memory_efficient_attention", mutates_args=())
def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flash_attn_forward(query, key, value)[0].clone()


@memory_efficient_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query).contiguous()


@torch.library.custom_op("rotary_like::apply_flash_rotary", mutates_args=())
def apply_flash_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.flip(-1) * sin


@apply_flash_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator) for _ in range(3))
    return q, k, v


def by_overload(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.flash_attn_like._flash_attn_forward.default(q, k, v)[0]


def by_packet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.flash_attn_like._flash_attn_forward(q, k, v)[0]


def by_keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return memory_efficient_attention(query=q, key=k, value=v)


@pytest.mark.parametrize("function", [by_overload, by_packet, by_keywords])
def test_kernel_is_a_near_miss(function: object) -> None:
    q, k, v = inputs()
    result = rewrite(function, q, k[:, :7], v[:, :7])
    assert result.ops == []
    (decision,) = result.decisions
    name = "xformers_like::memory" if function is by_keywords else "flash_attn_like::_flash_attn"
    assert name in decision.reason
    assert "call F.scaled_dot_product_attention instead" in decision.reason
    assert decision.query_shape == (B, H, T, D)
    assert decision.key_shape == (B, H, 7, D)
    assert result.error == 0.0


def test_other_operators_are_not_attention() -> None:
    q, k, v = inputs()
    assert rewrite(lambda q, k, v: apply_flash_rotary(q, k, v), q, k, v).decisions == []
    assert attention_kernel(torch.ops.aten.add.Tensor) is None
    assert attention_kernel(torch.ops.pisa.attention.default) is None


def test_report_gives_its_flops_no_share_in_what_is_saved() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            q = x.unflatten(-1, (2, -1))
            return by_overload(q, q, q).flatten(2)

    compiled = torch.compile(
        Model(), backend="pisa", options={"min_tokens": 0, "inner": "eager", "sparsity": 0.5}
    )
    report = pisa.explain(compiled, tokens())
    assert [site.replaced for site in report.sites] == [True, False]
    assert report.sites[0].dense_flops == report.sites[1].dense_flops
