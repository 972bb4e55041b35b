from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import pisa_compile as pisa
from pisa_compile.kernels.params import ORDERS, AttentionParams
from pisa_compile.kernels.testing import random_inputs
from pisa_compile.ops.flops import attention_flops, dense_flops

OPS = [torch.ops.pisa.attention.default, torch.ops.pisa.attention_with_lse.default]


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("layout", ["BTHD", "BHTD", "fused"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_opcheck(op: Any, layout: str, impl: str) -> None:
    inputs = random_inputs(query_len=150, head_dim=16, layout=layout)
    torch.library.opcheck(
        op, (inputs.query, inputs.key, inputs.value), {"sparsity": 0.5, "impl": impl}
    )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_opcheck_with_every_argument(op: Any) -> None:
    inputs = random_inputs(
        batch=2,
        heads=4,
        kv_heads=2,
        query_len=90,
        key_len=150,
        head_dim=16,
        value_dim=8,
        masked=0.2,
    )
    torch.library.opcheck(
        op,
        (inputs.query, inputs.key, inputs.value, inputs.key_mask[:, None, None]),
        {
            "scale": 0.2,
            "sparsity": 0.5,
            "block_size": 32,
            "routing": "topk_covariance",
            "order": "zeroth",
            "exact_prefix": 3,
            "exact_suffix": 20,
            "enable_gqa": True,
        },
    )


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(("order", "density"), [("hybrid", 0.4), ("corrected", [0.3, 1.0])])
def test_opcheck_with_density_and_permutation(
    op: Any, impl: str, order: str, density: float | list[float]
) -> None:
    inputs = random_inputs(heads=2, query_len=150, head_dim=16, masked=0.2)
    torch.library.opcheck(
        op,
        (
            *(inputs.query, inputs.key, inputs.value, inputs.key_mask[:, None, None]),
            torch.tensor(density),
            torch.arange(150).flip(0),
        ),
        {"sparsity": 0.5, "order": order, "exact_suffix": 20, "impl": impl},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["BTHD", "BHTD", "fused"])
def test_fake_and_real_results_agree_in_every_detail(dtype: torch.dtype, layout: str) -> None:
    inputs = random_inputs(batch=2, query_len=130, head_dim=24, dtype=dtype, layout=layout)

    def run(q: Tensor, k: Tensor, v: Tensor, density: Tensor, order: Tensor) -> Any:
        return torch.ops.pisa.attention_with_lse(q, k, v, None, density, order, sparsity=0.5)

    data = inputs.query, inputs.key, inputs.value, torch.tensor(0.3), torch.arange(130).flip(0)
    real = run(*data)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(x) for x in data))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    assert real[0].transpose(1, 2).is_contiguous()


def test_traced_calls_name_what_they_compute() -> None:
    """Else a default that changes would not change the graph, and caches would serve old code."""
    inputs = random_inputs(query_len=70, head_dim=16)
    graph = make_fx(lambda q, k, v: pisa.attention(q, k, v, sparsity=0.5))(
        inputs.query, inputs.key, inputs.value
    ).graph
    (node,) = [node for node in graph.nodes if node.target in OPS]
    named = {name: node.kwargs.get(name) for name in ("block_size", "routing", "order")}
    assert named == {"block_size": 64, "routing": "topk", "order": "corrected"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("exact", [(0, 0), (70, 10), (500, 0)])
def test_flop_counter_uses_the_formula(order: str, exact: tuple[int, int]) -> None:
    inputs = random_inputs(batch=2, heads=3, query_len=300, head_dim=16)
    with FlopCounterMode(display=False) as counter:
        pisa.attention(
            inputs.query, inputs.key, inputs.value, sparsity=0.5, order=order, exact=exact
        )
    shapes = [tuple(x.shape) for x in (inputs.query, inputs.key, inputs.value)]
    params = AttentionParams(1.0, 0.5, 64, "topk", order, exact)
    flops = attention_flops(*shapes, params)
    assert counter.get_total_flops() == flops
    assert flops > 0
    if exact == (500, 0):
        assert flops >= dense_flops(*shapes)
    elif order != "blockwise":
        assert flops < dense_flops(*shapes)


def test_flop_counter_with_density_and_permutation() -> None:
    """A permutation changes no product; a density is data, so the setting stands for it."""
    inputs = random_inputs(heads=3, query_len=300, head_dim=16)
    tensors = inputs.query, inputs.key, inputs.value
    with FlopCounterMode(display=False) as counter:
        pisa.attention(
            *tensors, sparsity=0.5, density=torch.tensor(0.1), permutation=torch.arange(300)
        )
    shape = tuple(inputs.query.shape)
    params = AttentionParams(1.0, 0.5, order="corrected")
    assert counter.get_total_flops() == attention_flops(shape, shape, shape, params)


def test_flops_of_the_correction() -> None:
    """One product of the 5 blocks' variances [5, 16] with mean squares [16] for each head."""
    shape = (2, 3, 300, 16)
    hybrid, corrected = (
        attention_flops(shape, shape, shape, AttentionParams(1.0, 0.5, order=order))
        for order in ("hybrid", "corrected")
    )
    assert corrected - hybrid == 2 * 3 * 2 * 5 * 16


def test_flops_of_dense_attention() -> None:
    shape = (2, 3, 300, 16)
    params = AttentionParams(1.0, 0.0)
    assert attention_flops(shape, shape, shape, params) == 4 * 2 * 3 * 300 * 300 * 16


def test_backward_is_refused_clearly() -> None:
    inputs = random_inputs(query_len=64, head_dim=16)
    out = pisa.attention(inputs.query.requires_grad_(), inputs.key, inputs.value, sparsity=0.5)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()
