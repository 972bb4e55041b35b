"""`options={"strict": True}`: what is an error, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import pisa_compile as pisa
from pisa_compile.options import parse

from ...models import tiny, tokens


class Layer(nn.Module):
    """One attention, as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        if self.kind == "cross":
            return F.scaled_dot_product_attention(q, q[:, :, :40], q[:, :, :40])
        if self.kind == "dropout":
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        if self.kind == "bias":
            return F.scaled_dot_product_attention(q, q, q, attn_mask=x @ x.transpose(1, 2))
        if self.kind == "near":
            weights = (q @ q.transpose(-1, -2)).softmax(-1)
            return weights @ q + weights.sum()
        return F.scaled_dot_product_attention(q, q, q, is_causal=self.kind == "causal")


class Model(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for kind in kinds)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def run(model: nn.Module, count: int = 100, **options: Any) -> Any:
    options = {"inner": "eager", "min_tokens": 64, "strict": True, **options}
    with torch.no_grad():
        return torch.compile(model, backend="pisa", options=options)(tokens(count))


@pytest.mark.parametrize("kind", ["causal", "bias", "dropout", "near"])
def test_attention_that_stays_dense_by_no_choice_is_an_error(kind: str) -> None:
    model = Model("plain", kind)
    reasons = {
        "causal": "it is causal",
        "bias": "mask",
        "dropout": "dropout is active",
        "near": "used",
    }
    with pytest.raises(pisa.UnsupportedError) as raised:
        run(model)
    text = str(raised.value)
    assert "strict=True, and 1 of 2 attention sites stay dense" in text
    assert "layers.1: " in text
    assert reasons[kind] in text
    assert "layers.0" not in text
    run(model, strict=False)


@pytest.mark.parametrize("kind", ["causal", "bias", "dropout", "near"])
def test_a_dense_policy_is_a_choice(kind: str) -> None:
    model = Model("plain", kind)
    pisa.set_policy(model, {"layers.1": pisa.DENSE})
    assert len(run(model)) == 2
    assert len(run(Model(kind), enabled=False)) == 1


@pytest.mark.parametrize("kind", ["plain", "causal", "near"])
def test_short_sequences_are_no_error_whatever_else_they_are(kind: str) -> None:
    assert len(run(Model(kind), count=50)) == 1


def test_cross_attention_is_no_error() -> None:
    assert len(run(Model("cross", "plain"))) == 2


def test_steps_that_are_dense_by_schedule_are_no_error() -> None:
    model, x = tiny(1), tokens(100)
    options = {"inner": "eager", "min_tokens": 0, "strict": True, "block_size": 16}
    schedule = pisa.Schedule(dense_first=1)
    compiled = torch.compile(model, backend="pisa", options={**options, "schedule": schedule})
    with torch.no_grad(), pisa.denoising(2) as loop:
        first, _ = [compiled(x) for _ in loop]
        torch.testing.assert_close(first, model(x))


def test_layers_that_a_preset_keeps_dense_are_no_error() -> None:
    from benchmarks.diffusers_models import CASES

    pytest.importorskip("diffusers")
    case = CASES["FluxTransformer2DModel"]
    options = {"inner": "eager", "min_tokens": 0, "strict": True}
    compiled = torch.compile(case.build(), backend="pisa", options=options)
    report = pisa.explain(compiled, **case.inputs())
    assert [site.replaced for site in report.sites] == [False, False, True, True]


def test_needed_gradients_are_an_error() -> None:
    model = tiny(1)
    options = {"inner": "eager", "min_tokens": 0, "strict": True}
    compiled = torch.compile(model, backend="pisa", options=options)
    with pytest.raises(pisa.UnsupportedError, match="gradients are needed"):
        compiled(tokens(100))


def test_the_error_is_also_what_dynamo_raises_for_a_backend() -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        run(Model("causal"))
    assert isinstance(raised.value.inner_exception, pisa.UnsupportedError)


def test_strict_is_a_bool() -> None:
    with pytest.raises(TypeError, match="option 'strict' must be a bool, got 1"):
        parse(None, {"strict": 1})
