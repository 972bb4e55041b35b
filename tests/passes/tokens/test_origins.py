"""Text that is joined with the image is found, through whatever stands between, and stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.reference import attention
from pisa_compile.policies.policy import Policy

from ..tracing import Rewritten, check_metadata, rewrite

WIDTH, HEADS, TEXT, IMAGE = 16, 2, 10, 40
RASTER = Policy(sparsity=0.5, order="hybrid", block_size=16, min_tokens=0, impl="reference")


def inputs(text: int = TEXT, image: int = IMAGE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, text, WIDTH, generator=generator),
        torch.randn(2, image, WIDTH, generator=generator),
    )


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def self_attention(x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, q)


def text_first(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([text, image], dim=1))


def text_last(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([image, text], dim=1))


def text_on_both_sides(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([text[:, :3], image, text], dim=-2))


def nested(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([torch.cat([text, image], 1) * 2, text[:, :4]], 1))


def class_token(text: Tensor, image: Tensor) -> Tensor:
    token = text[:1, :1].expand(image.shape[0], -1, -1)
    return self_attention(torch.cat((token, image), dim=1))


def joined_by_heads(text: Tensor, image: Tensor) -> Tensor:
    """As FLUX and SD3 do: each stream has its own projections and norms."""
    q, k, v = (
        torch.cat([F.rms_norm(heads(text * i), (8,)), F.rms_norm(heads(image), (8,))], dim=2)
        for i in (1, 2, 3)
    )
    return F.scaled_dot_product_attention(q, k, v)


def rotated_pairs(x: Tensor) -> Tensor:
    """A rotary embedding in the manner of FLUX."""
    cos, sin = torch.linspace(0, 1, x.shape[2])[:, None].cos(), torch.tensor(0.5)
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rotated_complex(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.linspace(0, 1, x.shape[2])[:, None] * torch.ones(x.shape[-1] // 2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


def rotated_in_place(x: Tensor) -> Tensor:
    """As Wan does."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * 0.5 - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2] * 0.5
    return out


def rotated_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * 0.5 + torch.cat([-second, first], dim=-1)


ROTATIONS = (rotated_pairs, rotated_complex, rotated_in_place, rotated_halves)


def rotary(rotate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(text: Tensor, image: Tensor) -> Tensor:
        q = rotate(heads(F.layer_norm(torch.cat([text, image], dim=1), (WIDTH,))))
        return F.scaled_dot_product_attention(q, q, q)

    function.__name__ = rotate.__name__
    return function


def fused_projection(text: Tensor, image: Tensor) -> Tensor:
    x = torch.cat([text, image], dim=1)
    q, k, v = F.linear(x, torch.ones(3 * WIDTH, WIDTH)).view(*x.shape[:2], 3, HEADS, -1).unbind(2)
    q, k, v = (y.permute(0, 2, 1, 3) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def second_block(text: Tensor, image: Tensor) -> Tensor:
    """The streams part after a joint block, and are joined again for the next one."""
    x = torch.cat([image, text], dim=1)
    x = x + self_attention(x).transpose(1, 2).flatten(2)
    image, text = x[:, : -text.shape[1]], x[:, -text.shape[1] :]
    x = torch.cat([F.gelu(image), text], dim=1)
    return self_attention(x)


def split_after(text: Tensor, image: Tensor) -> Tensor:
    x = torch.cat([text, image], dim=1).float()
    text, image = x.split([text.shape[1], image.shape[1]], dim=1)
    return self_attention(torch.cat([text, image], dim=1))


def by_hand(text: Tensor, image: Tensor) -> Tensor:
    x = torch.cat([text, image], dim=1)
    q = x.view(*x.shape[:2], HEADS, -1)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, q).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, q)


JOINT: list[tuple[Callable[..., Tensor], tuple[int, int]]] = [
    (text_first, (TEXT, 0)),
    (text_last, (0, TEXT)),
    (text_on_both_sides, (3, TEXT)),
    (nested, (TEXT, 4)),
    (class_token, (1, 0)),
    (joined_by_heads, (TEXT, 0)),
    *((rotary(rotate), (TEXT, 0)) for rotate in ROTATIONS),
    (fused_projection, (TEXT, 0)),
    (second_block, (0, TEXT)),
    (split_after, (TEXT, 0)),
    (by_hand, (TEXT, 0)),
]  # fmt: skip


def exact(node: fx.Node) -> tuple[Any, Any]:
    return node.kwargs.get("exact_prefix", 0), node.kwargs.get("exact_suffix", 0)


@pytest.mark.parametrize(("function", "expected"), JOINT, ids=lambda x: getattr(x, "__name__", ""))
def test_joined_text_is_exact(function: Callable[..., Tensor], expected: tuple[int, int]) -> None:
    result = rewrite(function, *inputs(), policy=RASTER)
    assert result.reasons == []
    assert [exact(node) for node in result.ops] == [expected] * len(result.ops)
    assert {decision.policy.exact for decision in result.decisions} == {expected}


def through_a_module(attend: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def function(text: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([text, image], dim=1)
        out: Tensor = attend(x, x, x, need_weights=False)[0]
        return out

    return function


def checkpointed(text: Tensor, image: Tensor) -> Tensor:
    x = torch.cat([image, text], dim=1)
    out: Tensor = checkpoint(self_attention, x, use_reentrant=False)
    return out


@pytest.mark.parametrize("inside", ["module", "checkpoint"])
def test_a_graph_inside_sees_what_the_graph_around_it_joined(inside: str) -> None:
    attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(False)
    function = through_a_module(attend) if inside == "module" else checkpointed
    result = rewrite(function, *inputs(), policy=RASTER)
    assert result.reasons == []
    assert exact(result.ops[0]) == ((TEXT, 0) if inside == "module" else (0, TEXT))


def test_rows_of_the_text_are_dense() -> None:
    result = rewrite(text_first, *inputs(), policy=RASTER)
    difference = (result.output - result.expected).abs().amax(dim=(0, 1, 3))
    assert difference[:TEXT].max() < 1e-5
    assert difference[16:].max() > 1e-3  # the block that text and picture share is dense


@pytest.mark.parametrize(
    "function", [text_first, text_last, second_block], ids=lambda f: f.__name__
)
def test_symbolic_lengths(function: Callable[..., Tensor]) -> None:
    """One graph for texts and images of any length, equal to the specification at each."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        from pisa_compile.passes import rewrite_attention

        rewrite_attention(gm, RASTER)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for text, image in ((10, 40), (7, 90), (23, 70)):
            first, second = inputs(text, image)
            out = compiled(first, second)
            if function is second_block:
                continue
            prefixed = function is text_first
            x = heads(torch.cat([first, second] if prefixed else [second, first], dim=1))
            params = AttentionParams(8**-0.5, 0.5, 16, exact=(text, 0) if prefixed else (0, text))
            torch.testing.assert_close(out, attention(x, x, x, None, params)[0])
    assert len(graphs) == 1


def test_a_length_known_only_at_run_time_stays_exact() -> None:
    def function(text: Tensor, image: Tensor) -> Tensor:
        kept = text[:, (text[0, :, 0] > 0).nonzero()[:, 0]]
        return self_attention(torch.cat([image, kept], dim=1))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = rewrite(function, *inputs(), policy=RASTER)
    (op,), (decision,) = result.ops, result.decisions
    assert isinstance(op.kwargs["exact_suffix"], fx.Node)
    assert any("only known when it runs" in note for note in decision.notes)
    text, image = inputs()
    kept = text[:, text[0, :, 0] > 0]
    x = heads(torch.cat([image, kept], dim=1))
    params = AttentionParams(8**-0.5, 0.5, 16, exact=(0, kept.shape[1]))
    torch.testing.assert_close(result.output, attention(x, x, x, None, params)[0])


def test_an_exported_graph() -> None:
    class Joint(nn.Module):
        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            return text_first(text, image)

    import pisa_compile as pisa

    text, image = inputs()
    sizes = {
        "text": {1: torch.export.Dim("t", max=64)},
        "image": {1: torch.export.Dim("i", max=4096)},
    }
    program = torch.export.export(Joint(), (text, image), dynamic_shapes=sizes)
    rewritten = pisa.rewrite(program, RASTER).module()
    for lengths in ((10, 40), (7, 90)):
        text, image = inputs(*lengths)
        x = heads(torch.cat([text, image], dim=1))
        params = AttentionParams(8**-0.5, 0.5, 16, exact=(lengths[0], 0))
        torch.testing.assert_close(rewritten(text, image), attention(x, x, x, None, params)[0])


def no_text(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(image)


def a_sibling_stream(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([image[:, :30], image], dim=1))


def moved_tokens(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([text, image], dim=1).roll(5, dims=1))


def joined_features(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([image, image], dim=-1))


def shuffled(text: Tensor, image: Tensor) -> Tensor:
    x = torch.cat([text, image], dim=1)
    return self_attention(x[:, torch.arange(x.shape[1]).flip(0)])


@pytest.mark.parametrize(
    "function",
    [no_text, a_sibling_stream, moved_tokens, joined_features, shuffled],
    ids=lambda f: f.__name__,
)
def test_nothing_is_exact_without_text(function: Callable[..., Tensor]) -> None:
    result = rewrite(function, *inputs(), policy=RASTER)
    (op,), (decision,) = result.ops, result.decisions
    assert exact(op) == (0, 0)
    assert decision.policy.exact == (0, 0)
    alike = any("joins 30 + 40 tokens" in note for note in decision.notes)
    assert alike == (function is a_sibling_stream)


def test_the_walk_does_not_cross_an_exchange_between_devices() -> None:
    """After the all-to-all of Ulysses the order is text, image, text, image."""

    def exchanged(text: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([text, image], dim=1)
        return self_attention(torch.ops.pisa_test.exchange(x))

    with torch.library._scoped_library("pisa_test", "DEF") as library:
        library.define("exchange(Tensor x) -> Tensor")
        library.impl("exchange", torch.clone, "CompositeExplicitAutograd")
        result = rewrite(exchanged, *inputs(), policy=RASTER)
    (op,) = result.ops
    assert exact(op) == (0, 0)


@pytest.mark.parametrize("given", [(3, 5), (0, 0)])
def test_a_given_range_goes_before_what_is_found(given: tuple[int, int]) -> None:
    policy = Policy(exact=given).over(RASTER)
    result = rewrite(text_first, *inputs(), policy=policy)
    (op,) = result.ops
    assert exact(op) == given


def test_metadata_of_a_graph_with_symbolic_text() -> None:
    result: Rewritten = rewrite(text_first, *inputs(), policy=RASTER, dynamic=True)
    (op,) = result.ops
    (size,) = (node for node in op.all_input_nodes if node.target == "size")
    assert size.meta["example_value"].node.hint == TEXT
    assert len(result.graphs) == 1
    static = rewrite(text_first, *inputs(), policy=RASTER, dynamic=False)
    check_metadata(static.graphs[0], *inputs())
