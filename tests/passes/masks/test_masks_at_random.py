"""Masks put together at random, some of them with rows without a key: none is silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pisa_compile.passes.masks.domain import spacing

from ..tracing import rewrite
from .shared import B, D, H, T

Mask = Callable[[Tensor], Tensor]

SHAPES: dict[str, Mask] = {
    "keys": lambda m: m[:, None, None],
    "expanded": lambda m: m[:, None, None].expand(B, 1, T, T),
    "rows": lambda m: m[:, None, :, None],
    "outer": lambda m: m[:, None, None] & m[:, None, :, None],
    "not_outer": lambda m: ~(~m[:, None, None] | ~m[:, None, :, None]),
    "either": lambda m: m[:, None, None] | m[:, None, :, None],
    "positions": lambda m: (torch.arange(T)[:, None] >= 0) & m[:, None, None],
    "causal": lambda m: m[:, None, None] & torch.ones(T, T).bool().tril(),
}
FILLS = (-math.inf, -5.0, -1000.0, -10000.0, -65504.0, -1e6, -1e9, -1e10)
ADDED = ("product", "where", "filled", "shifted", "raised", "opposite", "twice")


def additive(form: str, allowed: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    number = allowed.to(dtype)
    if form == "where":
        return torch.where(allowed, torch.zeros((), dtype=dtype), torch.tensor(fill, dtype=dtype))
    if form == "filled" or math.isinf(fill):
        fill = max(fill, torch.finfo(dtype).min) if math.isfinite(fill) else fill
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, fill)
    if form == "shifted":
        return (1 - number) * fill + fill
    if form == "raised":
        return number * -fill
    if form == "opposite":
        return -((1 - number) * -fill)
    product = (1 - number) * fill
    last = (torch.arange(T) >= T - 3).to(dtype)
    return product + last * fill if form == "twice" else product


@st.composite
def attentions(draw: st.DrawFn) -> tuple[str, Callable[..., Tensor], torch.dtype, float]:
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    fill = draw(st.sampled_from(FILLS))
    kind = draw(st.sampled_from(["boolean", "added", "filled", "chosen", "sum", "scaled_sum"]))
    form = draw(st.sampled_from(ADDED))
    half = (torch.float16, torch.bfloat16)
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.float64, *half)))
    lowest = draw(st.booleans()) and fill < -1e5
    fill = torch.finfo(dtype).min if lowest and math.isfinite(fill) else fill
    second = draw(st.sampled_from(["", "", "", "infinite", "finite"]))

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        allowed = shape(m)
        if kind == "boolean":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        if kind == "added":
            mask = additive(form, allowed, fill, dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.mT * D**-0.5
        some = max(fill, torch.finfo(dtype).min) if math.isfinite(fill) else fill
        if second:
            last = torch.arange(T) >= T - 3
            scores = scores.masked_fill(last, -math.inf if second == "infinite" else some)
        if kind == "filled":
            scores = scores.masked_fill(~allowed, some)
        elif kind == "chosen":
            scores = torch.where(allowed, scores, some)
        elif kind == "sum":
            scores = scores + additive(form, allowed, fill, dtype)
        else:
            scores = (scores * 4 + additive(form, allowed, fill, dtype)) / 4
        return scores.softmax(-1) @ v

    return f"{kind} {form if 'sum' in kind or kind == 'added' else ''}", function, dtype, fill


patterns = st.lists(st.sampled_from(["some", "all", "none", "one"]), min_size=B, max_size=B)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(attentions(), patterns, st.integers(0, 1 << 30))
def test_equal_to_dense_attention_or_dense(
    attention: tuple[str, Callable[..., Tensor], torch.dtype, float], pattern: list[str], seed: int
) -> None:
    name, function, dtype, fill = attention
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, D, generator=generator).to(dtype) for _ in range(3))
    valid = torch.rand(B, T, generator=generator) > 0.5
    for row, what in zip(valid, pattern, strict=True):
        if what != "some":
            row[:] = what == "all"
            row[7] = what != "none"
    result = rewrite(function, q, k, v, valid)
    (decision,) = result.decisions
    event(f"{name}: {'replaced' if decision.replaced else 'dense'}")
    if not decision.replaced:
        assert result.ops == []
        assert torch.equal(result.output.nan_to_num(), result.expected.nan_to_num())
        return
    # A softmax that is written out divides 0 by 0 where all scores are -inf: we give zeros.
    expected = result.expected.masked_fill(result.expected.isnan().any(-1, keepdim=True), 0.0)
    # Dense attention itself sees scores next to a finite number only as finely as that has digits.
    added_in = torch.promote_types(dtype, torch.float32) if "added" in name else dtype
    step = spacing(2 * fill, added_in) if math.isfinite(fill) else 0.0
    step = 2 * step if step < 1.0 else 0.0
    error = (result.output.double() - expected.double()).abs().max()
    assert error <= v.double().abs().max() * (16 * torch.finfo(dtype).eps + step), name
