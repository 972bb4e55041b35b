"""Spellings put together at random from independent choices: none may be silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .tracing import rewrite

B, H, T, D = 2, 3, 20, 8

letters = st.permutations("abcdefgxyz").map(lambda order: dict(zip("bhtsde", order, strict=False)))


@st.composite
def spellings(draw: st.DrawFn) -> tuple[Callable[..., Tensor], bool]:
    """A function of q, k, v [B, H, T, D] and a boolean [B, T], and whether it is attention."""
    name = draw(letters)
    scores = draw(st.permutations("bhts"))
    out = draw(st.permutations("bhte"))

    def spell(form: str) -> str:
        return "".join(name.get(x, x) for x in form)

    swapped = draw(st.booleans())
    first = spell(("bhsd,bhtd->" if swapped else "bhtd,bhsd->") + "".join(scores))
    second = spell("".join(scores) + ",bhse->" + "".join(out))
    scale_query, scale_scores = draw(st.sampled_from([(1.0, 0.3), (0.5, 1.0), (0.5, -0.4)]))
    divided, masked = draw(st.booleans()), draw(st.sampled_from(["no", "fill", "add", "where"]))
    written_out, cast = draw(st.booleans()), draw(st.booleans())
    over = draw(st.sampled_from("ssst"))  # at times over the queries, which is not attention

    def function(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        q = q * scale_query
        x = torch.einsum(first, *((k, q) if swapped else (q, k)))
        x = x / (1 / scale_scores) if divided else x * scale_scores
        sizes = [{"b": B, "s": T}.get(axis, 1) for axis in scores]
        allowed = valid if scores.index("b") < scores.index("s") else valid.T
        allowed = allowed.reshape(sizes)
        if masked == "fill":
            x = x.masked_fill(~allowed, -torch.inf)
        elif masked == "add":
            x = x + torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, -1e9)
        elif masked == "where":
            x = torch.where(allowed, x, -1e9)
        dim = scores.index(over)
        x = x.double() if cast else x
        if written_out:
            x = (x - x.amax(dim, keepdim=True)).exp()
            x = x / x.sum(dim, keepdim=True)
        else:
            x = F.softmax(x, dim=dim)
        return torch.einsum(second, x.to(v.dtype), v)

    return function, over == "s"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spellings())
def test_random_spelling(case: tuple[Callable[..., Tensor], bool]) -> None:
    function, is_attention = case
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    valid = torch.rand(B, T, generator=generator) > 0.3
    result = rewrite(function, q, k, v, valid)
    assert len(result.decisions) == 1
    assert len(result.ops) == is_attention, result.reasons
    assert result.error < 1e-5 or not torch.isfinite(result.expected).all()
