"""Single calls follow the rules that sites of graphs follow, the cost model included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from pisa_compile import cost
from pisa_compile.integrations.call import AttentionCall, checked, refusal, sparse
from pisa_compile.policies.policy import DEFAULT

POLICY = pisa.Policy(sparsity=0.8, block_size=16)


@pytest.fixture
def pays_from_512(monkeypatch: pytest.MonkeyPatch) -> int:
    """A device whose rates say: from 512 tokens on."""
    monkeypatch.setattr(cost, "profile_of", lambda *_: cost.Profile((0.0,) * 3, (0.0,) * 4))
    monkeypatch.setattr(cost, "break_even", lambda work, profile: 512)
    return 512


def call(tokens: int, heads: int = 2, key_heads: int = 2) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, tokens, 16, generator=generator)
    key, value = (torch.randn(1, key_heads, tokens, 16, generator=generator) for _ in "kv")
    return AttentionCall(query, key, value)


def reason(given: AttentionCall, **policy: Any) -> str | None:
    return refusal(given, checked(pisa.Policy(**policy)).over(POLICY).over(DEFAULT))


def test_the_length_is_what_the_device_was_measured_to_need(pays_from_512: int) -> None:
    assert reason(call(512)) is None
    assert reason(call(400)) == (
        "400 tokens is too short to gain; on this device it pays from 512 on; "
        "min_tokens overrides that"
    )
    assert reason(call(400), min_tokens=300) is None


@pytest.mark.parametrize("dynamic", [False, None])
def test_so_it_is_where_the_call_is_traced(pays_from_512: int, dynamic: bool | None) -> None:
    def attention(query: Tensor) -> Tensor:
        out = sparse(AttentionCall(query, query, query), POLICY)
        return F.scaled_dot_product_attention(query, query, query) if out is None else out

    run = torch.compile(attention, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (512, 700, 400):
            query = call(tokens).query
            dense = F.scaled_dot_product_attention(query, query, query)
            assert torch.equal(run(query), attention(query))
            assert torch.allclose(run(query), dense, atol=1e-5) == (tokens < 512)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (call(600, heads=3, key_heads=2), "broadcasts against its query"),
        (AttentionCall(*(torch.zeros(1, 2, 600, 16, dtype=torch.int32),) * 3), "floating point"),
        (AttentionCall(*(torch.zeros(1, 2, 600, 300),) * 3), None),
    ],
    ids=["heads", "dtype", "wide heads"],
)
def test_rules_of_graphs_hold(given: AttentionCall, words: str | None) -> None:
    found = reason(given, min_tokens=1)
    assert found is None if words is None else words in (found or "")
