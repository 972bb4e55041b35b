"""Inputs for the tests of every implementation of the op, and what is allowed to differ."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from hypothesis import strategies as st
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams, exact_block_counts, free_key_blocks
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2, specified

# A float32 implementation may compute a routing score with this error, relative to the largest
# one. It is far above what float32 sums of these inputs can accumulate.
SCORE_ERROR = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSITIES = (0.04, 0.25, 0.3, 0.7, 1.0)


@dataclass(frozen=True)
class Case:
    inputs: Inputs
    params: AttentionParams
    density: Tensor | None = None  # [] or [H]
    permutation: Tensor | None = None  # [T]

    @property
    def keywords(self) -> dict[str, Tensor | None]:
        return {"density": self.density, "permutation": self.permutation}

    def in_order(self) -> Inputs:
        """The inputs with their tokens at the places that the permutation gives them."""
        if self.permutation is None:
            return self.inputs
        query, key, value, mask = self.inputs.astuple()
        query, key, value = (x[:, :, self.permutation] for x in (query, key, value))
        return Inputs(query, key, value, None if mask is None else mask[:, self.permutation])

    def specified(self) -> tuple[Tensor, Tensor]:
        return specified(self.inputs, self.params, **self.keywords)


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
def cases(draw: st.DrawFn, orders: tuple[str, ...]) -> Case:
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
        key_block_size=draw(st.sampled_from([None, None, 16, 32, 128]), label="key_block_size"),
        routing=draw(st.sampled_from(["topk", "topk_covariance", "threshold"]), label="routing"),
        order=draw(st.sampled_from(orders), label="order"),
        exact=draw(st.sampled_from([(0, 0), (0, 0), (50, 0), (0, 77), (10, 20)]), label="exact"),
    )
    heads, share = kv_heads * group, st.sampled_from(DENSITIES)
    per_head = st.lists(share, min_size=heads, max_size=heads)
    density = draw(st.none() | share | per_head, label="density")
    permutation = None
    if query_len == key_len and draw(st.booleans(), label="permuted"):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000), label="order"))
        dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="integers")
        permutation = torch.randperm(query_len, generator=generator).to(dtype)
    return Case(inputs, params, None if density is None else torch.tensor(density), permutation)


def routing_is_decided(case: Case) -> bool:
    """Whether every implementation must choose the same exact blocks.

    Two scores that agree to within the rounding error of float32 may be ranked either way, and
    both results are right. The margin of the decision is measured in float64.
    """
    query, key, value, mask = case.in_order().to(torch.float64).astuple()
    params = case.params
    first, last = free_key_blocks(key.shape[2], params)
    if first >= last:
        return True
    density = torch.tensor(params.density) if case.density is None else case.density
    density = density.to(torch.float64).expand(query.shape[1])
    if mask is None:
        mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    group = query.shape[1] // key.shape[1]
    stats = reference.block_statistics(
        key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, params.key_size
    )
    scores = reference._proxy_score(query, stats, params, key.shape[1])[..., first:last]
    for b in range(len(scores)):
        score = scores[b][..., stats.valid[b, 0, first:last]]  # [H, M, valid blocks]
        if score.shape[-1] < 2:
            continue
        margin = min(
            _margin(score[h], last - first, params.routing, float(density[h]))
            for h in range(len(density))
        )
        if margin <= SCORE_ERROR * (1 + float(score.abs().max())):
            return False
    return True


def _margin(score: Tensor, blocks: int, routing: str, density: float) -> float:
    """Distance of the closest call in any row of one head's `score` [M, n], n >= 2."""
    if density >= 1:
        return float("inf")
    ranked = score.sort(dim=-1, descending=True).values
    if routing == "threshold":
        beta = NormalDist().inv_cdf(1 - density)
        threshold = score.mean(-1) + beta * score.std(-1, correction=0)
        rest = (ranked[..., 1:] - threshold[..., None]).abs().amin(-1)
        # The best block is exact in any case; it matters only which one it is.
        return float(torch.minimum(rest, ranked[..., 0] - ranked[..., 1]).min())
    count = int(exact_block_counts(torch.tensor(density, dtype=torch.float64), blocks))
    if count >= score.shape[-1]:
        return float("inf")
    return float((ranked[..., count - 1] - ranked[..., count]).min())


def assert_close_to_specification(out: Tensor, lse: Tensor, case: Case) -> None:
    """Float32: relative error 1e-5. 16-bit: twice the error of the eager reference in that type."""
    expected, expected_lse = case.specified()
    assert out.dtype == case.inputs.query.dtype
    assert out.shape == expected.shape
    assert out.stride() == expected.stride()
    budget = 1e-5
    if out.dtype != torch.float32:
        eager, _ = reference.attention(*case.inputs.astuple(), case.params, **case.keywords)
        budget = 2 * relative_l2(eager, expected)
        largest = float((eager.double() - expected).abs().max())
        assert float((out.double() - expected).abs().max()) <= 2 * largest + 1e-6
    assert relative_l2(out, expected) <= budget
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
