from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

from ..tracing import rewrite

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
    # Of torch itself, where Dynamo traces an indexed block mask.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

Function = Callable[[Tensor, Tensor, Tensor], object]


def inputs(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 64, 16, generator=generator)
    k, v = (torch.randn(2, kv_heads, 64, 16, generator=generator) for _ in range(2))
    return q, k, v


def block_mask(allowed: Callable[..., Tensor]) -> object:
    return create_block_mask(allowed, 2, None, 64, 64, device="cpu")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_flex_attention(scale: float | None, dynamic: bool) -> None:
    result = rewrite(
        lambda q, k, v: flex_attention(q, k, v, scale=scale), *inputs(), dynamic=dynamic
    )
    (op,) = result.ops
    assert op.kwargs["scale"] == pytest.approx(scale or 0.25)
    assert result.error < 1e-5


def test_grouped_queries() -> None:
    result = rewrite(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *inputs(2))
    assert result.ops[0].kwargs["enable_gqa"]
    assert result.error < 1e-5


REFUSED: dict[str, tuple[Function, str]] = {
    "score_mod": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)),
        "score_mod",
    ),
    "lse": (lambda q, k, v: flex_attention(q, k, v, return_lse=True), "return_lse=False"),
}


@pytest.mark.filterwarnings("ignore:.*return_lse is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_other_flex_attention_stays_dense(name: str) -> None:
    function, reason = REFUSED[name]
    result = rewrite(function, *inputs())
    assert result.ops == []
    assert [reason in decision.reason for decision in result.decisions] == [True]


# Mask functions of key padding, and the [B, T] that they amount to.
MASKS: dict[str, Callable[[Tensor, Tensor], tuple[Callable[..., Tensor], Tensor]]] = {
    "lengths": lambda lengths, valid: (
        lambda b, h, i, j: j < lengths[b],
        torch.arange(64) < lengths[:, None],
    ),
    "boolean": lambda lengths, valid: (lambda b, h, i, j: valid[b, j], valid),
    "both": lambda lengths, valid: (
        and_masks(lambda b, h, i, j: ~(j >= lengths[b]), lambda b, h, i, j: valid[0, j]),
        (torch.arange(64) < lengths[:, None]) & valid[:1],
    ),
}


@pytest.mark.parametrize(("name", "block_size"), [("lengths", 128), ("boolean", 16), ("both", 16)])
def test_padding_block_mask_becomes_a_key_mask(name: str, block_size: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
        mask, keys = MASKS[name](lengths, valid)
        if not torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
        blocks = create_block_mask(mask, 2, None, 64, 64, "cpu", BLOCK_SIZE=block_size)
        return flex_attention(q, k, v, block_mask=blocks)

    valid = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) > 0.3
    result = rewrite(function, *inputs(), torch.tensor([40, 23]), valid)
    assert result.reasons == []
    (op,) = result.ops
    mask = op.args[3].meta["example_value"]
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 1, 64)
    assert result.error < 1e-5


def test_block_mask_that_allows_everything_is_dropped() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(q, k, v)
        blocks = create_block_mask(and_masks(), None, None, 64, 64, "cpu")
        return flex_attention(q, k, v, block_mask=blocks)

    result = rewrite(function, *inputs())
    assert result.ops[0].args[3] is None
    assert result.error < 1e-5


def made_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, block_mask=OUTSIDE)


def other_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The blocks of one mask with the function of another."""
    lengths = torch.tensor([40, 23])
    blocks = create_block_mask(lambda b, h, i, j: j < lengths[b], 2, None, 64, 64, "cpu", 16)
    blocks = BlockMask.from_kv_blocks(
        blocks.kv_num_blocks,
        blocks.kv_indices,
        blocks.full_kv_num_blocks,
        blocks.full_kv_indices,
        blocks.BLOCK_SIZE,
        mask_mod=lambda b, h, i, j: j < lengths[b] - 3,
    )
    return flex_attention(q, k, v, block_mask=blocks)


def fewer_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks chosen by hand, in which the function still holds."""
    lengths = torch.tensor([40, 23])
    blocks = create_block_mask(lambda b, h, i, j: j < lengths[b], 2, None, 64, 64, "cpu", 16)
    blocks = BlockMask.from_kv_blocks(
        blocks.kv_num_blocks.clamp(max=1),
        blocks.kv_indices,
        blocks.full_kv_num_blocks,
        blocks.full_kv_indices,
        blocks.BLOCK_SIZE,
        mask_mod=blocks.mask_mod,
    )
    return flex_attention(q, k, v, block_mask=blocks)


def changed_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = torch.tensor([40, 23])
    blocks = create_block_mask(lambda b, h, i, j: j < lengths[b], 2, None, 64, 64, "cpu")
    lengths.sub_(2)
    return flex_attention(q, k, v, block_mask=blocks)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask(lambda b, h, i, j: i >= j))


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = create_block_mask(lambda b, h, i, j: j < 30 + h, None, 4, 64, 64, "cpu")
    return flex_attention(q, k, v, block_mask=blocks)


OUTSIDE = create_block_mask(lambda b, h, i, j: j < 40, 2, None, 64, 64, device="cpu")
UNPROVEN = {
    made_outside: "made outside of the compiled code",
    other_function: "not provably made by create_block_mask",
    fewer_blocks: "not provably made by create_block_mask",
    changed_in_between: "not provably made by create_block_mask",
    over_queries: "varies over queries",
    over_heads: "differs between heads",
}


@pytest.mark.parametrize("function", UNPROVEN, ids=lambda function: function.__name__)
def test_other_block_masks_stay_dense(function: Function) -> None:
    def skipped_in_eager(q: Tensor, k: Tensor, v: Tensor) -> object:
        return function(q, k, v) if torch.compiler.is_compiling() else q

    result = rewrite(skipped_in_eager, *inputs())
    assert result.ops == []
    assert UNPROVEN[function] in result.reasons[0]
    if "create_block_mask" in result.reasons[0]:
        assert "F.scaled_dot_product_attention" in result.reasons[0]
