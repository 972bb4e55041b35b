from __future__ import annotations

import functools
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa
from pisa_compile.report.recording import recording

from ..models import tiny, tokens


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
    # Of 4 blocks 2 stay exact; routing, 2 centroids, the first-order matrix and the correction of
    # each block's mass are added.
    exact, full = 2 * 64, 256
    routing, centroids, correction = 4 * 4 * 16, 256 * 2 * 32, 4 * 16
    first_order = (256 + 256) * 16 * 16
    per_head = 2 * (256 * exact * 32 + routing + centroids + first_order + correction)
    assert sparse.flops == 2 * per_head
    assert sparse.dense_flops == 2 * 2 * full * 256 * 32
    assert report.flops_saved == pytest.approx(sparse.flops_saved / 2)
    text = str(report)
    for words in ("blocks.1.attn", "1x2x256x16", "sparse", "DENSE", report.summary):
        assert words in text
    assert report.summary.startswith("1 of 2 attention sites replaced in 1 compiled graph")


def test_key_blocks_of_another_size_reach_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(), tokens()
    options = {"min_tokens": 0, "inner": "eager", "sparsity": 0.5, "key_block_size": 16}
    compiled = torch.compile(model, backend="pisa", options=options)
    report = pisa.explain(compiled, x)
    assert "blocks 64 x 16" in str(report)
    # As above, with 16 key blocks of which 8 stay exact.
    routing, centroids, correction = 4 * 16 * 16, 256 * 8 * 32, 16 * 16
    per_head = 2 * (256 * 128 * 32 + routing + centroids + 512 * 16 * 16 + correction)
    assert report.sites[0].flops == 2 * per_head
    with torch.no_grad():
        out = compiled(x)
        attention = functools.partial(pisa.attention, sparsity=0.5, key_block_size=16)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        torch.testing.assert_close(out, model(x))


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


class Untraced(nn.Module):
    """Attention of every kind in code that Dynamo is kept out of, after a model that it traces."""

    def __init__(self) -> None:
        super().__init__()
        self.traced = tiny(1)
        self.block = tiny(1).blocks[0]
        self.mha = nn.MultiheadAttention(32, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.block.attn.forward = torch.compiler.disable(self.block.attn.forward)

    @torch.compiler.disable
    def apart(self, x: Tensor) -> Tensor:
        x = self.layer(self.mha(x, x, x, need_weights=False)[0])
        weights = F.dropout((x @ x.mT).softmax(-1).to(torch.float32), 0.0)
        softmax_of_logits = x[0].softmax(-1) @ x[0].mT  # of two dimensions: not attention
        return weights @ x + softmax_of_logits.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(self.block(self.traced(x)))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_attention_outside_of_every_graph_is_counted_and_named(inner: str) -> None:
    model, x = Untraced().eval(), tokens(64)
    options = {"min_tokens": 0, "inner": inner}
    compiled = torch.compile(model, backend="pisa", options=options)
    with torch.no_grad():
        compiled(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report = pisa.explain(compiled, x)
    (site,) = report.sites
    assert (site.module, site.replaced) == ("traced.blocks.0.attn", True)
    assert [(call.module, call.kind, call.calls) for call in report.not_traced] == [
        ("block.attn", "scaled_dot_product_attention", 1),
        ("mha", "_native_multi_head_attention", 1),
        ("layer", "_transformer_encoder_layer_fwd", 1),
        ("", "softmax and product", 1),
    ]
    assert report.not_traced[0].query_shape == (1, 2, 64, 16)
    assert "TORCH_LOGS=graph_breaks" in report.not_traced[0].reason
    assert report.summary.endswith("in them; 4 attention calls not traced")
    text = str(report)
    assert "not traced" in text
    assert "block.attn" in text
    # Watching costs nothing and leaves nothing behind.
    assert pisa.explain(compiled, x) == report
    with torch.no_grad():
        compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_calls_outside_of_graphs_are_added_up_by_place() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = tiny(1).blocks[0]
            self.block.attn.forward = torch.compiler.disable(self.block.attn.forward)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    report = pisa.explain(Loop(), tokens(64))
    assert [(call.module, call.calls) for call in report.not_traced] == [("block.attn", 3)]
    assert report.summary.endswith("3 attention calls not traced")


class KeptTokens(nn.Module):
    """As in Mochi: the tokens of a mask are picked in a loop, which Dynamo breaks at."""

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        out = []
        for tokens_, mask in zip(x, kept, strict=True):
            q = tokens_[torch.nonzero(mask).flatten()][None, None]
            out.append(F.scaled_dot_product_attention(q, q, q)[0, 0].sum())
        return torch.stack(out)


def test_setting_that_would_help_is_named() -> None:
    x, kept = tokens(64, batch=2), torch.rand(2, 64) > 0.5
    report = pisa.explain(KeptTokens(), x, kept)
    assert report.sites == ()
    assert sum(call.calls for call in report.not_traced) == 2
    reason = report.not_traced[0].reason
    assert "set torch._dynamo.config.capture_dynamic_output_shape_ops = True" in reason
    assert "fullgraph=True" in reason


def test_a_policy_by_name_that_stands_around_no_attention_is_told() -> None:
    named = {"blocks.0.*": pisa.Policy(sparsity=0.5), "blocks.1.mlp": pisa.Policy(sparsity=0.9)}
    options = {"inner": "eager", "min_tokens": 0, "policy": named}
    report = pisa.explain(torch.compile(tiny(), backend="pisa", options=options), tokens(100))
    assert report.notes == (
        "the policy for 'blocks.1.mlp' stands around no attention that was traced",
    )
    named = {"nomatch*": pisa.Policy(sparsity=0.9)}
    model = tiny()
    compiled = torch.compile(
        lambda x: model(x), backend="pisa", options={**options, "policy": named}
    )

    class Outer(torch.nn.Module):
        def forward(self, x):
            return compiled(x)

    with torch.no_grad(), recording() as active:
        Outer()(tokens(100))
    assert active.idle_patterns == ["nomatch*"]
