"""Models at the sizes that they are used at: text and grid are found with the backend alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import pisa_compile as pisa
from benchmarks.diffusers_models import CASES, Case
from pisa_compile import backend
from pisa_compile.policies.policy import Policy
from pisa_compile.report.explain import _policy_text
from tests.caller.test_arguments import ids

WIDTH, HEADS, TEXT = 16, 2, 10
POLICY = Policy(
    sparsity=0.5,
    order="hybrid",
    block_size=16,
    min_tokens=0,
    impl="reference",
    curve="hilbert",
)
OPTIONS = {"min_tokens": 0, "block_size": 16, "inner": "eager", "preset": None, "curve": "hilbert"}
WEIGHT = torch.randn(WIDTH, WIDTH, 2, 2, generator=torch.Generator().manual_seed(1)) / 4
ORDER = torch.ops.pisa.token_order.default


def flux(height: int, width: int) -> dict[str, Any]:
    return {
        **CASES["FluxTransformer2DModel"].inputs(),
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, 512, 24),
        "img_ids": ids(1, height, width),
        "txt_ids": torch.zeros(512, 3),
    }


def hunyuan_video() -> dict[str, Any]:
    return {
        **CASES["HunyuanVideoTransformer3DModel"].inputs(),
        "hidden_states": torch.randn(1, 4, 33, 90, 160),
        "encoder_hidden_states": torch.randn(1, 256, 24),
        "encoder_attention_mask": (torch.arange(256) < 100)[None].long(),
    }


def wan() -> dict[str, Any]:
    latents = torch.randn(1, 4, 21, 90, 160)
    return {**CASES["WanTransformer3DModel"].inputs(), "hidden_states": latents}


REAL = {
    "FLUX square": ("FluxTransformer2DModel", lambda: flux(64, 64), (512, 0), (64, 64)),
    "FLUX tall": ("FluxTransformer2DModel", lambda: flux(78, 52), (512, 0), (78, 52)),
    "Wan": ("WanTransformer3DModel", wan, (0, 0), (21, 45, 80)),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", hunyuan_video, (0, 256), (33, 45, 80)),
}


def outputs_only(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
    """In the place of the compiler: outputs of the right shape, nothing is computed."""
    (output,) = gm.graph.find_nodes(op="output")
    fakes = [x.meta["example_value"] if isinstance(x, fx.Node) else x for x in output.args[0]]
    return lambda *_: tuple(
        torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in fakes
    )


def large(name: str) -> nn.Module:
    case = CASES[name]
    more = {"rope_max_seq_len": 1024} if name.startswith("Wan") else {}
    return replace(case, config=lambda: case.config() | more).build()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (kind, how)
        for kind in REAL
        for how in ("whole", "blocks")
        if (kind, how) != ("FLUX tall", "whole")
    ],
)
def test_found_with_nothing_but_the_backend(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    name, make_inputs, exact, grid = REAL[kind]
    monkeypatch.setattr(backend, "compile_inner", outputs_only)
    torch._dynamo.reset()
    model, inputs = large(name), make_inputs()
    if how == "whole":
        model.compile(backend="pisa")
    else:
        model.compile_repeated_blocks(backend="pisa", fullgraph=True)
    report = pisa.explain(model, **inputs)
    tokens = torch.Size(grid).numel() + sum(exact)
    joint = [site for site in report.sites if site.query_shape[2] == site.key_shape[2] == tokens]
    assert len(joint) >= 2 if how == "whole" else joint
    for site in joint:
        if site.replaced:
            assert (site.policy.exact, site.policy.grid) == (exact, grid)
            assert f"{'x'.join(map(str, grid))} raster" in _policy_text(site.policy)
    assert any(site.replaced for site in joint)


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("kind", ["FLUX square", "Wan", "HunyuanVideo"])
def test_equal_to_dense_at_sparsity_zero(kind: str, how: str) -> None:
    pytest.importorskip("diffusers")
    case: Case = CASES[REAL[kind][0]]
    options = {**OPTIONS, "sparsity": 0.0}
    torch._dynamo.reset()
    model = case.build()
    with torch.no_grad():
        (dense,) = model(**case.inputs())
        if how == "whole":
            model.compile(backend="pisa", options=options)
        else:
            model.compile_repeated_blocks(backend="pisa", fullgraph=True, options=options)
        (out,) = model(**case.inputs())
    assert dense.abs().max() > 1
    torch.testing.assert_close(out, dense, atol=1e-4, rtol=0)


def test_a_block_that_is_compiled_alone_follows_the_picture() -> None:
    """The same number of tokens on another grid, through the same compiled code."""
    pytest.importorskip("diffusers")
    case = CASES["FluxTransformer2DModel"]
    torch._dynamo.reset()
    options = {**OPTIONS, "sparsity": 0.8}
    blocks, alone = case.build(), case.build()
    blocks.compile_repeated_blocks(backend="pisa", fullgraph=True, options=options)
    with torch.no_grad():
        wide = {**case.inputs(), "img_ids": ids(1, 8, 32)}
        tall = {**case.inputs(), "img_ids": ids(1, 32, 8)}
        blocks(**wide)
        with torch.compiler.set_stance("fail_on_recompile"):
            (out,) = blocks(**tall)
        for grid, equal in (((32, 8), True), ((8, 32), False)):
            torch._dynamo.reset()
            given = torch.compile(alone, backend="pisa", options={**options, "grid": grid})
            (expected,) = given(**tall)
            assert torch.allclose(out, expected, atol=1e-4) == equal
