"""Inputs for the tests of every implementation of the op, and what is allowed to differ."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams, exact_block_count, free_blocks
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2

# A float32 implementation may compute a routing score with this error, relative to the largest
# one. It is far above what float32 sums of these inputs can accumulate.
SCORE_ERROR = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_hot_inputs(dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Each of 8 key blocks of 16 holds 1e4 times one unit vector; each query equals one of those.

    With the inputs comes the exact result: the mean value of the block that the query equals.
    """
    unit = 1e4 * torch.eye(8, dtype=dtype)
    key = unit.repeat_interleave(16, dim=0)[None, None]
    value = torch.arange(128.0, dtype=dtype)[:, None].expand(128, 4)[None, None]
    query = unit.repeat(16, 1)[None, None]
    expected = value.view(1, 1, 8, 16, 4).mean(3).repeat(1, 1, 16, 1)
    return Inputs(query, key, value, None), expected


@st.composite
def cases(draw: st.DrawFn, orders: tuple[str, ...]) -> tuple[Inputs, AttentionParams]:
    """Shapes, layouts, dtypes and settings that an implementation must cope with."""
    query_len = draw(st.integers(1, 700), label="query_len")
    layout = draw(st.sampled_from(["BTHD", "BHTD", "fused"]), label="layout")
    self_attention = layout == "fused" or draw(st.booleans(), label="self_attention")
    key_len = query_len if self_attention else draw(st.integers(1, 700), label="key_len")
    head_dim = draw(st.sampled_from([8, 33, 40, 64, 72, 96, 127, 128, 256]), label="head_dim")
    same = layout == "fused" or draw(st.booleans(), label="same_value_dim")
    value_dim = head_dim if same else draw(st.integers(1, 200), label="value_dim")
    kv_heads = draw(st.integers(1, 2), label="kv_heads")
    group = 1 if layout == "fused" else draw(st.integers(1, 3), label="group")
    inputs = random_inputs(
        batch=draw(st.integers(1, 2), label="batch"),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        query_len=query_len,
        key_len=key_len,
        head_dim=head_dim,
        value_dim=value_dim,
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES), label="dtype"),
        masked=draw(st.sampled_from([0.0, 0.0, 0.3, 0.97]), label="masked"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    params = AttentionParams(
        scale=head_dim**-0.5 * draw(st.sampled_from([0.5, 1.0, 3.0]), label="temperature"),
        sparsity=draw(st.sampled_from([0.0, 0.3, 0.75, 0.875, 0.95]), label="sparsity"),
        block_size=draw(st.sampled_from([16, 32, 64, 128]), label="block_size"),
        routing=draw(st.sampled_from(["topk", "topk_covariance", "threshold"]), label="routing"),
        order=draw(st.sampled_from(orders), label="order"),
        exact=draw(st.sampled_from([(0, 0), (0, 0), (50, 0), (0, 77), (10, 20)]), label="exact"),
    )
    return inputs, params


def routing_is_decided(inputs: Inputs, params: AttentionParams) -> bool:
    """Whether every implementation must choose the same exact blocks.

    Two scores that agree to within the rounding error of float32 may be ranked either way, and
    both results are right. The margin of the decision is measured in float64.
    """
    query, key, value, mask = inputs.to(torch.float64).astuple()
    first, last = free_blocks(key.shape[2], params)
    if params.sparsity == 0 or first >= last:
        return True
    if mask is None:
        mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    group = query.shape[1] // key.shape[1]
    stats = reference.block_statistics(
        key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, params.block_size
    )
    scores = reference._proxy_score(query, stats, params)[..., first:last]
    for b in range(len(scores)):
        score = scores[b][..., stats.valid[b, 0, first:last]]  # [H, M, valid blocks]
        if score.shape[-1] < 2:
            continue
        if float(_margin(score, last - first, params).min()) <= SCORE_ERROR * (
            1 + float(score.abs().max())
        ):
            return False
    return True


def _margin(score: Tensor, blocks: int, params: AttentionParams) -> Tensor:
    """Distance of the closest call in each row of `score` [..., n], n >= 2. [...]"""
    ranked = score.sort(dim=-1, descending=True).values
    if params.routing == "threshold":
        threshold = score.mean(-1) + params.threshold_beta * score.std(-1, correction=0)
        rest = (ranked[..., 1:] - threshold[..., None]).abs().amin(-1)
        # The best block is exact in any case; it matters only which one it is.
        return torch.minimum(rest, ranked[..., 0] - ranked[..., 1])
    count = exact_block_count(params.density, blocks)
    if count >= score.shape[-1]:
        return torch.full(score.shape[:-1], torch.inf)
    return ranked[..., count - 1] - ranked[..., count]


def assert_close_to_specification(
    out: Tensor, lse: Tensor, inputs: Inputs, params: AttentionParams
) -> None:
    """Float32: relative error 1e-5. 16-bit: twice the error of the eager reference in that type."""
    expected, expected_lse = reference.attention(*inputs.to(torch.float64).astuple(), params)
    assert out.dtype == inputs.query.dtype
    assert out.shape == expected.shape
    assert out.stride() == expected.stride()
    budget = 1e-5
    if out.dtype != torch.float32:
        eager, _ = reference.attention(*inputs.astuple(), params)
        budget = 2 * relative_l2(eager, expected)
        largest = float((eager.double() - expected).abs().max())
        assert float((out.double() - expected).abs().max()) <= 2 * largest + 1e-6
    assert relative_l2(out, expected) <= budget
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
