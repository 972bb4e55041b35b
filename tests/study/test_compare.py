"""`pisa.compare`: the table of errors on a user's own model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.study import stand_ins as generation

from ..models import tiny, tokens

SMALL = {"block_size": 16, "min_tokens": 0, "curve": "raster"}
POLICIES = {
    "half": pisa.Policy(sparsity=0.5, **SMALL),
    "most": pisa.Policy(sparsity=0.9, **SMALL),
    "nothing": pisa.Policy(sparsity=0.0, **SMALL),
}


@pytest.fixture(scope="module")
def found() -> pisa.Comparison:
    return pisa.compare(tiny(depth=3), [tokens(), tokens(seed=2)], policies=POLICIES)


def test_the_error_of_the_result_is_that_of_a_compiled_model(found: pisa.Comparison) -> None:
    model, inputs = tiny(depth=3), [tokens(), tokens(seed=2)]
    options = {"sparsity": 0.9, "inner": "eager", **SMALL}
    with torch.no_grad():
        dense = torch.cat([model(x) for x in inputs]).double()
        compiled = torch.compile(model, backend="pisa", options=options)
        sparse = torch.cat([compiled(x) for x in inputs]).double()
    expected = float((sparse - dense).norm() / dense.norm())
    assert found["most"].error == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01


def test_sparser_policies_err_more_and_no_sparsity_not_at_all(found: pisa.Comparison) -> None:
    assert found["nothing"].error < 1e-5 < found["half"].error < found["most"].error
    assert found["nothing"].cosine > found["half"].cosine > found["most"].cosine
    assert found.best.name == "nothing"
    assert found["nothing"].flops_saved == 0.0 < found["half"].flops_saved


def test_sites_come_worst_first_with_every_head(found: pisa.Comparison) -> None:
    for name in ("half", "most"):
        sites = found[name].sites
        assert {site.module for site in sites} == {f"blocks.{i}.attn" for i in range(3)}
        assert [site.error for site in sites] == sorted((s.error for s in sites), reverse=True)
        assert all(len(site.head_error) == 2 and site.calls == 2 for site in sites)
        assert all(min(s.head_error) <= s.error <= max(s.head_error) for s in sites)


def test_the_error_of_a_site_is_that_of_the_specification() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Only(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, scale=0.5)

    generator = torch.Generator().manual_seed(0)
    seen.append(tuple(torch.randn(2, 2, 100, 8, generator=generator) for _ in range(3)))
    result = pisa.compare(Only(), seen, policies=[POLICIES["half"]]).results[0]
    settings = POLICIES["half"].over(result.sites[0].policy).settings().scaled(0.5)
    out, _ = reference.attention(*(x.double() for x in seen[0]), None, settings)
    dense = scaled_dot_product_attention(*(x.double() for x in seen[0]), scale=0.5)
    errors = (out - dense).square().sum((0, 2, 3)).sqrt() / dense.square().sum((0, 2, 3)).sqrt()
    assert result.sites[0].head_error == pytest.approx(errors.tolist(), rel=1e-4)
    assert result.error == pytest.approx(result.sites[0].error, rel=1e-4)


def test_denser_names_the_worst_sites_and_helps(found: pisa.Comparison) -> None:
    result = found["most"]
    assert list(result.denser) == [site.module for site in result.sites[: len(result.denser)]]
    assert all(policy.sparsity == pytest.approx(0.8) for policy in result.denser.values())
    model = tiny(depth=3)
    pisa.set_policy(model, result.denser)
    again = pisa.compare(model, [tokens(), tokens(seed=2)], policies=[POLICIES["most"]])
    worst = result.sites[0].module
    now = {site.module: site for site in again.results[0].sites}
    assert now[worst].policy.sparsity == pytest.approx(0.8)
    assert now[worst].error < result.sites[0].error
    assert again.results[0].error < result.error


def test_policies_by_module_name() -> None:
    by_name = {"blocks.0.*": POLICIES["most"], "blocks.1.*": pisa.DENSE}
    result = pisa.compare(tiny(), [tokens()], policies=[by_name]).results[0]
    assert [site.module for site in result.sites] == ["blocks.0.attn"]
    assert "policies 0" in str(result)


def test_printed_with_rich_and_without(
    found: pisa.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rich = str(found)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = str(found)
    assert with_rich != plain
    for text in (with_rich, plain):
        for expected in (*POLICIES, "blocks.2.attn", "0.9", "to make denser first"):
            assert expected in text


def test_the_plot_is_drawn(found: pisa.Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars == pytest.approx([result.error for result in found.results])


def test_a_result_that_is_not_finite_is_worst_and_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = pisa.compare(
        tiny(), [tokens()], policies=[pisa.DENSE], generate=lambda model, x: model(x) * torch.inf
    )
    assert comparison.results[0].error == float("inf")
    figure = comparison.plot(tmp_path / "plot.png")
    assert "not finite" in [text.get_text().strip() for text in figure.axes[0].texts]


def test_without_matplotlib_the_plot_says_what_to_install(
    found: pisa.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pisa-compile\[cli\]'"):
        found.plot()


def test_a_tiny_diffusers_transformer() -> None:
    pytest.importorskip("diffusers")
    from benchmarks.diffusers_models import CASES

    case = CASES["PixArtTransformer2DModel"]
    model, inputs = case.build(), dict(case.inputs())
    policy = pisa.Policy(sparsity=0.7, **SMALL)
    result = pisa.compare(model, [inputs], policies=[policy]).results[0]
    assert len(result.sites) == 2  # self-attention
    assert len(result.report) == 4  # and cross-attention, which stays dense
    assert 0 < result.error < 1
    assert all(site.error > 0 for site in result.sites)


@pytest.mark.parametrize(
    ("inputs", "policies", "error", "text"),
    [
        (tokens(), [pisa.DENSE], TypeError, "list of inputs, got Tensor"),
        ((tokens(),), [pisa.DENSE], TypeError, "list of inputs, got tuple"),
        ([], [pisa.DENSE], ValueError, "inputs is empty"),
        ([tokens()], [], ValueError, "policies is empty"),
        ([tokens()], pisa.DENSE, TypeError, "list or a dict of policies, got Policy"),
    ],
)
def test_bad_arguments(inputs: object, policies: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pisa.compare(tiny(), inputs, policies=policies)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be compiled"):
        pisa.compare(torch.compile(tiny(), backend="pisa"), [tokens()], policies=[pisa.DENSE])
    with pytest.raises(TypeError, match="nn.Module, got function"):
        pisa.compare(lambda x: x, [tokens()], policies=[pisa.DENSE])


@pytest.mark.parametrize("isolates", [True, False], ids=["isolating", "older"])
def test_many_policies_leave_the_model_fit_for_its_own_compilation(
    isolates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a torch that keeps all compilations of a function in one list."""
    monkeypatch.setattr(generation, "_ISOLATES", isolates and generation._ISOLATES)
    model = tiny()
    limit = torch._dynamo.config.recompile_limit
    pisa.compare(
        model, [tokens()], policies=[pisa.Policy(sparsity=0.05 * i) for i in range(1, limit + 3)]
    )
    compiled = torch.compile(model, backend="pisa", options={"inner": "eager", "min_tokens": 1})
    assert pisa.explain(compiled, tokens()).replaced == 2
