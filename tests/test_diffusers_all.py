"""Every transformer class of diffusers, timm's attention and DiT: found, decided on, unchanged.

The same rows as docs/support-matrix.md. Most of them are slow to trace; a few, one of each kind,
run always.
"""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from .diffusers_models import CASES, diffusers_classes
from .diffusers_models.measure import Row, measure

pytest.importorskip("diffusers")
# The models belong to other libraries, and so do their deprecations.
pytestmark = pytest.mark.filterwarnings("default")

DIFFUSERS = "0.42.1"
TOLERANCE = 1e-4

ALWAYS = {
    "facebookresearch/DiT, attention by hand",
    "timm Attention",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel/mask",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
}

CROSS = "cross-attention"
# Why sites stay dense, where it is not (only) cross-attention.
DENSE: dict[str, set[str]] = {}
# Calls that no graph contains, because Dynamo itself runs their frames in eager mode.
LOST: dict[str, int] = {"MochiTransformer3DModel": 2}


def cases() -> list[object]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_attention_is_found_decided_on_and_unchanged(name: str) -> None:
    try:
        row = measure(CASES[name])
    except ImportError as error:
        pytest.skip(f"the model library is missing: {error}")
    assert_sound(row)
    assert sum(row.lost.values()) == LOST.get(name, 0), row.lost
    allowed = DENSE.get(name, set()) | {CROSS}
    for reason in row.kept:
        assert any(text in reason for text in allowed), reason


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
    assert row.added_graph_breaks == 0
    assert row.difference <= TOLERANCE * max(1.0, row.scale)
    if row.replaced:
        assert row.change > 100 * row.difference  # the op did run, and attention matters
