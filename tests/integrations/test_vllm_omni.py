"""The plugin against vLLM-Omni's documented contract, as its dispatcher would call it."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.kernels.testing import random_inputs


def plugin() -> Any:
    (found,) = entry_points(group="vllm_omni.sparse_attn", name="pisa")
    return found.load()


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    static: dict[str, Any],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 0.125,
) -> Tensor:
    """What the documentation says the dispatcher does with [B, T, H, D] tensors."""
    function = plugin()
    per_forward = {
        "denoise_step_idx": torch.tensor([3]),
        "latent_shape": torch.tensor([[1, 20, 20]]),
        "patch_size": torch.tensor([[1, 1, 1]]),
    }
    params = {**static, **per_forward}
    if mask is not None:
        assert function.capabilities["supports_attention_mask"]
        params["attn_mask"] = mask
    return function(query, key, value, params, is_causal=is_causal, softmax_scale=scale)


def qkv(tokens: int = 400, **kwargs: Any) -> tuple[Tensor, ...]:
    inputs = random_inputs(query_len=tokens, head_dim=32, **kwargs)
    return tuple(x.transpose(1, 2) for x in inputs.astuple()[:3])


def dense(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=0.125, enable_gqa=gqa, **kwargs)
    return out.transpose(1, 2)


def test_computes_what_the_op_computes() -> None:
    query, key, value = qkv()
    settings = {"min_tokens": 0, "sparsity": 0.6, "block_size": 32, "exact": (40, 0)}
    out = dispatch(query, key, value, settings)
    expected = pisa.attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        sparsity=0.6,
        scale=0.125,
        block_size=32,
        exact=(40, 0),
    ).transpose(1, 2)
    assert torch.equal(out, expected)
    assert out.shape == query.shape
    assert not torch.allclose(out, dense(query, key, value), atol=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_dense_at_sparsity_0(kv_heads: int) -> None:
    query, key, value = qkv(heads=4, kv_heads=kv_heads)
    out = dispatch(query, key, value, {"min_tokens": 0, "sparsity": 0.0})
    torch.testing.assert_close(out, dense(query, key, value), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dims", [2, 4])
def test_padding_mask(dims: int) -> None:
    query, key, value = qkv()
    mask = torch.arange(400)[None] < 333
    given = mask if dims == 2 else mask[:, None, None]
    out = dispatch(query, key, value, {"min_tokens": 0, "sparsity": 0.0}, mask=given)
    expected = dense(query, key, value, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_causal_short_and_cross_attention_are_computed_densely() -> None:
    query, key, value = qkv()
    expected = dense(query, key, value, is_causal=True)
    assert torch.equal(dispatch(query, key, value, {"min_tokens": 0}, is_causal=True), expected)
    assert torch.equal(dispatch(query, key, value, {}), dense(query, key, value))
    text = key[:, :77], value[:, :77]
    assert torch.equal(dispatch(query, *text, {"min_tokens": 0}), dense(query, *text))


def test_bad_settings_raise_and_unknown_ones_are_named(caplog: pytest.LogCaptureFixture) -> None:
    query, key, value = qkv()
    with pytest.raises(ValueError, match="sparsity must be in"):
        dispatch(query, key, value, {"sparsity": 1.5})
    with pytest.raises(pisa.UnsupportedError, match="needs a model compiled"):
        dispatch(query, key, value, {"curve": "hilbert"})
    with caplog.at_level(logging.WARNING, "pisa_compile"):
        dispatch(query, key, value, {"sparsty": 0.9})
    assert "without a meaning here: sparsty" in caplog.text
