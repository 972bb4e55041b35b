"""Attention wherever it runs: contexts, wrappers, sub-graphs, broken graphs, other dialects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pisa_compile.passes import rewrite_attention

from ..models import tiny, tokens
from .tracing import SPARSITY_ZERO, check_metadata, rewrite

sdpa = F.scaled_dot_product_attention


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3))
    return q, k, v


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def under_sdpa_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v)


def aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, v)


def aten_packet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.25)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = checkpoint(spelled, q, k, v, use_reentrant=False)
    return out


def under_condition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    branches = (lambda q, k, v: (sdpa(q, k, v),), lambda q, k, v: (q + 1,))
    return torch.cond(q.sum() > -1e9, *branches, (q, k, v))[0]


def in_another_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(query=q, key=k, value=v)


CARRIERS = [
    under_sdpa_kernel,
    aten,
    aten_packet,
    checkpointed,
    under_condition,
    in_another_function,
]


@pytest.mark.parametrize("function", CARRIERS, ids=lambda function: function.__name__)
def test_carrier(function: Callable[..., Tensor]) -> None:
    result = rewrite(function, *inputs())
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.error < 1e-5


@pytest.mark.parametrize("function", [sdpa, spelled], ids=["sdpa", "spelled"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_autocast(function: Callable[..., Tensor], inside: bool) -> None:
    def autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(q, k, v)

    if inside:
        result = rewrite(autocast, *inputs())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            result = rewrite(function, *inputs())
    (op,) = result.ops
    assert op.meta["example_value"].dtype == torch.bfloat16
    assert result.error < 2e-2


@pytest.mark.parametrize("shape", [(40, 16), (3, 40, 16), (2, 3, 40, 16), (2, 2, 3, 40, 16)])
def test_ranks_of_sdpa(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape) for _ in range(3))
    result = rewrite(sdpa, q, k, v)
    assert result.decisions[0].query_shape[-2:] == (40, 16)
    assert len(result.decisions[0].query_shape) == 4
    assert len(result.ops) == 1
    assert result.error < 1e-5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_result_keeps_the_strides_of_the_dense_one(order: tuple[int, ...]) -> None:
    def function(x: Tensor) -> Tensor:
        q = x.permute(order)
        return spelled(q, q, q) + sdpa(q, q, q)

    x = torch.randn(2, 3, 40, 16)
    result = rewrite(function, x)
    assert len(result.ops) == 2
    check_metadata(result.graphs[0], x)


def test_graph_breaks_of_others() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = sdpa(q, k, v)
        torch._dynamo.graph_break()
        return spelled(q, k, v)

    result = rewrite(function, *inputs(), fullgraph=False)
    assert len(result.graphs) == 2
    assert len(result.ops) == 2
    assert result.error < 1e-5


def test_graph_of_make_fx() -> None:
    q, k, v = inputs()
    for function in (sdpa, spelled):
        gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(q, k, v)
        (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
        assert decision.replaced
        torch.testing.assert_close(gm(q, k, v), function(q, k, v))
        check_metadata(gm, q, k, v)


def test_decomposed_graph_of_make_fx() -> None:
    """Without pre-dispatch a product is views, expands and one bmm."""
    q, k, v = inputs()
    gm = make_fx(spelled, tracing_mode="fake")(q, k, v)
    (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
    assert decision.replaced, decision.reason
    torch.testing.assert_close(gm(q, k, v), spelled(q, k, v))


@pytest.mark.parametrize("changed", [False, True], ids=["kept", "changed"])
def test_mask_built_outside_of_a_region(changed: bool) -> None:
    """What is known of an operand is known inside, unless it changed on the way."""

    @torch.compiler.nested_compile_region
    def region(q: Tensor, bias: Tensor) -> Tensor:
        return sdpa(q, q, q, attn_mask=bias)

    def function(q: Tensor, valid: Tensor) -> Tensor:
        bias = torch.zeros(2, 1, 1, 40).masked_fill(~valid[:, None, None], float("-inf"))
        if changed:
            bias[:, :, :, 3:] += valid[:, None, None, 3:] * 2.0
        return region(region(q, bias), bias)

    valid = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    result = rewrite(function, inputs()[0], valid)
    assert [decision.replaced for decision in result.decisions] == [not changed] * 2
    assert result.error < 1e-5


def test_gradients_in_a_checkpointed_block_keep_it_dense() -> None:
    layer = nn.Linear(16, 16)
    result = rewrite(
        lambda q, k, v: checkpoint(lambda: sdpa(layer(q), k, v), use_reentrant=False),
        *inputs(),
        grad=True,
    )
    assert result.ops == []
    assert "gradients are needed" in result.reasons[0]


def test_in_place_code_around_the_site_is_kept() -> None:
    """The pass erases what it matched and nothing else."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        out[:, :, 3:] = 1.0
        out.add_(spelled(q, k, v))
        out[0].mul_(2)
        return out

    result = rewrite(function, *inputs())
    assert len(result.ops) == 1
    assert result.error < 1e-5


def test_dispatcher_of_diffusers() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

    for backend in ("native", "_native_math", "_native_flash"):

        def function(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants [B, T, H, D]
            return dispatch.dispatch_attention_fn(q, k, v, backend=backend)

        result = rewrite(function, *inputs())
        assert len(result.ops) == 1, backend
        assert result.error < 1e-5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_length_that_is_known_only_at_run_time(order: tuple[int, ...]) -> None:
    """Strides are then unknown too, and the result must still have their order."""

    def function(x: Tensor, kept: Tensor) -> Tensor:
        picked = torch.nonzero(kept).flatten()
        q = torch.cat([x, x[:, :, picked]], dim=2).permute(order).contiguous().permute(order)
        return sdpa(q, q, q) * 2

    x, kept = torch.randn(2, 3, 40, 16), torch.arange(40) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = rewrite(function, x, kept)
    assert len(result.ops) == 1
    assert result.error < 1e-5


RESOLUTIONS = (64, 80, 96, 133, 160)


@pytest.mark.parametrize("alone", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_more_recompilations_than_without_us(dynamic: bool | None, alone: str) -> None:
    model = tiny().eval()

    def compilations(backend: str) -> int:
        torch._dynamo.reset()
        counters.clear()
        options = {"inner": alone, "min_tokens": 0, "impl": "reference"}
        arguments = {"options": options} if backend == "pisa" else {}
        function = torch.compile(model, backend=backend, dynamic=dynamic, **arguments)
        with torch.no_grad():
            for count in RESOLUTIONS:
                function(tokens(count))
        return counters["stats"]["unique_graphs"]

    assert compilations("pisa") == compilations(alone)


def test_crossing_the_length_gate_costs_one_more_graph() -> None:
    model = tiny().eval()
    options = {"inner": "eager", "min_tokens": 100, "impl": "reference"}
    function = torch.compile(model, backend="pisa", dynamic=True, options=options)
    with torch.no_grad():
        for count in RESOLUTIONS:
            function(tokens(count))
    assert counters["stats"]["unique_graphs"] == 2


def test_scale_and_dropout_of_dynamic_models_are_read() -> None:
    """With dynamic shapes Dynamo turns float attributes into inputs of the graph."""

    class Scaled(nn.Module):
        scale, dropout = 0.3, 0.0

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = sdpa(q, k, v, dropout_p=self.dropout, scale=self.scale)
            return out + (q @ k.mT * self.scale).softmax(-1) @ v

    result = rewrite(Scaled(), *inputs(), dynamic=True)
    assert [op.kwargs["scale"] for op in result.ops] == pytest.approx([0.3, 0.3])
    assert result.error < 1e-5


def test_graph_without_attention_is_left_alone() -> None:
    gm = fx.symbolic_trace(nn.Linear(4, 4))
    before = gm.code
    assert rewrite_attention(gm, SPARSITY_ZERO) == []
    assert gm.code == before
