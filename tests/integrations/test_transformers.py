"""The attention implementation of HF transformers against "sdpa", on tiny configurations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import pisa_compile as pisa
from pisa_compile.ops.observation import OpCall, observed

transformers = pytest.importorskip("transformers")

from pisa_compile.integrations import transformers as integration  # noqa: E402

SETTINGS = {"min_tokens": 0, "block_size": 16}


def vision() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=48,
        patch_size=4,
    )
    return _sharp(transformers.ViTModel(config)), {"pixel_values": torch.randn(2, 3, 48, 48)}


def language() -> tuple[nn.Module, dict[str, Tensor]]:
    """Bidirectional over a padded sequence with fewer key heads, as models that denoise text."""
    torch.manual_seed(0)
    config = transformers.EuroBertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tokens = torch.randint(3, 50, (2, 150))
    keys = (torch.arange(150)[None] < torch.tensor([150, 101])[:, None]).long()
    return _sharp(transformers.EuroBertModel(config)), {"input_ids": tokens, "attention_mask": keys}


def _sharp(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model.eval()


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many calls went to the op inside."""
    count = [0]

    def observe(call: OpCall) -> None:
        count[0] += 1

    with observed(observe):
        yield count


@pytest.mark.parametrize("make", [vision, language])
def test_equals_sdpa_when_dense_and_differs_when_sparse(make) -> None:
    model, inputs = make()
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.0), "pisa_dense")
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.8), "pisa")
    valid = inputs.get("attention_mask", torch.ones(2, 1)).bool()
    with torch.no_grad():
        results = {}
        for name in ("sdpa", "pisa_dense", "pisa"):
            model.set_attn_implementation(name)
            with counted() as count:
                out = model(**inputs).last_hidden_state
            results[name] = out[valid.expand(out.shape[:2])]
            assert count == [0 if name == "sdpa" else 2]
    torch.testing.assert_close(results["pisa_dense"], results["sdpa"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(results["pisa"], results["sdpa"], atol=1e-2)


def test_causal_models_compute_what_sdpa_computes() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = _sharp(transformers.LlamaModel(config))
    tokens = torch.randint(0, 50, (2, 90))
    keys = (torch.arange(90)[None] < torch.tensor([90, 61])[:, None]).long()
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.8))
    for mask in (None, keys):
        with torch.no_grad(), counted() as count:
            model.set_attn_implementation("sdpa")
            expected = model(tokens, attention_mask=mask).last_hidden_state
            model.set_attn_implementation("pisa")
            out = model(tokens, attention_mask=mask).last_hidden_state
        assert count == [0]
        assert torch.equal(out, expected)


def test_gradients_and_dropout_keep_it_dense() -> None:
    model, inputs = vision()
    integration.register(pisa.Policy(**SETTINGS, sparsity=0.8))
    model.set_attn_implementation("pisa")
    with counted() as count:
        model(**inputs).last_hidden_state.sum().backward()
    assert count == [0]
    assert model.layers[0].attention.q_proj.weight.grad is not None
