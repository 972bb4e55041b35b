"""Modules of torch whose attention hides in one node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pisa_compile.policies.policy import Policy

from ..tracing import rewrite

B, T, C, HEADS = 2, 20, 32, 4


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, C)), generator=torch.Generator().manual_seed(0))


def padding() -> Tensor:
    """True where a token is padding, as `key_padding_mask` wants it."""
    return torch.arange(T) >= torch.tensor([[T - 7], [T - 2]])


def future() -> Tensor:
    return torch.ones(T, T).triu(1).bool()


def attention(**options: bool) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(C, HEADS, **{"batch_first": True, **options}).eval()
    nn.init.normal_(module.in_proj_bias if module.in_proj_bias is not None else torch.empty(1))
    return module


def encoder_layer(**options: object) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(C, HEADS, 2 * C, batch_first=True, **options).eval()


Call = Callable[[nn.Module, Tensor], object]

MULTIHEAD: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "output_alone": (attention, lambda m, x: m(x, x, x, need_weights=False)[0]),
    "weights_computed_but_unused": (attention, lambda m, x: m(x, x, x)[0]),
    "tokens_first": (
        lambda: attention(batch_first=False),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, need_weights=False)[0],
    ),
    "without_batch": (attention, lambda m, x: m(x[0], x[0], x[0], need_weights=False)[0]),
    "without_bias": (
        lambda: attention(bias=False),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "separate_projections": (lambda: attention(kdim=C, vdim=C), lambda m, x: m(x, x, x)[0]),
    "key_padding_mask": (
        attention,
        lambda m, x: m(x, x, x, key_padding_mask=padding(), need_weights=False)[0],
    ),
    "key_padding_mask_with_weights": (
        attention,
        lambda m, x: m(x, x, x, key_padding_mask=padding())[0],
    ),
    "training_without_dropout": (
        lambda: attention().train(),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention(name: str) -> None:
    make, call = MULTIHEAD[name]
    module = make()
    result = rewrite(lambda x: call(module, x), tokens())
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.error < 1e-5
    assert not [n for n in result.graphs[0].graph.nodes if "multi_head" in str(n.target)]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
def test_more_keys_than_tokens(bias: bool, zero: bool, weights: bool, padded: bool) -> None:
    """Equal or dense with a reason, never silent."""
    module = attention(add_bias_kv=bias, add_zero_attn=zero)
    blocked = padding() if padded else None
    result = rewrite(
        lambda x: module(x, x, x, key_padding_mask=blocked, need_weights=weights)[0], tokens()
    )
    assert len(result.decisions) == 1
    assert len(result.ops) + len(result.reasons) == 1
    assert result.error < 1e-5


def test_multihead_attention_with_dynamic_length() -> None:
    module = attention()
    result = rewrite(lambda x: module(x, x, x)[0], tokens(), dynamic_dims=(1,))
    assert len(result.ops) == 1
    assert result.error < 1e-5


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm_last", "norm_first"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_encoder_layer(path: str, activation: str, norm_first: bool, mask: bool) -> None:
    layer = encoder_layer(activation=activation, norm_first=norm_first)
    if path == "plain":
        layer.requires_grad_(False)
    blocked = padding() if mask else None
    result = rewrite(
        lambda x: layer(x, src_key_padding_mask=blocked), tokens(), grad=path == "plain"
    )
    assert result.reasons == []
    assert len(result.ops) == 1
    assert _valid_rows(result.output, blocked) == pytest.approx(
        _valid_rows(result.expected, blocked), abs=1e-5
    )


def test_encoder_of_several_layers_shares_its_mask() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 3, enable_nested_tensor=False).eval()
    result = rewrite(lambda x: encoder(x, src_key_padding_mask=padding()), tokens())
    assert len(result.ops) == 3
    assert result.error < 1e-5


def test_modules_are_named() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    result = rewrite(encoder, tokens())
    assert [decision.module for decision in result.decisions] == ["layers.0", "layers.1"]


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], Call, str]] = {
    "weights_returned": (attention, lambda m, x: m(x, x, x), "need_weights=False"),
    "dropout": (
        lambda: attention(dropout=0.1).train(),
        lambda m, x: m(x, x, x, need_weights=False)[0],
        "model.eval()",
    ),
    "cross_attention": (
        attention,
        lambda m, x: m(x, x[:, :5], x[:, :5], need_weights=False)[0],
        "cross-attention (20 query and 5 key tokens)",
    ),
    "causal_mask": (
        attention,
        lambda m, x: m(x, x, x, attn_mask=future(), need_weights=False)[0],
        "varies over queries",
    ),
    "causal_encoder": (encoder_layer, lambda m, x: m(x, src_mask=future()), "varies over queries"),
    "bias_of_floats": (
        attention,
        lambda m, x: m(x, x, x, attn_mask=future().float().sin(), need_weights=False)[0],
        "relative positions or ALiBi",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_stays_one_node_and_says_why(name: str) -> None:
    make, call, reason = NEAR_MISSES[name]
    module = make()
    result = rewrite(lambda x: call(module, x), tokens())
    assert result.ops == []
    assert len(result.decisions) == 1
    assert reason in result.decisions[0].reason
    targets = [str(node.target) for node in result.graphs[0].graph.nodes]
    assert any("multi_head_attention" in x or "encoder_layer_fwd" in x for x in targets)


def test_mask_changed_before_the_module_is_not_trusted() -> None:
    module = attention()

    def function(x: Tensor) -> Tensor:
        mask = torch.zeros(B, T).masked_fill(padding(), -torch.inf)
        mask[:, :3] = -0.5
        return module(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    result = rewrite(function, tokens())
    assert "relative positions or ALiBi" in result.reasons[0]


def test_gradients_keep_it_dense() -> None:
    module = attention()
    result = rewrite(lambda x: module(x, x, x, need_weights=False)[0], tokens(), grad=True)
    assert result.ops == []
    assert "gradients are needed" in result.decisions[0].reason


def test_too_short_keeps_it_dense() -> None:
    module = attention()
    result = rewrite(lambda x: module(x, x, x)[0], tokens(), policy=Policy(min_tokens=21))
    assert result.ops == []
    assert "20 tokens is too short" in result.decisions[0].reason
    assert result.error == 0.0


def _valid_rows(x: Tensor, blocked: Tensor | None) -> list[float]:
    """Padding rows are left out: the fast path fills them with something of its own."""
    return list((x if blocked is None else x[~blocked]).flatten().tolist())
