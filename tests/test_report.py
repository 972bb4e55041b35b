from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa

from .models import tiny, tokens


class Mixed(nn.Module):
    """One attention of each kind that stays dense, and one that does not."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, c = x.unflatten(-1, (2, -1)).transpose(1, 2), text.unflatten(-1, (2, -1)).transpose(1, 2)
        row_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(q, q, q)
        out = out + F.scaled_dot_product_attention(q, c, c)
        out = out + F.scaled_dot_product_attention(q, q, q, is_causal=True)
        out = out + F.scaled_dot_product_attention(q, q, q, attn_mask=row_mask)
        out = out + F.scaled_dot_product_attention(q, q, q, attn_mask=x[:, None, None, :, 0])
        return out + F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


def test_every_site_has_a_decision_and_a_reason() -> None:
    compiled = torch.compile(
        Mixed(), backend="pisa", options={"min_tokens": 0, "inner": "eager", "sparsity": 0.5}
    )
    report = pisa.explain(compiled, tokens(), tokens(64))
    assert [site.replaced for site in report.sites] == [True] + [False] * 5
    reasons = [site.reason for site in report.sites[1:]]
    for reason, words in zip(
        reasons,
        ["cross-attention (256 query and 64 key tokens)", "causal", "mask", "mask", "dropout"],
        strict=True,
    ):
        assert words in reason
    assert report.sites[1].key_shape == (1, 2, 64, 16)


def test_report_as_data_and_as_text() -> None:
    model = tiny()
    pisa.set_policy(model, {"blocks.0": pisa.DENSE})
    compiled = torch.compile(
        model, backend="pisa", options={"min_tokens": 0, "inner": "eager", "sparsity": 0.5}
    )
    report = pisa.explain(compiled, tokens())
    dense, sparse = report.sites
    assert (dense.module, sparse.module) == ("blocks.0.attn", "blocks.1.attn")
    assert dense.flops_saved == 0.0
    # Of 4 blocks 2 stay exact; 2 centroids, routing and the first-order matrix are added.
    exact, full = 2 * 64, 256
    per_head = 2 * (256 * exact * 32 + 4 * 4 * 16 + 256 * 2 * 32 + (256 + 256) * 16 * 16)
    assert sparse.flops == 2 * per_head
    assert sparse.dense_flops == 2 * 2 * full * 256 * 32
    assert report.flops_saved == pytest.approx(sparse.flops_saved / 2)
    text = str(report)
    for words in ("blocks.1.attn", "1x2x256x16", "sparse", "DENSE", report.summary):
        assert words in text
    assert report.summary.startswith("1 of 2 attention sites replaced in 1 compiled graph")


def test_plain_text_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    report = pisa.explain(tiny(1), tokens())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["module", "query", "key"]
    assert lines[2].startswith("blocks.0.attn  1x2x256x16  1x2x256x16  float32  1      dense")
    assert lines[-1] == report.summary


def test_shared_graph_counts_every_call() -> None:
    model = tiny(3)
    for block in model.blocks:
        block.compile(backend="pisa", options={"min_tokens": 0, "inner": "eager"})
    (site,) = pisa.explain(model, tokens()).sites
    assert site.calls == 3


def test_repeated_reports_are_equal_and_do_not_recompile() -> None:
    model = tiny()
    first = pisa.explain(model, tokens())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert [pisa.explain(model, tokens()) for _ in range(10)] == [first] * 10
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_model_compiled_with_another_backend_is_refused() -> None:
    with pytest.raises(RuntimeError, match="compiled with another backend"):
        pisa.explain(torch.compile(tiny(), backend="eager"), tokens())
