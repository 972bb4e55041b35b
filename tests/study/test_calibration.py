"""Calibration: the solver, the files, and the whole on a small model."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pisa_compile as pisa
from pisa_compile.cost import Workload
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.policies.file import load_policy, save_policy
from pisa_compile.policies.policy import DEFAULT
from pisa_compile.study.calibration.allocation import allocate, allocate_error
from pisa_compile.study.calibration.errors import ErrorTable, SiteErrors
from pisa_compile.study.calibration.plan import Plan
from pisa_compile.study.calibration.sensitivity import fit_factors, step_groups

from .. import models

STEPS = 4


def items(seed: int, count: int, choices: int) -> tuple[Tensor, Tensor]:
    """Convex trade-offs: each further unit of cost gains less."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(count, choices, generator=generator, dtype=torch.float64).cumsum(1)
    gain = torch.rand(count, choices, generator=generator, dtype=torch.float64)
    error = gain.sort(descending=True).values.flip(1).cumsum(1).flip(1)
    return error, cost


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.0, 1.0))
def test_allocation_is_close_to_the_best_of_all_choices(
    seed: int, count: int, share: float
) -> None:
    error, cost = items(seed, count, 3)
    cheapest, dearest = float(cost.amin(1).sum()), float(cost.amax(1).sum())
    budget = cheapest + share * (dearest - cheapest)
    chosen = allocate(error, cost, budget)
    spent = float(cost.gather(1, chosen[:, None]).sum())
    reached = float(error.gather(1, chosen[:, None]).sum())
    assert spent <= budget * (1 + 1e-6)
    possible = [
        sum(float(error[i, c]) for i, c in enumerate(choice))
        for choice in itertools.product(range(3), repeat=count)
        if sum(float(cost[i, c]) for i, c in enumerate(choice)) <= budget
    ]
    # A relaxation may miss the optimum by what one item can change.
    assert reached <= min(possible, default=reached) + float(error.amax())


def test_allocation_with_a_thousand_items_beats_every_even_choice() -> None:
    error, cost = items(0, 1000, 5)
    for even in range(1, 4):  # the cheapest and the dearest leave nothing to choose
        chosen = allocate(error, cost, float(cost[:, even].sum()))
        assert float(error.gather(1, chosen[:, None]).sum()) < float(error[:, even].sum())
        chosen = allocate_error(error, cost, float(error[:, even].sum()))
        assert float(error.gather(1, chosen[:, None]).sum()) <= float(error[:, even].sum()) * (
            1 + 1e-6
        )


def test_impossible_budgets_say_so() -> None:
    error, cost = items(1, 3, 2)
    with pytest.raises(ValueError, match="more than the budget"):
        allocate(error, cost, float(cost.amin(1).sum()) * 0.9)
    with pytest.raises(ValueError, match="allow a larger error"):
        allocate_error(error + 1.0, cost, 0.5)


def test_factors_are_recovered_from_their_own_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(5, 12, generator=generator, dtype=torch.float64) + 0.1
    groups = step_groups(12, 4)
    assert groups.bincount().tolist() == [3, 3, 3, 3]
    a = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    terms = a[:, None] * error * b[groups]
    by_group = [float(terms[:, groups == g].sum()) for g in range(4)]
    found_a, found_b = fit_factors(error, groups, terms.sum(1).tolist(), by_group)
    torch.testing.assert_close(found_a[:, None] * found_b, a[:, None] * b, rtol=1e-6, atol=0.0)


def test_policy_files_keep_every_field(tmp_path: Path) -> None:
    policies = {
        "blocks.0.*": pisa.DENSE,
        "blocks.*.attn": pisa.Policy(sparsity=0.9, block_size=32, exact=(3, 0), order="corrected"),
        "out": pisa.Policy(schedule=pisa.Schedule(steps=[0.5, [0.25, 0.75]], dense_first=0.2)),
    }
    save_policy(tmp_path / "p.json", policies, {"model": "a test"})
    assert load_policy(tmp_path / "p.json") == policies
    text = (tmp_path / "p.json").read_text()
    assert json.loads(text)["about"] == {"model": "a test"}
    assert "[ 0.25, 0.75 ]" in text or "[0.25, 0.75]" in text  # numbers of a list share a line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "schema is 'list'"),
        ('{"schema": "other"}', "schema is 'other'"),
        ('{"schema": "pisa_compile/policy", "version": 99}', "version 99"),
        ('{"schema": "pisa_compile/policy", "version": 1, "policies": []}', "must map"),
        (
            '{"schema": "pisa_compile/policy", "version": 1, "policies": {"a": {"sparsty": 1}}}',
            "unknown fields ['sparsty']",
        ),
        (
            '{"schema": "pisa_compile/policy", "version": 1, "policies": {"a": {"sparsity": 2}}}',
            "the policy for 'a': sparsity must be in",
        ),
    ],
)
def test_foreign_and_broken_policy_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        load_policy(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not text"):
        load_policy(path)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "missing.json")


def uneven() -> nn.Module:
    """Two blocks; the attention of the second hardly varies, so any density serves it."""
    model = models.tiny(depth=2)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(0.02)
    return model


def generate(model: nn.Module, seed: int) -> Tensor:
    x = models.tokens(320, seed=seed)
    with pisa.denoising(STEPS) as steps:
        for _ in steps:
            x = x + 0.3 * model(x)
    return x


def calibrated(**kwargs: Any) -> pisa.Calibration:
    settings = {"generate": generate, "densities": (0.2, 0.4, 0.7), "show_progress": False}
    policy = pisa.Policy(block_size=16)
    return pisa.calibrate(uneven(), [1, 2], policy=policy, **{**settings, **kwargs})


def test_calibration_spends_where_it_matters_and_beats_an_even_sparsity() -> None:
    found = calibrated(sparsity=0.6, held_out=[3])
    busy, idle = found.densities["blocks.0.attn"], found.densities["blocks.1.attn"]
    assert len(busy) == STEPS
    assert min(busy) > max(idle)
    assert found.delivered_error is not None
    assert found.uniform_error is not None
    assert found.predicted_error is not None
    assert found.delivered_error < found.uniform_error
    assert found.delivered_error == pytest.approx(found.predicted_error, rel=1.0)
    assert found.uniform_sparsity == pytest.approx(0.6, abs=0.05)
    assert "blocks.1.attn" in str(found)


def test_a_saved_calibration_acts_like_an_applied_one(tmp_path: Path) -> None:
    found = calibrated(sparsity=0.7, sensitivity=False, per_head=False)
    found.save(tmp_path / "p.json")
    options = {"inner": "eager", "min_tokens": 1, "block_size": 16}
    applied = uneven()
    found.apply(applied)
    outputs = []
    for model, extra in (
        (applied, {}),
        (uneven(), {"policy": str(tmp_path / "p.json")}),
        (uneven(), {"policy": load_policy(tmp_path / "p.json")}),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="pisa", options=options | extra)
        with torch.no_grad():
            outputs.append(generate(compiled, 5))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=0)
    with torch.no_grad():
        assert relative_l2(outputs[0], generate(uneven(), 5)) > 1e-4  # it did something


def test_a_site_that_a_cache_skips_keeps_its_schedule_in_step() -> None:
    """Steps 1 and 3 of five ran: the others take the choice of the last that ran, or the first."""
    settings = pisa.Policy().over(DEFAULT).settings()
    work = Workload(1, 1, 1, 640, 16, 16, settings)
    site = SiteErrors(work, torch.float32, torch.device("cpu"))
    for step in (1, 3):
        site.error[step] = torch.ones(2, 1, dtype=torch.float64)
        site.signal[step] = torch.ones(1, dtype=torch.float64)
        site.calls[step] = 1
    plan = Plan.of(ErrorTable((0.25, 0.5), {"attn": site}, steps=5), per_head=True)
    chosen = torch.tensor([0, 2])
    assert plan.by_site_and_step(chosen) == {"attn": [0.25, 0.25, 0.25, 1.0, 1.0]}
    assert plan.policies(chosen, pisa.Policy())["attn"].schedule.steps == (0.75, 0.75, 0.75, 0, 0)


def test_steps_without_a_known_count_are_counted() -> None:
    def stepwise(model: nn.Module, seed: int) -> Tensor:
        x = models.tokens(320, seed=seed)
        for step in range(3):
            pisa.set_step(step)
            x = x + 0.3 * model(x)
        pisa.set_step(None)
        return x

    found = calibrated(generate=stepwise, sparsity=0.6)
    assert {len(densities) for densities in found.densities.values()} == {3}


def test_a_demanded_error_is_kept() -> None:
    loose, tight = calibrated(max_error=0.1, held_out=[3]), calibrated(max_error=0.02)
    assert loose.predicted_seconds < tight.predicted_seconds
    assert tight.predicted_error is not None
    assert tight.predicted_error <= 0.02
    assert loose.delivered_error is not None
    assert loose.delivered_error <= 0.2  # the prediction is of other inputs


def test_the_model_is_left_as_it_was_and_one_call_has_no_steps() -> None:
    model = uneven()
    inputs = [(models.tokens(320, seed=1),), {"x": models.tokens(320, seed=2)}]
    found = pisa.calibrate(
        model, inputs, sparsity=0.5, sensitivity=False, show_progress=False,
        policy=pisa.Policy(block_size=16),
    )  # fmt: skip
    assert {name: len(d) for name, d in found.densities.items()} == {
        "blocks.0.attn": 1, "blocks.1.attn": 1,
    }  # fmt: skip
    assert not [name for m in model.modules() for name in vars(m) if "pisa" in name]
    assert all("forward" not in vars(module) for module in model.modules())


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="exactly one of sparsity, speedup and max_error"):
        calibrated(sparsity=0.5, speedup=2.0)
    with pytest.raises(ValueError, match="at least one input"):
        pisa.calibrate(uneven(), [], sparsity=0.5)
    with pytest.raises(TypeError, match=r"takes an nn.Module or a pipeline"):
        pisa.calibrate("model", [1], sparsity=0.5)
    with pytest.raises(ValueError, match=r"densities must be in \(0, 1\)"):
        calibrated(sparsity=0.5, densities=(0.5, 1.0))
    with pytest.raises(ValueError, match="leaves unknown"):
        calibrated(max_error=0.1, sensitivity=False)
    with pytest.raises(ValueError, match="must not be compiled"):
        pisa.calibrate(torch.compile(uneven(), backend="pisa"), [1], sparsity=0.5)
    with pytest.raises(RuntimeError, match="no attention of the model could be measured"):
        pisa.calibrate(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [torch.zeros(1, 4)], sparsity=0.5,
            show_progress=False,
        )  # fmt: skip


class Forwarding(models.TinyTransformer):
    """Has a `__getattr__` of its own, as all models of diffusers do."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def test_policies_by_name_reach_modules_behind_a_getattr() -> None:
    named = {"blocks.1.attn": pisa.Policy(sparsity=0.9)}
    options = {"inner": "eager", "min_tokens": 1, "sparsity": 0.5, "policy": named}
    compiled = torch.compile(Forwarding().eval(), backend="pisa", options=options)
    x = models.tokens(256)
    with torch.no_grad(), pisa.delivered() as deliveries:
        compiled(x)
    found = {call.module: round(float(call.requested[0]), 3) for call in deliveries.calls}
    assert found == {"blocks.0.attn": 0.5, "blocks.1.attn": 0.1}


def test_policies_by_name_need_the_whole_model() -> None:
    model = models.tiny(depth=2)
    named = {"blocks.0.attn": pisa.Policy(sparsity=0.5)}
    for block in model.blocks:
        block.compile(backend="pisa", options={"inner": "eager", "policy": named})
    with torch.no_grad(), pytest.raises(Exception, match="use pisa.set_policy"):
        model(models.tokens(64))
    with pytest.raises(Exception, match="option 'policy' must be the path"):
        torch.compile(models.tiny(), backend="pisa", options={"policy": 3})(models.tokens(64))


CLI_MODULE = """
import torch
import pisa_compile as pisa
from pisa_compile.kernels.testing import relative_l2
from tests import models
from tests.study.test_calibration import generate, uneven
seeds = [1, 2, 3]
"""


def test_the_command_writes_a_policy_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from pisa_compile.cli import main

    (tmp_path / "calibrated.py").write_text(CLI_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as exit_:
            main(["calibrate", "calibrated:uneven", "-i", "calibrated:seeds", *arguments])
        return int(exit_.value.code or 0)

    common = ("--generate", "calibrated:generate", "-o", "block_size=16", "--no-sensitivity")
    assert call(*common, "--sparsity", "0.6", "--json", "--held-out", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["delivered_relative_l2"] < record["uniform_relative_l2"]
    assert set(load_policy("pisa-policy.json")) == {"blocks.0.attn", "blocks.1.attn"}
    assert call(*common) == 2
    assert "exactly one of sparsity" in capsys.readouterr().err
    assert call(*common, "--sparsity", "0.6", "--held-out", "3") == 2
    assert "--held-out takes 3" in capsys.readouterr().err


def test_a_pipeline_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from examples.pipelines.tiny import TINY

    tiny = TINY["FluxPipeline"]
    pipe = tiny.build()
    transformer = pipe.transformer
    arguments = {**tiny.arguments(), **tiny.sizes[0], "num_inference_steps": 3}
    inputs = [{**arguments, "generator": torch.Generator().manual_seed(seed)} for seed in (0, 1)]
    found = pisa.calibrate(
        pipe, inputs[:1], sparsity=0.5, held_out=inputs[1:], policy=pisa.Policy(block_size=16),
        sensitivity=False, show_progress=False,
    )  # fmt: skip
    assert pipe.transformer is transformer
    assert found.delivered_error is not None
    assert all(name.startswith(("transformer_blocks.", "single_")) for name in found.policies)
    steps = {len(densities) for densities in found.densities.values()}
    assert steps == {3}
    with pytest.raises(ValueError, match="same noise"):
        pisa.calibrate(pipe, [arguments], sparsity=0.5, show_progress=False)
