"""What `backend="pisa"` does to known and unknown models when nothing else is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pisa_compile as pisa
from benchmarks.diffusers_models import CASES
from pisa_compile import Schedule
from pisa_compile.policies.policy import DEFAULT
from pisa_compile.policies.presets import PRESETS, Place, Presets
from pisa_compile.report.explain import Site

from ..models import Block, tiny, tokens

TABLE = (Path(__file__).parents[2] / "docs/presets.md").read_text()
# Tiny models are shorter than what pays.
SHORT = {"inner": "eager", "min_tokens": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sites(model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Site, ...]:
    compiled = torch.compile(model, backend="pisa", options={**SHORT, **options})
    return pisa.explain(compiled, **inputs).sites


def self_attention(found: tuple[Site, ...]) -> dict[str, Site]:
    """Sites of the blocks, by their name without the number of the attention."""
    return {
        site.module.rsplit(".", 1)[0]: site
        for site in found
        if re.search(r"blocks\.\d+\.(attn|attn1)$", site.module) and "refiner" not in site.module
    }


def video(dense_first: float, without_steps: float) -> Schedule:
    return Schedule(dense_first=dense_first, without_steps=without_steps)


# Class: dense blocks, sparse blocks, sparsity, schedule. The models have one to three blocks.
EXPECTED: dict[str, tuple[set[str], set[str], float, Schedule | None]] = {
    "FluxTransformer2DModel": (
        {"transformer_blocks.0", "transformer_blocks.1"},
        {"single_transformer_blocks.0", "single_transformer_blocks.1"},
        0.85,
        None,
    ),
    "SD3Transformer2DModel": (
        {"transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"},
        set(),
        0.7,
        None,
    ),
    "WanTransformer3DModel": ({"blocks.0"}, {"blocks.1"}, 0.875, video(0.2, 0.7)),
    "HunyuanVideoTransformer3DModel": (
        {"transformer_blocks.0"},
        {"single_transformer_blocks.0"},
        0.875,
        video(0.2, 0.7),
    ),
    "CogVideoXTransformer3DModel": (
        {"transformer_blocks.0"},
        {"transformer_blocks.1"},
        0.75,
        video(0.2, 0.7),
    ),
    "LTXVideoTransformer3DModel": (
        {"transformer_blocks.0"},
        {"transformer_blocks.1"},
        0.5,
        video(0.1, 0.5),
    ),
    "AllegroTransformer3DModel": (
        {"transformer_blocks.0"},
        {"transformer_blocks.1"},
        0.5,
        video(0.1, 0.5),
    ),
    "DiTTransformer2DModel": (
        set(),
        {"transformer_blocks.0", "transformer_blocks.1"},
        0.7,
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", EXPECTED)
def test_zero_code_change(name: str) -> None:
    pytest.importorskip("diffusers")
    dense, sparse, sparsity, schedule = EXPECTED[name]
    case = CASES[name]
    found = self_attention(sites(case.build(), case.inputs()))
    assert {block for block, site in found.items() if not site.replaced} == dense
    assert {block for block, site in found.items() if site.replaced} == sparse
    for site in found.values():
        assert (site.policy.sparsity, site.policy.schedule) == (sparsity, schedule)
        if not site.replaced:
            assert re.fullmatch(f"the preset of {name} keeps layer \\d+ dense", site.reason)


def test_a_model_that_no_preset_knows_gets_the_careful_default() -> None:
    found = sites(tiny(), {"x": tokens()})
    assert [site.policy.sparsity for site in found] == [DEFAULT.sparsity] * 2 == [0.7] * 2
    assert [site.policy.schedule for site in found] == [None, None]


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel"])
def test_blocks_compiled_one_by_one_are_known_by_their_class(name: str) -> None:
    pytest.importorskip("diffusers")
    case, (_, _, sparsity, schedule) = CASES[name], EXPECTED[name]
    model = case.build()
    model.compile_repeated_blocks(backend="pisa", options=SHORT)
    replaced = [site for site in pisa.explain(model, **case.inputs()).sites if site.replaced]
    assert replaced
    for site in replaced:
        assert (site.policy.sparsity, site.policy.schedule) == (sparsity, schedule)
    # Which layer it is cannot be seen there, and the report says what to do about it.
    notes = [note for site in replaced for note in site.notes if "layer 0" in note]
    assert notes
    assert "pisa.set_policy" in notes[0]


def test_steps_of_a_preset_are_followed() -> None:
    pytest.importorskip("diffusers")
    case = CASES["WanTransformer3DModel"]
    model, inputs = case.build(), case.inputs()
    run = torch.compile(model, backend="pisa", options={**SHORT, "block_size": 16})
    with torch.no_grad(), pisa.denoising(10) as loop:
        dense = model(**inputs)[0]
        same = [torch.allclose(run(**inputs)[0], dense, atol=1e-4) for _ in loop]
    assert same == [True] * 2 + [False] * 8


def wan_site(options: dict[str, Any], *policies: tuple[str, pisa.Policy]) -> dict[str, Site]:
    pytest.importorskip("diffusers")
    case = CASES["WanTransformer3DModel"]
    model = case.build()
    pisa.set_policy(model, dict(policies))
    return self_attention(sites(model, case.inputs(), **options))


def test_options_go_before_presets_field_by_field() -> None:
    found = wan_site({"sparsity": 0.5, "block_size": 16})
    policy = found["blocks.1"].policy
    assert (policy.sparsity, policy.block_size) == (0.5, 16)
    assert policy.schedule == Schedule(dense_first=0.2)
    assert not found["blocks.0"].replaced
    found = wan_site({"schedule": Schedule()})
    assert found["blocks.1"].policy.varying is None


def test_policies_on_modules_go_before_presets() -> None:
    found = wan_site({}, ("blocks.0", pisa.Policy(sparsity=0.9)))
    assert found["blocks.0"].replaced
    assert found["blocks.0"].policy.sparsity == 0.9


def test_presets_can_be_switched_off_or_named() -> None:
    found = wan_site({"preset": None})
    assert all(site.replaced for site in found.values())
    assert {site.policy.sparsity for site in found.values()} == {DEFAULT.sparsity}
    found = sites(tiny(), {"x": tokens()}, preset="WanTransformer3DModel")
    assert [site.policy.sparsity for site in found] == [0.875] * 2


@pytest.mark.parametrize(
    ("preset", "error", "words"),
    [("wan", ValueError, "None, 'auto' or one of .*'WanTransformer3DModel'.*'wan'"),
     (True, TypeError, "a string or None, got True")],
)  # fmt: skip
def test_bad_presets(preset: Any, error: type[Exception], words: str) -> None:
    from pisa_compile.options import parse

    with pytest.raises(error, match=words):
        parse(None, {"preset": preset})


def test_members_of_a_family_are_told_by_their_heads() -> None:
    place = Place(((("WanTransformerBlock", "Module"), "blocks.3"),), heads=12)
    policy, remark = Presets().choose(place)
    assert policy is not None
    assert policy.schedule == Schedule(dense_first=0.3, without_steps=0.7)
    assert remark is None
    assert Presets().choose(Place(((("Block",), "blocks.3"),))) == (None, None)


def test_a_subclass_has_the_preset_of_its_base() -> None:
    class Base(Block):
        pass

    Base.__name__ = "WanTransformerBlock"

    class Own(Base):
        pass

    model = tiny(2)
    model.blocks[1].__class__ = Own
    found = sites(model, {"x": tokens()})
    assert [site.policy.sparsity for site in found] == [0.7, 0.875]


def test_exported_programs_have_presets_too() -> None:
    pytest.importorskip("diffusers")
    case = CASES["CogVideoXTransformer3DModel"]
    model = case.build()
    program = torch.export.export(model, (), case.inputs())
    out = pisa.rewrite(program, pisa.Policy(min_tokens=0))
    ops = [node for node in out.graph.nodes if node.target is torch.ops.pisa.attention.default]
    assert [op.kwargs["sparsity"] for op in ops] == [0.7]  # layer 0 is dense, no step is known


def test_every_preset_is_in_the_table_with_its_numbers() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", TABLE, flags=re.MULTILINE))
    assert rows.keys() == PRESETS.keys()
    for name, preset in PRESETS.items():
        for policy in (preset.policy, *preset.by_heads.values()):
            assert f"{policy.sparsity:g}" in rows[name]
            if policy.schedule is not None:
                assert f"{policy.schedule.dense_first:.0%}" in rows[name]
                assert f"{policy.schedule.without_steps:g}" in rows[name]
        for layers in preset.dense_layers.values():
            assert (f"0-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}") in rows[name]
        assert "arXiv" in rows[name] or "http" in rows[name]
    assert f"sparsity {DEFAULT.sparsity:g}" in TABLE
