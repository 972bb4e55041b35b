"""Pipelines of diffusers, compiled with `backend="pisa"`, with what people switch on beside it.

docs/diffusers.md shows all combinations; `python -m benchmarks.pipelines` makes it with the same
code. A few of them run always.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch

import pisa_compile as pisa
from benchmarks.pipelines import __main__ as record
from benchmarks.pipelines.features import FEATURES
from benchmarks.pipelines.measure import (
    BLOCKS,
    BREAKS,
    OPTIONS,
    WHOLE,
    compile_transformer,
    counted_op,
)
from examples.pipelines import flux, hunyuan_video, wan
from examples.pipelines.tiny import TINY

# The models belong to other libraries, and so do their deprecations.
pytestmark = pytest.mark.filterwarnings("default")

ALWAYS = {
    ("WanPipeline", BLOCKS, "changing resolution"),
    ("FluxPipeline", BLOCKS, "LoRA hot-swapped"),
    ("FluxPipeline", WHOLE, "torchao int8 weights"),
    ("WanPipeline", BLOCKS, "group offload, blocks"),
    ("WanPipeline", BLOCKS, "FirstBlockCache"),
    ("WanPipeline", WHOLE, "MagCache"),
    ("HunyuanVideoPipeline", BLOCKS, "classifier-free guidance"),
    ("CogVideoXPipeline", BLOCKS, "nothing else"),
    ("StableDiffusion3Pipeline", BLOCKS, "model CPU offload"),
    ("LTXPipeline", BLOCKS, "LoRA fused"),
}


def combinations() -> list[Any]:
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*names, marks=marks[names in ALWAYS]) for names in record.combinations()]


@pytest.mark.parametrize(("pipeline", "style", "feature"), combinations())
def test_sites_stay_replaced_and_latents_the_same(pipeline: str, style: str, feature: str) -> None:
    cell = record.measured(pipeline, style, feature)
    assert not cell["problems"]
    known = {record.key(known): known for known in record.load()["cells"]}
    if recorded := known.get((pipeline, style, feature)):
        for field in ("not_offered", "used", "attention", "replaced"):
            assert cell.get(field) == recorded.get(field), (
                "run python -m benchmarks.pipelines again"
            )


def test_the_always_run_combinations_exist() -> None:
    assert set(record.combinations()) >= ALWAYS


def test_page_is_that_of_the_record() -> None:
    assert record.PAGE.read_text() == record.page(record.load(), record.PAGE.read_text())


@pytest.mark.parametrize("policy_first", [True, False], ids=["policy_first", "hook_first"])
def test_policy_of_a_block_holds_inside_hooks(tmp_path: Path, policy_first: bool) -> None:
    """Hooks break graphs around the block; the policy must not be lost outside of them."""
    tiny = TINY["WanPipeline"]
    pipe = tiny.build()
    pipe.set_progress_bar_config(disable=True)
    steps: list[Callable[[], Any]] = [
        functools.partial(pisa.set_policy, pipe.transformer, {"blocks.0": pisa.DENSE}),
        functools.partial(FEATURES["FirstBlockCache"].set_up, pipe, tmp_path),
    ]
    for step in steps if policy_first else reversed(steps):
        step()
    compile_transformer(pipe, BREAKS, backend="pisa", options={**OPTIONS, "inner": "eager"})
    calls: list[Any] = []
    with counted_op(calls):
        pipe(**tiny.arguments(), **tiny.sizes[0], num_inference_steps=1, output_type="latent")
    assert len(calls) == 1  # of two blocks


@pytest.mark.parametrize(
    ("example", "suffix"),
    [
        (flux, ".png"),
        pytest.param(wan, ".mp4", marks=pytest.mark.slow),
        pytest.param(hunyuan_video, ".mp4", marks=pytest.mark.slow),
    ],
    ids=["flux", "wan", "hunyuan_video"],
)
def test_example_runs_without_downloads(
    example: Any, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / f"out{suffix}"
    calls: list[Any] = []
    with torch.no_grad(), counted_op(calls):
        example.main(["--tiny", "--steps", "2", "--output", str(output)])
    assert output.stat().st_size > 1000
    assert calls, "nothing became sparse"
