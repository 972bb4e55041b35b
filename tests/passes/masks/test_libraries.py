"""Masks as torch's modules, transformers and diffusers make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..tracing import rewrite
from .shared import B, T, inputs

pytestmark = pytest.mark.filterwarnings("default")  # not ours

masking = pytest.importorskip("transformers.masking_utils")
transformers = pytest.importorskip("transformers")


def configuration(attention: str, window: int = 6) -> Any:
    result = transformers.BertConfig(hidden_size=16, num_attention_heads=2)
    result._attn_implementation = attention
    result.sliding_window = window
    return result


Make = Callable[[Tensor, Tensor], Tensor]
EMBEDDED = torch.zeros(B, T, 16)


def bidirectional(attention: str, **functions: Any) -> Make:
    config = configuration(attention)

    def make(m: Tensor, other: Tensor) -> Tensor:
        bound = {name: function(other) for name, function in functions.items()}
        mask = masking.create_bidirectional_mask(config, EMBEDDED, m, **bound)
        assert isinstance(mask, Tensor)
        return mask

    return make


def windowed(attention: str, window: int) -> Make:
    config = configuration(attention, window)

    def make(m: Tensor, other: Tensor) -> Tensor:
        mask = masking.create_bidirectional_sliding_window_mask(config, EMBEDDED, m)
        assert isinstance(mask, Tensor)
        return mask

    return make


def packed(m: Tensor, other: Tensor) -> Tensor:
    """Several texts in a row, which do not see one another."""
    mask = masking.sdpa_mask(
        B,
        T,
        T,
        mask_function=masking.packed_sequence_mask_function(m.cumsum(1)),
        allow_is_causal_skip=False,
    )
    assert isinstance(mask, Tensor)
    return mask


def of_keys(other: Tensor) -> Callable[..., Tensor]:
    return lambda batch, head, query, key: other[batch, key]


def of_queries(other: Tensor) -> Callable[..., Tensor]:
    return lambda batch, head, query, key: other[batch, query] | other[batch, key]


TAKEN: dict[str, Make] = {
    "padding": bidirectional("sdpa"),
    "padding_as_numbers": bidirectional("eager"),
    "and_a_function": bidirectional("sdpa", and_mask_function=of_keys),
    "and_a_function_as_numbers": bidirectional("eager", and_mask_function=of_keys),
    "or_a_function": bidirectional("sdpa", or_mask_function=of_keys),
    "window_longer_than_the_sequence": windowed("sdpa", T),
}
REFUSED: dict[str, Make] = {
    "function_of_queries": bidirectional("sdpa", and_mask_function=of_queries),
    "window": windowed("sdpa", 6),
    "window_as_numbers": windowed("eager", 6),
    "packed": packed,
}


def attend(make: Make) -> Callable[..., Tensor]:
    return lambda q, k, v, m, o: F.scaled_dot_product_attention(q, k, v, attn_mask=make(m, o))


def with_masks() -> tuple[Tensor, ...]:
    q, k, v, valid = inputs()
    valid[1] = False
    return q, k, v, valid, valid.flip(1)


@pytest.mark.parametrize("name", TAKEN)
def test_mask_of_transformers_that_is_padding(name: str) -> None:
    result = rewrite(attend(TAKEN[name]), *with_masks())
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.error < 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_mask_of_transformers_that_is_more(name: str) -> None:
    result = rewrite(attend(REFUSED[name]), *with_masks())
    assert result.ops == []
    assert "varies over queries" in result.reasons[0]


@pytest.mark.parametrize("name", ["padding", "padding_as_numbers", "and_a_function"])
def test_dynamic_lengths(name: str) -> None:
    result = rewrite(attend(TAKEN[name]), *with_masks(), dynamic=True)
    assert len(result.ops) == 1
    assert result.error < 1e-6


@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "numbers"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_of_torch(*, norm_first: bool, boolean: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    valid = inputs()[3]
    valid[:, :2] = True

    def function(x: Tensor, m: Tensor) -> Tensor:
        padding = ~m if boolean else torch.zeros(B, T).masked_fill(~m, -torch.inf)
        out: Tensor = encoder(x, src_key_padding_mask=padding)
        return out * m[..., None]  # the fast path fills padding rows with something of its own

    result = rewrite(function, torch.randn(B, T, 32), valid)
    assert len(result.ops) == 2
    assert result.error < 1e-5


def test_mask_that_diffusers_repeats_over_heads() -> None:
    processors = pytest.importorskip("diffusers.models.attention_processor")
    attention = processors.Attention(16, heads=2, dim_head=8).eval()

    def function(x: Tensor, m: Tensor) -> Tensor:
        out: Tensor = attention(x, attention_mask=((1 - m.float()) * -10000.0)[:, None])
        return out

    *_, valid = inputs()
    valid[1] = False
    result = rewrite(function, torch.randn(B, T, 16), valid)
    assert len(result.ops) == 1
    assert result.error < 4e-3
