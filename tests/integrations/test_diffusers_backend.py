"""The attention-backend name of diffusers, against its native backend and the compiled way."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import pisa_compile as pisa

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import (  # noqa: E402
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from pisa_compile.integrations import diffusers as integration  # noqa: E402

SETTINGS = {"min_tokens": 0, "block_size": 16, "curve": "raster", "exact": (0, 0)}


@pytest.fixture(autouse=True)
def native_again() -> Iterator[None]:
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def wan() -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def call(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 20, 20, generator=generator)
    text = torch.randn(1, 12, 16, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500]), text, return_dict=False)[0]


def test_equals_native_when_dense_and_the_compiled_way_when_sparse() -> None:
    model = wan()
    expected = call(model)
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.0))
    model.set_attention_backend("pisa")
    torch.testing.assert_close(call(model), expected, atol=1e-4, rtol=1e-4)
    # Registering again replaces the policy; models that use the name follow.
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.7))
    sparse = call(model)
    assert not torch.allclose(sparse, expected, atol=1e-2)
    model.set_attention_backend("native")
    options = {**SETTINGS, "sparsity": 0.7, "inner": "eager", "preset": None}
    compiled = torch.compile(model, backend="pisa", options=options)
    torch.testing.assert_close(call(compiled), sparse, atol=1e-4, rtol=1e-4)


def test_is_traced_without_a_graph_break() -> None:
    model = wan()
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.7))
    model.set_attention_backend("pisa")
    expected = call(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), expected, atol=1e-5, rtol=1e-5)


def test_context_manager_and_masks() -> None:
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.0), name="pisa_dense")
    query = torch.randn(2, 100, 2, 16)  # [B, T, H, D]
    keys = torch.arange(100)[None] < torch.tensor([100, 70])[:, None]  # [B, T]
    dispatch = diffusers.models.attention_dispatch.dispatch_attention_fn
    for mask in (None, keys, keys[:, None, None]):
        expected = dispatch(query, query, query, mask, scale=0.3)
        with attention_backend("pisa_dense"):
            out = dispatch(query, query, query, mask, scale=0.3)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    # What is not padding, or causal, is computed by torch.
    rows = torch.ones(100, 100, dtype=torch.bool).tril()
    with attention_backend("pisa_dense"):
        causal = dispatch(query, query, query, is_causal=True)
        torch.testing.assert_close(dispatch(query, query, query, rows[None, None]), causal)


def test_names_and_policies_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="must be a new lower-case identifier, got 'native'"):
        integration.register(name="native")
    with pytest.raises(pisa.UnsupportedError, match="schedule"):
        integration.register(pisa.Policy(schedule=pisa.Schedule(dense_first=2)))
    query = torch.randn(1, 40, 2, 16)
    integration.register(name="pisa_parallel")
    function = _AttentionBackendRegistry._backends[AttentionBackendName("pisa_parallel")]
    ring = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    mask = torch.ones(1, 40, dtype=torch.bool)
    with pytest.raises(pisa.UnsupportedError, match="does not pass masks"):
        function(query, query, query, mask, _parallel_config=ring)
