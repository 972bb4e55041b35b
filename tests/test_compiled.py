"""Compiled models follow the denoising step without compiling again."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import pisa_compile as pisa
from pisa_compile import Schedule, backend
from pisa_compile import compiled as compiled_graphs
from pisa_compile.compiled import Stepwise, Variant
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.passes import DensityInput

from .models import Block, tiny, tokens

OPTIONS = {"min_tokens": 0, "inner": "eager", "sparsity": 0.5, "block_size": 16, "curve": "raster"}


# The model has sharp logits and amplifies rounding; settings differ by a hundred times this.
CLOSE = 2e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of calls on a few tokens: more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that went on to the inner compiler."""
    graphs: list[fx.GraphModule] = []
    real = backend.compile_inner

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        graphs.append(gm)
        return real(gm, *args)

    monkeypatch.setattr(backend, "compile_inner", spy)
    return graphs


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> nn.Module:
    options = {**OPTIONS, **options}
    return torch.compile(model, backend="pisa", options=options, fullgraph=True, dynamic=dynamic)


@torch.no_grad()
def fresh(policies: dict[str, pisa.Policy], x: Tensor, depth: int = 2, **options: Any) -> Tensor:
    """What a model that is compiled with constant settings computes."""
    model = tiny(depth)
    pisa.set_policy(model, policies)
    before = {name: counter.copy() for name, counter in counters.items()}
    out = compiled(model, **options)(x)
    for name in list(counters):
        counters[name] = before.get(name, type(counters[name])())
    return out


def generate(run: Any, x: Tensor, count: int) -> list[Tensor]:
    """What each step of a generation computes."""
    with pisa.denoising(count) as loop:
        return [run(x) for _ in loop]


def constant(sparsity: float) -> pisa.Policy:
    return pisa.DENSE if sparsity == 0 else pisa.Policy(sparsity=sparsity)


@functools.cache
def two_layers(sparsities: tuple[float, float]) -> Tensor:
    return fresh({f"blocks.{j}": constant(s) for j, s in enumerate(sparsities)}, tokens(100))


@pytest.mark.parametrize(
    ("inner", "dynamic"),
    [
        ("aot_eager", None),
        ("inductor", None),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_every_step_equals_a_model_compiled_for_it(
    inner: str, dynamic: bool | None, compilations: list[fx.GraphModule]
) -> None:
    """50 steps, two layers with their own schedules: one dense and one sparse graph."""
    sparsities = {
        "blocks.0": [0.0] * 10 + [0.25] * 20 + [0.75] * 20,
        "blocks.1": [0.0] * 15 + [0.75] * 15 + [0.5] * 20,
    }
    model, x = tiny(), tokens(100)
    schedules = {
        "blocks.0": Schedule(dense_first=0.2, steps=[0.25] * 3 + [0.75] * 2),
        "blocks.1": Schedule(dense_first=15, steps=[0.75] * 3 + [0.5] * 2),
    }
    pisa.set_policy(model, {name: pisa.Policy(schedule=s) for name, s in schedules.items()})
    run = compiled(model, dynamic, inner=inner)
    with torch.no_grad():
        outputs = generate(run, x, 50)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(compilations) == 2
    if inner == "inductor":
        assert counters["aot_autograd"]["total"] == 2
    settings = list(zip(*sparsities.values(), strict=True))
    for i, out in enumerate(outputs):
        assert relative_l2(out, two_layers(settings[i])) < CLOSE, (i, settings[i])
    expected = [two_layers(setting) for setting in set(settings)]
    different = [relative_l2(a, b) for a in expected for b in expected if a is not b]
    assert len(different) == 12
    assert min(different) > 100 * CLOSE


def test_regional_compilation_compiles_each_distinct_block_twice(
    compilations: list[fx.GraphModule],
) -> None:
    model, x = tiny(4), tokens(100)
    ramp, listed = Schedule(dense_first=5, ramp=(0.25, 0.75)), Schedule(steps=[0.0, 0.75])
    pisa.set_policy(model, {"blocks.[02]": pisa.Policy(schedule=ramp)})
    pisa.set_policy(model, {"blocks.1": pisa.Policy(schedule=listed)})
    for block in model.blocks:
        block.compile(backend="pisa", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        outputs = generate(model, x, 50)
        again = generate(model, x, 50)
    # Blocks 0 and 2 share code; block 3 has no schedule, and so no dense variant.
    assert counters["stats"]["unique_graphs"] == 3
    assert len(compilations) == 5
    for i in (0, 5, 30):
        slope = 0.0 if i < 5 else 0.25 + 0.5 * (i - 5) / 44
        policies = {f"blocks.{j}": constant(slope) for j in (0, 2)}
        policies["blocks.1"] = constant(0.0 if i < 25 else 0.75)
        assert relative_l2(outputs[i], fresh(policies, x, depth=4)) < CLOSE, i
        assert torch.equal(outputs[i], again[i])


def test_a_step_that_comes_again_makes_no_tensor() -> None:
    run = compiled(tiny(1), schedule=Schedule(ramp=(0.2, 0.8)))
    with torch.no_grad():
        generate(run, tokens(100), 5)
        made = compiled_graphs._table.cache_info().misses
        generate(run, tokens(100), 5)
    assert compiled_graphs._table.cache_info().misses == made


def test_heads_with_their_own_densities() -> None:
    model, x = tiny(1), tokens(100)
    pisa.set_policy(model, {"blocks.0": pisa.Policy(schedule=Schedule(steps=[(0.9, 0.0)]))})
    run = compiled(model)
    with torch.no_grad():
        both = model.blocks[0].attn.qkv.weight.clone()
        out = run(x)
        # The first head must be as sparse as it says, the second as in dense attention.
        attention = model.blocks[0].attn
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        heads = [
            pisa.attention(q[:, [h]], k[:, [h]], v[:, [h]], sparsity=s, block_size=16)
            for h, s in ((0, 0.9), (1, 0.0))
        ]
        y = x + attention.out(torch.cat(heads, 1).transpose(1, 2).flatten(2))
        expected = y + model.blocks[0].mlp(y)
    assert torch.equal(both, model.blocks[0].attn.qkv.weight)
    assert relative_l2(out, expected) < 1e-5


def test_a_wrong_number_of_heads_raises() -> None:
    model = tiny(1)
    pisa.set_policy(model, {"blocks.0": pisa.Policy(schedule=Schedule(steps=[(0.9, 0.0, 0.5)]))})
    with pytest.raises(Exception, match="lists a sparsity for 3 heads, this attention has 2"):
        pisa.explain(compiled(model), tokens())


def test_one_dense_schedule_for_all_leaves_the_sparse_graph_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number in the graph says it: no input is added, caches of other runs are used."""
    tables: list[int | None] = []

    def spy(sparse: Variant, dense: Variant | None, density: DensityInput) -> Stepwise:
        tables.append(density.width)
        return Stepwise(sparse, dense, density)

    monkeypatch.setattr("pisa_compile.backend.Stepwise", spy)
    model, x = tiny(), tokens(100)
    with torch.no_grad():
        expected = compiled(model)(x)
        torch._dynamo.reset()
        run = compiled(model, schedule=Schedule(dense_first=1))
        outputs = generate(run, x, 3)
        assert tables == [None]
        assert relative_l2(outputs[0], model(x)) < 1e-6
        assert torch.equal(outputs[1], expected)
        assert torch.equal(outputs[2], expected)


def test_layers_without_a_schedule_stay_sparse_at_dense_steps() -> None:
    model, x = tiny(), tokens(100)
    pisa.set_policy(model, {"blocks.0": pisa.Policy(schedule=Schedule(dense_first=1))})
    with torch.no_grad():
        out, _ = generate(compiled(model), x, 2)
    assert relative_l2(out, fresh({"blocks.0": pisa.DENSE}, x)) < 1e-6


def test_shapes_and_inference_mode_do_not_matter_to_a_step() -> None:
    model = tiny(1)
    run = compiled(model, dynamic=True, schedule=Schedule(steps=[0.75, 0.0]))
    for context in (torch.inference_mode, torch.no_grad):
        for count in (100, 130):
            x = tokens(count)
            with context():
                out = generate(run, x, 2)
                assert relative_l2(out[1], model(x)) < 1e-5
            assert relative_l2(out[0], fresh({"blocks.0": constant(0.75)}, x, 1)) < 1e-5


class Region(Block):
    """A block that Dynamo traces once and calls for every instance."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return Block.forward(self, x)


def test_shared_regions_get_the_table_as_an_operand() -> None:
    model, x = tiny(3), tokens(100)
    for block in model.blocks:
        block.__class__ = Region
    with torch.no_grad():
        run = compiled(model, inner="aot_eager", schedule=Schedule(steps=[0.75, 0.0, 0.25]))
        outputs = generate(run, x, 3)
        assert relative_l2(outputs[1], model(x)) < 1e-5
    for i, sparsity in ((0, 0.75), (2, 0.25)):
        policies = {f"blocks.{j}": constant(sparsity) for j in range(3)}
        assert relative_l2(outputs[i], fresh(policies, x, depth=3)) < 1e-5


def test_a_schedule_does_not_reach_into_control_flow_and_says_so() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.block, lambda y: y.clone(), (x,))

    model = Branch().eval()
    report = pisa.explain(compiled(model, schedule=Schedule(steps=[0.5, 0.6])), tokens(100))
    assert [site.reason for site in report.sites] == [
        "its schedule cannot reach into the body of `cond`"
    ]


def test_encoder_layers_that_are_opened_follow_the_step() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = tokens(100)
    with torch.no_grad():
        dense = model(x)
        run = compiled(model, schedule=Schedule(steps=[0.75, 0.0]))
        sparse, other = generate(run, x, 2)
    assert relative_l2(other, dense) < 1e-5
    assert relative_l2(sparse, dense) > 1e-4


def test_report_says_that_no_step_is_known_and_the_log_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled_graphs._warn_once.cache_clear()
    model, x = tiny(1), tokens(100)
    run = compiled(model, schedule=Schedule(dense_first=1, without_steps=0.75))
    with caplog.at_level(logging.WARNING, "pisa_compile"):
        report = pisa.explain(run, x)
        with torch.no_grad():
            out = run(x)
    assert relative_l2(out, fresh({"blocks.0": constant(0.75)}, x, 1)) < 1e-6
    assert caplog.text.count("no step is known") == 1
    assert "no step is known" in str(report)
    assert "first 1 step dense" in str(report)
    pisa.set_step(0, 2)
    first = pisa.explain(run, x)
    pisa.set_step(1, 2)
    second = pisa.explain(run, x)
    pisa.set_step(None)
    assert [site.replaced for report in (first, second) for site in report.sites] == [False, True]
    # FLOPs are those of the step: 4 of 7 blocks are exact at sparsity 0.5, 2 at 0.75.
    assert second.flops_saved < report.flops_saved
    assert first.sites[0].reason == "it is dense at this step of its schedule"
    assert "no step is known" not in str(first) + str(second)


def test_exported_programs_take_the_setting_without_steps() -> None:
    model, x = tiny(1), tokens(100)
    program = torch.export.export(model, (x,))
    schedule = Schedule(dense_first=1, without_steps=0.75)
    policy = pisa.Policy(min_tokens=0, block_size=16, curve="raster", schedule=schedule)
    with torch.no_grad():
        out = pisa.rewrite(program, policy).module()(x)
    assert relative_l2(out, fresh({"blocks.0": constant(0.75)}, x, 1)) < 1e-5
    heads = pisa.Policy(min_tokens=0, schedule=Schedule(steps=[(0.1, 0.2)]))
    with pytest.raises(pisa.UnsupportedError, match="sparsity per head"):
        pisa.rewrite(program, heads)


# Where the step comes from


def test_threads_do_not_mix() -> None:
    """Two loops share compiled code and take turns at every step."""
    model, x = tiny(1), tokens(100)
    run = compiled(model, schedule=Schedule(steps=[0.0, 0.75]))
    with torch.no_grad():
        alone = generate(run, x, 2)
    assert relative_l2(alone[1], alone[0]) > 1e-3
    turn = threading.Barrier(2, timeout=60)
    results: dict[int, list[Tensor]] = {}

    def loop(offset: int) -> None:
        with torch.no_grad(), pisa.denoising(2) as generation:
            if offset:
                generation.step()
            turn.wait()
            results[offset] = []
            for _ in range(3):
                results[offset].append(run(x))
                turn.wait()

    threads = [threading.Thread(target=loop, args=(offset,)) for offset in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, alone[offset]) for offset in (0, 1) for out in results[offset])
