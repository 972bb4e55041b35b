from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import random_inputs, relative_l2, specified


def qkv(**shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = random_inputs(**{"query_len": 200, "head_dim": 32, **shape})
    return inputs.query, inputs.key, inputs.value


def test_every_argument_reaches_the_specification() -> None:
    inputs = random_inputs(
        batch=2, heads=4, kv_heads=2, query_len=300, head_dim=24, value_dim=40, masked=0.2
    )
    density = torch.tensor([0.2, 0.4, 0.8, 1.0])
    permutation = torch.arange(300).view(20, 15).T.flatten()
    out, lse = pisa.attention(
        inputs.query,
        inputs.key,
        inputs.value,
        sparsity=0.6,
        scale=0.3,
        block_size=32,
        key_block_size=16,
        routing="threshold",
        order="zeroth",
        attn_mask=inputs.key_mask[:, None, None],
        exact=(40, 10),
        density=density,
        permutation=permutation,
        enable_gqa=True,
        return_lse=True,
    )
    params = AttentionParams(0.3, 0.6, 32, "threshold", "zeroth", (40, 10), 16)
    expected, expected_lse = specified(inputs, params, density=density, permutation=permutation)
    assert relative_l2(out, expected) < 1e-5
    assert relative_l2(lse, expected_lse) < 1e-5
    assert lse.dtype == torch.float32


def test_defaults_are_the_papers_method() -> None:
    inputs = random_inputs(query_len=300, head_dim=32)
    out = pisa.attention(inputs.query, inputs.key, inputs.value, sparsity=0.7)
    params = AttentionParams(32**-0.5, 0.7, 64, "topk", "corrected", (0, 0))
    assert relative_l2(out, specified(inputs, params)[0]) < 1e-5


def test_lse_is_the_natural_logarithm_of_the_denominator() -> None:
    q, k, v = qkv()
    _, lse = pisa.attention(q, k, v, sparsity=0.0, return_lse=True)
    expected = (q.double() @ k.double().mT * 32**-0.5).logsumexp(-1)
    assert relative_l2(lse, expected) < 1e-6


@pytest.mark.parametrize("shape", [(200,), (1, 200), (1, 1, 200), (1, 1, 1, 200), (2, 1, 1, 200)])
def test_key_masks_broadcast(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(batch=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    out = pisa.attention(q, k, v, sparsity=0.0, attn_mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.view(-1, 1, 1, 200))
    assert relative_l2(out, expected) < 1e-5


def test_autocast_casts_like_sdpa() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = pisa.attention(q, k, v, sparsity=0.0)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert relative_l2(out, expected) < 1e-2


def test_traced_call_is_one_node_with_the_eager_result() -> None:
    q, k, v = qkv()
    targets = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets.extend(node.target for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    def call(q: Tensor) -> Tensor:
        return pisa.attention(q, k, v, sparsity=0.5)

    assert torch.equal(torch.compile(call, backend=keep, fullgraph=True)(q), call(q))
    assert torch.ops.pisa.attention.default in targets or torch.ops.pisa.attention in targets


def bad(words: str, error: type[Exception] = ValueError, **change: Any) -> Any:
    return pytest.param(change, error, words, id=next(iter(change)) + ": " + words[:30])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        bad(r"query must have 4 dimensions \[B, H, T, D\], got 3", query=torch.zeros(2, 8, 4)),
        bad("query must be a tensor, got list", TypeError, query=[1.0]),
        bad("one head_dim.*key \\(1, 2, 8, 5\\)", key=torch.zeros(1, 2, 8, 5)),
        bad("one head count unless enable_gqa=True", query=torch.zeros(1, 4, 8, 4)),
        bad("multiple of the key's", query=torch.zeros(1, 3, 8, 4), enable_gqa=True),
        bad("one batch size", query=torch.zeros(3, 2, 8, 4)),
        bad("one head count and length", value=torch.zeros(1, 2, 9, 4)),
        bad("one dtype.*value torch.float64", TypeError, value=torch.zeros(1, 2, 8, 4).double()),
        bad("bfloat16 or float16, got torch.int64", TypeError, query=torch.ones(1, 2, 8, 4).long()),
        *(
            bad(
                f"bfloat16 or float16, got {dtype}; cast it",
                TypeError,
                **dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 4).to(dtype)),
            )
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        ),
        *(
            bad(
                f"query must be a dense tensor, got layout {tensor.layout}; use query.to_dense",
                TypeError,
                **dict.fromkeys(("query", "key", "value"), tensor),
            )
            for tensor in (torch.zeros(1, 2, 8, 4).to_mkldnn(), torch.zeros(1, 2, 8, 4).to_sparse())
        ),
        bad(
            "value must be a dense tensor, got a nested one; pad it",
            TypeError,
            value=torch.nested.as_nested_tensor(torch.zeros(1, 2, 8, 4), layout=torch.jagged),
        ),
        bad("one device.*value meta", TypeError, value=torch.zeros(1, 2, 8, 4, device="meta")),
        bad("at least one token", key=torch.zeros(1, 2, 0, 4), value=torch.zeros(1, 2, 0, 4)),
        bad(r"sparsity must be in \[0, 1\), got 1.0", sparsity=1.0),
        bad(r"sparsity must be in \[0, 1\), got -0.5", sparsity=-0.5),
        bad("sparsity must be a number", TypeError, sparsity="0.5"),
        bad("block_size must be one of .*got 100", block_size=100),
        bad("key_block_size must be one of .*got 48", key_block_size=48),
        bad("routing must be one of .*'topk'.*got 'nearest'", routing="nearest"),
        bad("order must be one of .*'hybrid'.*got 'third'", order="third"),
        bad("exact must be \\(prefix, suffix\\)", exact=(0, -1)),
        bad("scale must be a number", TypeError, scale="1"),
        bad("impl must be one of .*got 'cudnn'", impl="cudnn"),
        bad("boolean key-padding mask.*torch.float32", TypeError, attn_mask=torch.zeros(8)),
        bad("got shape \\(8, 8\\)", attn_mask=torch.ones(8, 8, dtype=torch.bool)),
        bad("got shape \\(7,\\)", attn_mask=torch.ones(7, dtype=torch.bool)),
        bad(
            r"density must be a float32 tensor \[\] or \[H\] = \[2\].*got float",
            TypeError,
            density=0.5,
        ),
        bad("got torch.float64 on cpu", TypeError, density=torch.tensor(0.5).double()),
        bad("got torch.float32 on meta", TypeError, density=torch.ones(2, device="meta")),
        bad("got shape \\(3,\\)", density=torch.ones(3)),
        bad("got shape \\(1, 2\\)", density=torch.ones(1, 2)),
        bad("fraction in \\(0, 1\\] for each head, got .*nan", density=torch.tensor(torch.nan)),
        bad("an int32 or int64 tensor \\[T\\] = \\[8\\].*got list", TypeError, permutation=[0, 1]),
        bad("got torch.float32 on cpu", TypeError, permutation=torch.arange(8.0)),
        bad("got torch.int64 on meta", TypeError, permutation=torch.arange(8, device="meta")),
        bad("got shape \\(7,\\)", permutation=torch.arange(7)),
        bad("got shape \\(1, 8\\)", permutation=torch.arange(8)[None]),
        bad(
            "needs self-attention.*8 query and 9 key tokens",
            permutation=torch.arange(8),
            **{name: torch.zeros(1, 2, 9, 4) for name in ("key", "value")},
        ),
        bad("0 to 7 once, got values from 1 to 8", permutation=torch.arange(1, 9)),
        bad("0 to 7 once, got values from -1 to 6", permutation=torch.arange(-1, 7).int()),
        bad("got 4 of them not at all", permutation=torch.arange(8) // 2),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(1, 2, 8, 4) for name in ("query", "key", "value")}
    good["sparsity"] = 0.5
    pisa.attention(**good)
    with pytest.raises(error, match=words):
        pisa.attention(**{**good, **change})


def test_meta_tensors_give_meta_tensors() -> None:
    x = torch.empty(1, 2, 200, 16, device="meta", dtype=torch.bfloat16)
    out, lse = pisa.attention(x, x, x, sparsity=0.5, return_lse=True)
    assert (out.device.type, out.dtype, out.shape) == ("meta", x.dtype, x.shape)
    assert (lse.device.type, lse.dtype, lse.shape) == ("meta", torch.float32, x.shape[:3])


def test_forced_implementation_that_cannot_run_raises() -> None:
    with pytest.raises(pisa.UnsupportedError, match="impl='triton' cannot run.*TRITON_INTERPRET"):
        pisa.attention(*qkv(), sparsity=0.5, impl="triton")
