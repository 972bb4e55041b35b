"""Rows without a key in exported programs, whose graphs hold operators alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa

from ..tracing import OPS, SPARSITY_ZERO
from .shared import T, inputs, outer

# Of torch's own, when it decomposes a program.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")

LOWEST = torch.finfo(torch.float32).min
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, ((1 - m.float()) * LOWEST)[:, None, None])


def subtracted_and_cut(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT - ((1 - m.float()) * 1e10)[:, None, None]
    return scores.masked_fill(torch.arange(T) > 15, -math.inf).softmax(-1) @ v


def replaced_and_cut(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~m[:, None, None], -1e9)
    return scores.masked_fill(torch.arange(T) > 15, -math.inf).softmax(-1) @ v


def outer_product_of_grouped_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT).masked_fill(~outer(m), -1e9).softmax(-1) @ v


FUNCTIONS: list[Function] = [
    added,
    subtracted_and_cut,
    replaced_and_cut,
    outer_product_of_grouped_heads,
]


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return self.function(q, k, v, m)


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_program_equals_dense_attention(function: Function, decomposed: bool) -> None:
    given = inputs(heads=4)
    given[3][1] = False
    program = torch.export.export(Wrapped(function), given)
    if decomposed:
        program = program.run_decompositions()
    program = pisa.rewrite(program, SPARSITY_ZERO)
    assert sum(node.target in OPS for node in program.graph.nodes) == 1
    out, expected = program.module()(*given), function(*given)
    assert not expected.isnan().any()
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
