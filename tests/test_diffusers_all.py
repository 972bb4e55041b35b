"""Every transformer class of diffusers, timm's attention and DiT: found, decided on, unchanged.

The same rows as docs/support-matrix.md. Most of them are slow to trace; a few, one of each kind,
run always.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks.diffusers_models import CASES, diffusers_classes
from benchmarks.diffusers_models.measure import Row, UntraceableError, measure

pytest.importorskip("diffusers")
# The models belong to other libraries, and so do their deprecations.
pytestmark = pytest.mark.filterwarnings("default")

DIFFUSERS = "0.42.1"
RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "support_matrix.json"

ALWAYS = {
    "facebookresearch/DiT, attention by hand",
    "timm Attention",
    "ChromaTransformer2DModel/mask, batch of 2",
    "HunyuanVideoTransformer3DModel, batch of 2",
    "QwenImageTransformer2DModel/mask",
    "MochiTransformer3DModel",
}

# Why sites stay dense, besides cross-attention, and in which models.
DENSE = {
    # The sliding window of every other layer.
    "AceStepTransformer1DModel": "varies over queries",
    # The published code adds its 0/1 mask to the logits.
    "CogView4Transformer2DModel/mask": "adds [1.0] to the logits",
    # The text pathway of a language model.
    "Cosmos3OmniTransformer": "causal",
    "MiniMaxMusic3RVQDepthDecoder": "causal",
    "OmniGenTransformer2DModel": "additive",
    "PriorTransformer": "additive",
    "QwenImage21Transformer2DModel": "varies over queries",
    # A block-diagonal mask from packed samples.
    "Ideogram4Transformer2DModel": "varies over queries",
    # Blocks of tokens, chosen while it runs, or causal between chunks.
    "AnyFlowFARTransformer3DModel": "block mask",
    "Kandinsky6SRTransformer3DModel": "block mask",
    # The text refiner, whose outer-product mask is then changed in place.
    "HunyuanImageTransformer2DModel": "varies over queries",
    "HunyuanVideoTransformer3DModel": "varies over queries",
    "HunyuanVideo15Transformer3DModel": "varies over queries",
    "HunyuanVideoFramepackTransformer3DModel": "varies over queries",
    # A learned bias from residue pairs.
    "RFD4ProteinaTransformer": "additive",
}
# Calls that no graph contains, because Dynamo itself runs their frames in eager mode.
LOST = {"MochiTransformer3DModel": 2}
CAPTURE = "set torch._dynamo.config.capture_dynamic_output_shape_ops = True"


def cases() -> list[object]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_attention_is_found_decided_on_and_unchanged(name: str) -> None:
    try:
        row = measure(CASES[name])
    except (ImportError, UntraceableError) as error:
        pytest.skip(str(error))
    assert_sound(row)
    assert sum(row.lost.values()) == LOST.get(name, 0), row.lost
    assert all(CAPTURE in advice for advice in row.advice)
    allowed = ("cross-attention", DENSE.get(name.partition(", batch")[0], "cross-attention"))
    for reason in row.kept:
        assert any(text in reason for text in allowed), reason
    recorded = {row["name"]: row for row in json.loads(RECORD.read_text())["rows"]}[name]
    counts = (row.eager, row.found, row.replaced)
    assert counts == (recorded["eager"], recorded["found"], recorded["replaced"]), (
        "run benchmarks/support_matrix.py again"
    )


def test_mochi_is_found_whole_when_dynamic_output_shapes_are_captured() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        row = measure(CASES["MochiTransformer3DModel"])
    assert_sound(row)
    assert (row.eager, row.found, row.replaced) == (3, 3, 2)
    assert row.graph_breaks == 0


@pytest.mark.skipif(
    metadata.version("diffusers") != DIFFUSERS, reason=f"the cases are those of {DIFFUSERS}"
)
def test_every_transformer_class_of_diffusers_has_a_case() -> None:
    assert set(diffusers_classes()) <= {name.partition("/")[0] for name in CASES}


def assert_sound(row: Row) -> None:
    assert row.found + sum(row.lost.values()) == row.eager
    assert row.not_traced == row.lost  # what a user is told, against the count in eager mode
    assert row.added_graph_breaks == 0
    assert row.difference <= row.tolerance * max(1.0, row.scale)
    if row.replaced:
        assert row.change > 10 * row.difference  # the op did run, and attention matters
