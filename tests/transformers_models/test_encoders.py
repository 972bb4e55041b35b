"""Encoders of transformers: found, decided on for true reasons, and equal at sparsity 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pisa_compile as pisa

from .cases import CASES

pytest.importorskip("transformers")
# The models belong to another library, and so do their deprecations.
pytestmark = pytest.mark.filterwarnings("default")

ALWAYS = {"BERT", "ModernBERT"}


def cases() -> Iterator[object]:
    for name, case in CASES.items():
        for attention in ("eager",) if case.written_out else ("sdpa", "eager"):
            for padded in (False, True)[: 1 + case.pads]:
                always = name in ALWAYS and padded and attention == "sdpa"
                marks = () if always else pytest.mark.slow
                label = f"{name}-{attention}{'-padded' * padded}"
                yield pytest.param(name, attention, padded, marks=marks, id=label)


@pytest.mark.parametrize(("name", "attention", "padded"), list(cases()))
@torch.no_grad()
def test_encoder(name: str, attention: str, padded: bool) -> None:
    case = CASES[name]
    model, inputs = case.build(attention), case.inputs(padded=padded)
    expected = model(**inputs)[0]
    options = {"sparsity": 0.0, "min_tokens": 1, "inner": "eager"}
    compiled = torch.compile(model, backend="pisa", options=options)
    report = pisa.explain(compiled, **inputs)
    assert sum(site.calls for site in report.sites if site.replaced) == case.replaced[padded]
    reasons = case.reasons[padded]
    kept = [site.reason for site in report.sites if not site.replaced]
    assert bool(kept) == bool(reasons)
    assert all(any(part in reason for part in reasons) for reason in kept), kept
    assert not report.not_traced
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_text_that_is_padding_alone(attention: str) -> None:
    """Zeros from `F.scaled_dot_product_attention`, an average from attention written out."""
    case = CASES["BERT"]
    model, inputs = case.build(attention), case.inputs(padded=True)
    inputs["attention_mask"][1] = 0
    options = {"sparsity": 0.0, "min_tokens": 1, "inner": "eager"}
    compiled = torch.compile(model, backend="pisa", options=options)
    assert pisa.explain(compiled, **inputs).replaced == 2
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
