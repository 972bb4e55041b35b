"""The transformer classes behind most pipelines, whole and by repeated blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pisa_compile as pisa
from benchmarks.diffusers_models import CASES, Case, outputs

pytest.importorskip("diffusers")

# Class: (replaced, kept because it is cross-attention).
EXPECTED = {
    "FluxTransformer2DModel": (4, 0),
    "SD3Transformer2DModel": (4, 0),
    "WanTransformer3DModel": (2, 2),
    "CogVideoXTransformer3DModel": (2, 0),
    "LTXVideoTransformer3DModel": (2, 2),
    "PixArtTransformer2DModel": (2, 2),
    "DiTTransformer2DModel": (2, 0),
}
# Inductor's own arithmetic is checked on two of them; for the others it would only cost time.
WITH_INDUCTOR = {"FluxTransformer2DModel", "DiTTransformer2DModel"}

OPTIONS = {"min_tokens": 0, "block_size": 16, "preset": None}


@torch.no_grad()
def run(model: nn.Module, case: Case) -> list[Tensor]:
    return outputs(model(**case.inputs()))


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="pisa", fullgraph=True, options={**OPTIONS, **options})


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert all(torch.isfinite(x).all() for x in actual)
    return max((a - e).abs().max().item() for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_every_self_attention_is_replaced(name: str) -> None:
    case, inner = CASES[name], "inductor" if name in WITH_INDUCTOR else "aot_eager"
    model = case.build()
    dense = run(torch.compile(model) if inner == "inductor" else model, case)
    assert max(x.abs().max().item() for x in dense) > 1

    same = compiled(model, sparsity=0.0, inner=inner)
    assert largest_difference(run(same, case), dense) < 1e-4
    sparse = compiled(model, sparsity=0.9, inner="eager")
    assert largest_difference(run(sparse, case), dense) > 1e-2

    report = pisa.explain(sparse, **case.inputs())
    replaced, cross = EXPECTED[name]
    assert report.graphs == 1
    assert report.replaced == replaced
    assert len(report.sites) == replaced + cross
    for site in report.sites:
        if not site.replaced:
            assert "cross-attention" in site.reason
            assert site.query_shape[2] != site.key_shape[2]


def test_regional_compilation_replaces_the_sites_of_every_block() -> None:
    case = CASES["FluxTransformer2DModel"]
    model = case.build()
    dense = run(model, case)
    model.compile_repeated_blocks(
        backend="pisa", fullgraph=True, options={**OPTIONS, "sparsity": 0.0, "inner": "aot_eager"}
    )
    assert largest_difference(run(model, case), dense) < 1e-4
    report = pisa.explain(model, **case.inputs())
    assert report.graphs == 4  # calls: two blocks of each of two classes
    assert report.replaced == len(report.sites) == 2  # the blocks of a class share one graph
    assert [site.calls for site in report.sites] == [2, 2]


def test_blocks_of_one_class_keep_their_own_policies_under_regional_compilation() -> None:
    case = CASES["WanTransformer3DModel"]
    model = case.build()
    dense = run(model, case)
    pisa.set_policy(model, {"blocks.0": pisa.DENSE, "blocks.1": pisa.Policy(sparsity=0.9)})
    model.compile_repeated_blocks(
        backend="pisa", fullgraph=True, options={**OPTIONS, "sparsity": 0.0, "inner": "eager"}
    )
    assert largest_difference(run(model, case), dense) > 1e-2
    sites = pisa.explain(model, **case.inputs()).sites
    decided = Counter((site.module, site.policy.enabled and site.policy.sparsity) for site in sites)
    assert decided == {
        ("blocks.0.attn1", False): 1,
        ("blocks.0.attn2", False): 1,
        ("blocks.1.attn1", 0.9): 1,
        ("blocks.1.attn2", 0.9): 1,
    }
    assert [site.module for site in sites if site.replaced] == ["blocks.1.attn1"]

    pisa.set_policy(model, {"blocks.1": pisa.Policy(sparsity=0.0)})
    assert largest_difference(run(model, case), dense) < 1e-4
