"""`torch._dynamo.aot_compile`: what the backend returns is saved, and loaded by a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.compiled import Variant
from pisa_compile.policies.presets import PRESETS
from pisa_compile.report.recording import recording

from .models import TinyTransformer, tiny, tokens

ROOT = Path(__file__).parent.parent
OPTIONS = {"min_tokens": 0, "sparsity": 0.5, "block_size": 16}
BY_STEP = pisa.Schedule(dense_first=1, steps=(0.0, 0.8, (0.25, 0.75), 0.6))
ONE_SPARSITY = pisa.Schedule(dense_first=1)

# Nothing is compiled there. The record of what ran comes along with the graph.
_FRESH = """
import torch
torch.set_num_threads(1)
with open({program!r}, "rb") as file:
    run = torch.compiler.load_compiled_function(file)
import pisa_compile as pisa
from pisa_compile.report.recording import recording
arguments = torch.load({arguments!r}, weights_only=False)
with torch.no_grad():
    with pisa.denoising({steps}) as loop:
        results = [run(*arguments) for _ in loop]
    with recording() as record:
        results.append(run(*arguments))
assert not torch._dynamo.utils.counters["stats"]
kept = [decision.replaced for decision in record.decisions]
torch.save((results, kept), {results!r})
"""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def compiled_ahead(
    model: TinyTransformer, x: Tensor, path: Path | None = None, **options: Any
) -> Any:
    """The model, compiled for inputs like `x` without being called; saved if a path is given."""
    compiled = torch.compile(model, fullgraph=True, backend="pisa", options={**OPTIONS, **options})
    with torch.no_grad():
        ahead = compiled.forward.aot_compile(((x,), {}))
    if path is not None:
        ahead.save_compiled_function(str(path))
    return ahead


def in_fresh_process(
    folder: Path, program: Path, arguments: tuple[Any, ...], steps: int = 1
) -> tuple[list[Tensor], list[bool]]:
    """Results of each step and of a call without one, and whether each site was replaced."""
    paths = {name: str(folder / f"{name}.pt") for name in ("arguments", "results")}
    torch.save(arguments, paths["arguments"])
    code = _FRESH.format(program=str(program), steps=steps, **paths)
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found: tuple[list[Tensor], list[bool]] = torch.load(paths["results"], weights_only=False)
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Both processes add up in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("inner", "schedule"),
    [
        ("inductor", None),
        ("inductor", BY_STEP),
        ("aot_eager", None),
        ("aot_eager", ONE_SPARSITY),
        ("eager", BY_STEP),
    ],
    ids=["inductor", "inductor-heads", "aot_eager", "aot_eager-steps", "eager-heads"],
)
def test_fresh_process_computes_the_same(
    inner: str, schedule: pisa.Schedule | None, tmp_path: Path
) -> None:
    steps, x, model = 4, tokens(192), tiny(2)
    options = {"inner": inner} if schedule is None else {"inner": inner, "schedule": schedule}
    compiled_ahead(model, x, tmp_path / "program", **options)
    results, replaced = in_fresh_process(tmp_path, tmp_path / "program", (model, x), steps)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="pisa", options={**OPTIONS, **options})
    with torch.no_grad():
        with pisa.denoising(steps) as loop:
            expected = [compiled(x) for _ in loop]
        expected.append(compiled(x))
        dense = model(x)
    assert all(map(torch.equal, results, expected))
    assert [torch.allclose(one, dense, atol=1e-3) for one in results] == [
        schedule is not None and step == 0 for step in range(steps + 1)
    ]
    assert replaced == [True, True]


def either(flag: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    branches = attend, lambda query, key, value: attend(key, query, value)
    result: Tensor = torch.cond(flag, *branches, (query, key, value))
    return result


def test_calls_are_counted_in_a_restored_graph() -> None:
    """It takes the numbers of its calls as an argument: control flow runs one branch of two.

    In this process: torch 2.13 saves programs with `torch.cond` and cannot load their guards.
    """
    arguments = (torch.tensor(False), *(torch.randn(1, 2, 192, 16) for _ in range(3)))
    compiled = torch.compile(either, fullgraph=True, backend="pisa", options=OPTIONS)
    with torch.no_grad():
        variant = compiled.aot_compile((arguments, {}))._artifacts.compiled_fn
        kind = type(variant)
        restored = kind.deserialize_compile_artifacts(kind.serialize_compile_artifacts(variant))
        for run in (variant, restored):
            with recording() as record:
                (result,) = run(*arguments)
            expected = attend(arguments[2], arguments[1], arguments[3])
            assert result.shape == expected.shape
            assert [decision.replaced for decision in record.decisions] == [True]
        assert torch.equal(variant(*arguments)[0], restored(*arguments)[0])


def test_functions_are_saved_too(tmp_path: Path) -> None:
    arguments = tuple(torch.randn(1, 2, 192, 16) for _ in range(3))
    compiled = torch.compile(attend, fullgraph=True, backend="pisa", options=OPTIONS)
    with torch.no_grad():
        ahead = compiled.aot_compile((arguments, {}))
        expected = ahead(*arguments)
    ahead.save_compiled_function(str(tmp_path / "program"))
    results, replaced = in_fresh_process(tmp_path, tmp_path / "program", arguments)
    assert replaced == [True]
    assert all(torch.equal(result, expected) for result in results)
    assert not torch.allclose(expected, attend(*arguments), atol=1e-3)


class FluxTransformer2DModel(TinyTransformer):
    """A model by whose name there is a preset."""


def test_preset_of_a_model_holds_when_it_is_compiled_ahead() -> None:
    x, model = tokens(192), FluxTransformer2DModel().eval()
    options = {"min_tokens": 0, "inner": "eager"}
    compiled = torch.compile(model, fullgraph=True, backend="pisa", options=options)
    with torch.no_grad():
        ahead = compiled.forward.aot_compile(((x,), {}))
        with recording() as record:
            ahead(model, x)
    expected = PRESETS["FluxTransformer2DModel"].policy.sparsity
    assert [site.policy.sparsity for site in record.decisions] == [expected] * 2


def test_policies_by_name_are_checked_when_compiled_ahead() -> None:
    named = {"nothing.*": pisa.DENSE}
    with pytest.raises(ValueError, match="'nothing"):
        compiled_ahead(tiny(1), tokens(192), inner="eager", policy=named)


def test_what_torch_cannot_save_says_what_can_be_done() -> None:
    with pytest.raises(RuntimeError, match="inner='inductor'"):
        Variant.serialize_compile_artifacts(Variant(lambda x: x, (), None, False))
