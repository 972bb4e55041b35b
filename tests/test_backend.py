from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import pisa_compile as pisa
from pisa_compile import backend
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.passes.match.spelling import GraphFacts, Spelling

from .models import tiny, tokens


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    options = {"min_tokens": 0, "inner": "eager", **options}
    return torch.compile(model, backend="pisa", options=options, fullgraph=True)


def python(code: str, **environment: str) -> str:
    """Run code in a fresh process; its output."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_backend_is_found_by_name_without_importing_the_package() -> None:
    out = python(
        "import sys, torch\n"
        "assert 'pisa' in torch.compiler.list_backends()\n"
        "assert 'pisa_compile' not in sys.modules\n"
        "f = torch.compile(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q),\n"
        "                  backend='pisa', options={'inner': 'eager', 'min_tokens': 0})\n"
        "q = torch.randn(1, 1, 256, 16)\n"
        "dense = torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "print(not torch.allclose(f(q), dense), 'pisa_compile' in sys.modules)\n"
    )
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_sparsity_zero_is_dense_and_sparsity_changes_the_output(
    inner: str, dynamic: bool | None
) -> None:
    model, x = tiny(), tokens()
    with torch.no_grad():
        expected = model(x)
        for sparsity, close in ((0.0, True), (0.5, False)):
            torch._dynamo.reset()
            out = torch.compile(
                model,
                backend="pisa",
                options={"min_tokens": 0, "inner": inner, "sparsity": sparsity},
                fullgraph=True,
                dynamic=dynamic,
            )(x)
            error = relative_l2(out, expected)
            assert (error < 1e-5) == close, error
            assert error < 1.0
    assert not counters["graph_break"]


def test_inductor_and_eager_inner_agree_on_sparse_output() -> None:
    model, x = tiny(), tokens(300)
    with torch.no_grad():
        eager = compiled(model, sparsity=0.6)(x)
        assert relative_l2(compiled(model, sparsity=0.6, inner="inductor")(x), eager) < 1e-5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_in_either_mode(context: Any) -> None:
    model, x = tiny(), tokens()
    with context():
        expected = model(x)
        out = compiled(model, sparsity=0.5, inner="inductor")(x)
    assert 1e-4 < relative_l2(out, expected) < 1.0


def test_gradients_keep_sites_dense_and_training_works(caplog: pytest.LogCaptureFixture) -> None:
    model, x = tiny(), tokens()
    with caplog.at_level(logging.INFO, "pisa_compile"):
        compiled(model, inner="inductor", sparsity=0.5)(x).square().sum().backward()
    assert "replaced 0 of 2" in caplog.text
    assert "gradients are needed" in caplog.text
    gradient = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert relative_l2(gradient, model.blocks[0].attn.qkv.weight.grad) < 1e-5


def test_frozen_parameters_need_no_gradient_context() -> None:
    model, x = tiny().requires_grad_(False), tokens()
    assert 1e-4 < relative_l2(compiled(model, sparsity=0.5)(x), model(x)) < 1.0


def test_module_compile_method_and_regional_compile() -> None:
    model, x = tiny(), tokens()
    with torch.no_grad():
        whole = compiled(model, sparsity=0.5)(x)
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(
                backend="pisa",
                fullgraph=True,
                options={"min_tokens": 0, "inner": "eager", "sparsity": 0.5},
            )
        assert torch.equal(model(x), whole)
        assert counters["stats"]["unique_graphs"] == 2  # one whole, one that both blocks share


def test_one_graph_serves_several_resolutions() -> None:
    model = tiny()
    function = torch.compile(
        model,
        backend="pisa",
        options={"min_tokens": 0, "inner": "eager", "sparsity": 0.5},
        dynamic=True,
        fullgraph=True,
    )
    with torch.no_grad():
        for count in (200, 256, 333, 512):
            torch.testing.assert_close(function(tokens(count)), compiled_fresh(model, count))
    assert counters["stats"]["unique_graphs"] == 1


def compiled_fresh(model: nn.Module, count: int) -> torch.Tensor:
    """The same with static shapes, traced apart from Dynamo's counters and caches."""
    from pisa_compile.ops.functional import attention

    x = tokens(count)
    for block in model.blocks:
        attn = block.attn
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + attn.out(attention(q, k, v, sparsity=0.5).transpose(1, 2).flatten(2))
        x = x + block.mlp(x)
    return x


def test_length_gate_by_default_and_overridden() -> None:
    model = tiny(1)
    site = pisa.explain(model, tokens(300)).sites[0]
    assert not site.replaced
    assert "300 tokens is too short to gain; min_tokens is 2048" in site.reason
    with torch.no_grad():
        assert torch.equal(
            torch.compile(model, backend="pisa", options={"inner": "eager"})(tokens(300)),
            model(tokens(300)),
        )
    assert pisa.explain(compiled(model, min_tokens=300), tokens(300)).replaced == 1
    torch._dynamo.reset()
    assert pisa.explain(compiled(model, min_tokens=301), tokens(300)).replaced == 0


def test_autocast_runs_the_op_in_the_lower_precision() -> None:
    model, x = tiny(), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        report = pisa.explain(compiled(model, sparsity=0.0), x)
        out = compiled(model, sparsity=0.0)(x)
    assert [site.dtype for site in report.sites] == [torch.bfloat16] * 2
    assert report.replaced == 2
    assert relative_l2(out, expected) < 2e-2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsty": 0.5}, ValueError, ["'sparsty'", "did you mean 'sparsity'", "min_tokens"]),
        ({"sparsity": 1.0}, ValueError, ["[0, 1)", "1.0"]),
        ({"sparsity": "high"}, TypeError, ["number", "'high'"]),
        ({"block_size": 48}, ValueError, ["(16, 32, 64, 128)", "48"]),
        ({"inner": "tvm"}, ValueError, ["'inductor', 'aot_eager', 'eager'", "'tvm'"]),
        ({"epilogue_fusion": "yes"}, TypeError, ["epilogue_fusion", "bool", "'yes'"]),
        ({"inner": "eager", "epilogue_fusion": True}, ValueError, ["inner='inductor'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_say_what_was_expected(
    options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(BackendCompilerFailed) as raised, torch.no_grad():
        torch.compile(tiny(1), backend="pisa", options=options)(tokens())
    assert isinstance(raised.value.inner_exception, error)
    for word in words:
        assert word in str(raised.value)


def test_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(BackendCompilerFailed, match="mode must be one of.*max-autotune.*'fast'"):
        torch.compile(tiny(1), backend="pisa", mode="fast")(tokens())


def test_mode_and_inductor_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, config

    seen: list[dict[str, Any]] = []
    real = compile_fx.compile_fx

    def spy(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("config_patches"):  # with patches, it calls itself without them
            seen.append(kwargs["config_patches"])
        return real(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    before = config.get_config_copy()
    with torch.no_grad():
        torch.compile(tiny(1), backend="pisa", mode="max-autotune-no-cudagraphs")(tokens())
        torch.compile(tiny(1), backend="pisa", options={"sparsity": 0.5, "epilogue-fusion": False})(
            tokens()
        )
    assert seen[0]["max_autotune"] is True
    assert seen[1] == {"epilogue_fusion": False}
    assert config.get_config_copy() == before


def test_impossible_implementation_raises() -> None:
    with pytest.raises(BackendCompilerFailed, match="impl='triton'.*TRITON_INTERPRET"):
        pisa.explain(compiled(tiny(1), impl="triton"), tokens())


_CACHED_RUN = """
import torch
from torch._dynamo.utils import counters
from tests.models import tiny, tokens
sparsity = float(SPARSITY)
model, x = tiny(1), tokens()
with torch.no_grad():
    out = torch.compile(model, backend="pisa", options={"min_tokens": 0, "sparsity": sparsity})(x)
    torch._dynamo.reset()
    ref = torch.compile(
        model, backend="pisa", options={"min_tokens": 0, "sparsity": sparsity, "inner": "eager"}
    )(x)
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(float((out - ref).norm() / ref.norm()) < 1e-5, hits > 0)
"""


def test_caches_never_serve_another_sparsity(tmp_path: Path) -> None:
    """Three processes share one cache: it is hit for the same setting, and only then."""

    def run(sparsity: float) -> list[str]:
        code = _CACHED_RUN.replace("SPARSITY", str(sparsity))
        return python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).split()

    assert run(0.5) == ["True", "False"]
    assert run(0.9) == ["True", "False"]
    assert run(0.5) == ["True", "True"]


def test_torch_logs_shows_the_summary_line() -> None:
    code = (
        "import torch\n"
        "from tests.models import tiny, tokens\n"
        "with torch.no_grad():\n"
        "    torch.compile(tiny(), backend='pisa', options={'inner': 'eager'})(tokens())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_LOGS": "+pisa_compile"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr.count("replaced 0 of 2 attention sites (2 stay dense: 256 tokens") == 1


class Faulty(Spelling):
    """A fault in the passes."""

    def match(self, node: fx.Node, facts: GraphFacts) -> None:
        if node.op == "call_function":
            raise KeyError("forgotten")


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisa_compile.passes.pipeline.SPELLINGS", (Faulty(),))
    backend._tell.cache_clear()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_fault_of_the_passes_leaves_the_graph_as_it_was_and_says_so_once(
    inner: str, fault: None, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = tiny(), tokens(100)
    pisa.set_policy(model, {"blocks.1": pisa.Policy(sparsity=0.9)})
    options = {"inner": inner, "sparsity": 0.5, "min_tokens": 1}
    with torch.no_grad(), caplog.at_level("WARNING", logger="pisa_compile"):
        for _ in range(2):
            compiled = torch.compile(model, backend="pisa", options=options)
            torch.testing.assert_close(compiled(x), model(x))
            torch._dynamo.reset()
    (record,) = caplog.records
    assert "KeyError: 'forgotten'" in record.message
    assert "blocks.0.attn" in record.message
    assert "report this" in record.message


def test_a_fault_of_the_passes_is_in_the_report(fault: None) -> None:
    report = pisa.explain(tiny(), tokens(100))
    assert "KeyError: 'forgotten'" in str(report)


def test_strict_raises_a_fault_of_the_passes(fault: None) -> None:
    compiled = torch.compile(tiny(), backend="pisa", options={"strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"unexpected error.*forgotten"):
        compiled(tokens(100))
