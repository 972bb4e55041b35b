"""Keys and values with fewer heads than the query, shared by the op or copied before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..tracing import rewrite

B, H, G, T, D = 2, 6, 2, 20, 8


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, T, D), (B, G, T, D), (B, G, T, D)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def repeat_kv(x: Tensor, count: int = H // G) -> Tensor:
    """As in Llama."""
    batch, heads, tokens, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, count, tokens, width)
    return x.reshape(batch, heads * count, tokens, width)


def repeated_before_transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2).repeat_interleave(H // G, dim=2).transpose(1, 2)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, dim=1),
    "repeat_interleave_negative_dim": lambda x: torch.repeat_interleave(x, H // G, -3),
    "repeat_kv": repeat_kv,
    "token_first": repeated_before_transpose,
    "unsqueeze_expand_flatten": lambda x: (
        x.unsqueeze(2).expand(-1, -1, H // G, -1, -1).flatten(1, 2)
    ),
    "contiguous_afterwards": lambda x: repeat_kv(x).contiguous(),
}

# Heads in another order than the op shares them in, or not copies at all.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tiled": lambda x: x.repeat(1, H // G, 1, 1),
    "tiled_by_expand": lambda x: x[:, None].expand(-1, H // G, -1, -1, -1).flatten(1, 2),
    "joined": lambda x: torch.cat([x] * (H // G), dim=1),
    "changed_afterwards": lambda x: x.repeat_interleave(H // G, dim=1) * 2,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("spelling", ["sdpa", "handwritten"])
def test_op_reads_the_small_tensors(spelling: str, name: str) -> None:
    copy = COPIES[name]
    result = rewrite(attention(spelling, copy), *inputs())
    (op,) = result.ops
    assert op.kwargs["enable_gqa"]
    assert [x.meta["example_value"].shape[1] for x in op.args[:3]] == [H, G, G]
    assert result.error < 1e-5
    left = [str(node.target) for node in result.graphs[0].graph.nodes]
    assert not {"repeat_interleave", "expand"} & set(left)


@pytest.mark.parametrize("name", OTHERS)
def test_other_copies_are_read_as_they_are(name: str) -> None:
    result = rewrite(attention("sdpa", OTHERS[name]), *inputs())
    (op,) = result.ops
    assert "enable_gqa" not in op.kwargs
    assert result.error < 1e-5


def test_argument_of_sdpa() -> None:
    result = rewrite(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *inputs()
    )
    assert result.ops[0].kwargs["enable_gqa"]
    assert result.error < 1e-5


def test_copies_that_are_used_elsewhere_stay() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        copied = repeat_kv(k)
        return F.scaled_dot_product_attention(q, copied, repeat_kv(v)), copied

    result = rewrite(function, *inputs())
    assert result.ops[0].kwargs["enable_gqa"]
    assert result.error < 1e-5


def test_source_that_changes_before_the_attention_is_not_read_late() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copied = repeat_kv(k)
        k.zero_()
        return F.scaled_dot_product_attention(q, copied, repeat_kv(v)) + k.sum()

    result = rewrite(function, *inputs())
    assert "enable_gqa" not in result.ops[0].kwargs
    assert result.error < 1e-5


def test_shared_heads_without_the_argument_broadcast_and_stay_dense() -> None:
    q, k, v = inputs()
    result = rewrite(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k[:, :1], v[:, :1])
    assert "use enable_gqa=True" in result.reasons[0]


def test_dynamic_length() -> None:
    result = rewrite(attention("sdpa", repeat_kv), *inputs(), dynamic=True)
    assert len(result.ops) == 1
    assert result.error < 1e-5


def attention(spelling: str, copy: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    if spelling == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, copy(k), copy(v))
    return lambda q, k, v: (q @ copy(k).mT).softmax(-1) @ copy(v)
