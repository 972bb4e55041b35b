"""The audit that the support matrix trusts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

import pisa_compile as pisa
from benchmarks.diffusers_models.audit import Coverage, record_eager

from .models import tiny, tokens


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(-2, -1)).softmax(dim=-1)
        return torch.dropout(weights, 0.0, train=False).to(x.dtype) @ x


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_hand = ByHand()
        self.mha = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mha(self.by_hand(x), x, x, need_weights=False)[0]
        return flex_attention.flex_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_calls_are_recorded_with_module_shapes_and_mask() -> None:
    model, x = tiny(depth=2), tokens(64)
    result, calls = record_eager(model, {"x": x})
    torch.testing.assert_close(result, model(x))
    assert [call.module for call in calls] == ["blocks.0.attn", "blocks.1.attn"]
    assert {call.kind for call in calls} == {"sdpa"}
    assert calls[0].query_shape == (1, 2, 64, 16)
    assert calls[0].mask == ""


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_other_spellings_are_recorded() -> None:
    _, calls = record_eager(Opaque().train(), {"x": tokens(64)})
    assert [(call.module, call.kind) for call in calls] == [
        ("by_hand", "softmax and product"),
        ("mha", "multi_head_attention"),
        ("", "flex_attention"),
    ]


def test_coverage_names_what_a_graph_break_loses() -> None:
    model = tiny(depth=2)
    model.blocks[1].attn.forward = torch.compiler.disable(model.blocks[1].attn.forward)
    x = tokens(64)
    _, calls = record_eager(model, {"x": x})
    report = pisa.explain(model, x)
    coverage = Coverage.of(calls, report)
    assert [call.module for call in report.not_traced] == ["blocks.1.attn"]  # counted otherwise
    assert (coverage.eager, coverage.found) == (2, 1)
    assert dict(coverage.lost) == {"blocks.1.attn": 1}
    assert not coverage.unexplained
