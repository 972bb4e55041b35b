"""Attention in exported programs, before and after their decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pisa_compile as pisa
from pisa_compile.passes import rewrite_attention

from ..tracing import SPARSITY_ZERO, check_metadata

# Of torch's own, when it decomposes a program.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")

B, H, T, D = 2, 3, 20, 8
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    return q, k, v, torch.rand(B, 1, 1, T, generator=generator) > 0.3


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        return self.function(q, k, v, valid)


def operator(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def operator_with_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid, scale=0.3)


def written(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(~valid, -math.inf).softmax(-1) @ v


def filled_with_a_tensor(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, q @ k.mT, torch.tensor(-math.inf)).softmax(-1) @ v


def softmax_in_float64(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """An exported program checks the data type of what it casts."""
    return (q @ k.mT).to(torch.float64).softmax(-1).to(torch.float32) @ v


def linear_layers(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (F.linear(x, k[0, 0, :D], k[0, 0, 8]) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def mask_like_the_scores(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    return (scores + torch.zeros_like(scores).masked_fill(~valid, -math.inf)).softmax(-1) @ v


FUNCTIONS = [
    mask_like_the_scores,
    operator,
    operator_with_mask,
    written,
    filled_with_a_tensor,
    softmax_in_float64,
    linear_layers,
]


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_program_is_rewritten(function: Function, decomposed: bool) -> None:
    program = torch.export.export(Wrapped(function), inputs())
    if decomposed:
        program = program.run_decompositions()
    program = pisa.rewrite(program, SPARSITY_ZERO)
    assert _ops(program.graph) == 1
    torch.testing.assert_close(program.module()(*inputs()), function(*inputs()))


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("function", [operator_with_mask, mask_like_the_scores])
def test_length_that_is_symbolic(function: Function, decomposed: bool) -> None:
    length = torch.export.Dim("length", min=2)
    shapes = ({2: length}, {2: length}, {2: length}, {3: length})
    program = torch.export.export(Wrapped(function), inputs(), dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    program = pisa.rewrite(program, SPARSITY_ZERO)
    assert _ops(program.graph) == 1
    q, k, v, valid = inputs()
    longer = (*(torch.cat([x, x], 2) for x in (q, k, v)), torch.cat([valid, valid], 3))
    torch.testing.assert_close(program.module()(*longer), function(*longer))


def test_rows_without_a_key_are_zero_as_in_the_operator() -> None:
    q, k, v, valid = inputs()
    valid[0] = False
    program = torch.export.export(Wrapped(operator_with_mask), inputs()).run_decompositions()
    out = pisa.rewrite(program, SPARSITY_ZERO).module()(q, k, v, valid)
    assert out[0].abs().max() == 0
    torch.testing.assert_close(out, operator_with_mask(q, k, v, valid))


def test_kernel_of_a_device() -> None:
    """Traced without pre-dispatch, the operator is that of the CPU's kernel."""
    q, k, v, _ = inputs()
    gm = make_fx(F.scaled_dot_product_attention, tracing_mode="fake")(q, k, v)
    assert "flash_attention_for_cpu" in str([node.target for node in gm.graph.nodes])
    (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
    assert decision.replaced, decision.reason
    assert _ops(gm.graph) == 1
    torch.testing.assert_close(gm(q, k, v), F.scaled_dot_product_attention(q, k, v))
    check_metadata(gm, q, k, v)


def test_kernel_of_a_device_whose_other_results_are_read() -> None:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v, _ = inputs()
    gm = make_fx(lambda q, k, v: kernel(q, k, v), tracing_mode="fake")(q, k, v)
    (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
    assert "more than its output is used" in decision.reason


def test_causal_kernel_of_a_device_stays_dense() -> None:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v, _ = inputs()
    gm = make_fx(lambda q, k, v: kernel(q, k, v, 0.0, True)[0], tracing_mode="fake")(q, k, v)
    (decision,) = rewrite_attention(gm, SPARSITY_ZERO)
    assert "it is causal" in decision.reason


def _ops(graph: fx.Graph) -> int:
    return sum(node.target is torch.ops.pisa.attention.default for node in graph.nodes)
