"""The grid of the tokens is found, in the graph or from the call of the model, and followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

import pisa_compile as pisa
from benchmarks.diffusers_models import CASES, Case
from pisa_compile import backend
from pisa_compile.caller import tokens_of_caller
from pisa_compile.kernels.curves import curve
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.reference import attention
from pisa_compile.ops.token_order import NO_CALLER, CallerTokens
from pisa_compile.policies.policy import Policy
from pisa_compile.report.explain import _policy_text

from ..tracing import Rewritten, check_metadata, rewrite

WIDTH, HEADS, TEXT = 16, 2, 10
POLICY = Policy(
    sparsity=0.5,
    order="hybrid",
    block_size=16,
    min_tokens=0,
    impl="reference",
    curve="hilbert",
)
OPTIONS = {"min_tokens": 0, "block_size": 16, "inner": "eager", "preset": None, "curve": "hilbert"}
WEIGHT = torch.randn(WIDTH, WIDTH, 2, 2, generator=torch.Generator().manual_seed(1)) / 4
ORDER = torch.ops.pisa.token_order.default


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def self_attention(x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, q)


def picture(*sizes: int) -> Tensor:
    return torch.randn(1, WIDTH, *sizes, generator=torch.Generator().manual_seed(0))


def conv2d(x: Tensor) -> Tensor:
    x = F.conv2d(x, WEIGHT, stride=2)
    return self_attention(x.flatten(2).transpose(1, 2))


def conv3d(x: Tensor) -> Tensor:
    x = F.conv3d(x, WEIGHT[:, :, None], stride=(1, 2, 2))
    return self_attention(x.flatten(2).transpose(1, 2))


def frame_by_frame(x: Tensor) -> Tensor:
    """As CogVideoX does: a picture of each frame is embedded, then the frames are joined."""
    batch, channels, frames, height, width = x.shape
    x = x.permute(0, 2, 1, 3, 4).reshape(-1, channels, height, width)
    x = F.conv2d(x, WEIGHT, stride=2)
    x = x.view(batch, frames, *x.shape[1:]).flatten(3).transpose(2, 3)
    return self_attention(x.flatten(1, 2))


def patches_by_reshape(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return self_attention(x.reshape(batch, height // 2 * (width // 2), -1))


def pixel_unshuffled(x: Tensor) -> Tensor:
    return self_attention(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))


def unfolded(x: Tensor) -> Tensor:
    return self_attention(F.unfold(x, 2, stride=2).transpose(1, 2))


def windows(x: Tensor) -> Tensor:
    x = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
    return self_attention(x.flatten(3).flatten(1, 2))


def residual_blocks(x: Tensor) -> Tensor:
    x = F.conv2d(x, WEIGHT, stride=2).flatten(2).mT
    for _ in range(3):
        q = F.rms_norm(heads(F.layer_norm(x, (WIDTH,)) * 1.5), (8,))
        mixed = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        x = x + torch.tanh(mixed)
    return x


STRUCTURES: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = [
    (conv2d, (12, 18), (6, 9)),
    (conv3d, (3, 12, 10), (3, 6, 5)),
    (frame_by_frame, (3, 12, 10), (3, 6, 5)),
    (patches_by_reshape, (12, 18), (6, 9)),
    (pixel_unshuffled, (12, 18), (6, 9)),
    (unfolded, (12, 18), (6, 9)),
    (windows, (12, 18), (6, 9)),
    (residual_blocks, (12, 18), (6, 9)),
]


def orders(result: Rewritten) -> list[fx.Node]:
    return [node for graph in result.graphs for node in graph.graph.nodes if node.target is ORDER]


def specified(q: Tensor, grid: tuple[int, ...], prefix: int = 0, suffix: int = 0) -> Tensor:
    """The specification on queries, keys and values `q` [B, H, T, D]."""
    order = torch.arange(q.shape[2])
    order[prefix : q.shape[2] - suffix] = prefix + curve(grid, "hilbert").long()
    params = AttentionParams(q.shape[3] ** -0.5, 0.5, 16, order="hybrid", exact=(prefix, suffix))
    return attention(q, q, q, None, params, permutation=order)[0]


@pytest.mark.parametrize(
    ("function", "sizes", "grid", "dynamic"),
    [
        pytest.param(*case, dynamic, id=f"{case[0].__name__}-{'dynamic' if dynamic else 'static'}")
        for case in STRUCTURES
        for dynamic in (False, True)
        if not dynamic or case[0] in (frame_by_frame, unfolded, residual_blocks)
    ],
)
def test_grid_of_a_patch_embedding(
    function: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...],
    grid: tuple[int, ...],
    dynamic: bool,
) -> None:
    x = picture(*sizes)
    torch._dynamo.reset()
    result = rewrite(function, x, policy=POLICY, dynamic=dynamic)
    assert [decision.policy.grid for decision in result.decisions] == [grid] * len(result.ops)
    (order,) = orders(result)  # one for all sites of the graph
    assert all(node.kwargs["permutation"] is order for node in result.ops)
    assert result.error > 1e-4
    if not dynamic:
        assert tuple(order.args[0]) == grid


def test_metadata() -> None:
    x = picture(12, 18)
    check_metadata(rewrite(patches_by_reshape, x, policy=POLICY).graphs[0], x)


def test_one_graph_for_pictures_of_any_size() -> None:
    graphs: list[fx.GraphModule] = []

    def inspect(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        from pisa_compile.passes import rewrite_attention

        rewrite_attention(gm, POLICY)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(patches_by_reshape, backend=inspect, dynamic=True, fullgraph=True)
    for height, width in ((6, 9), (9, 6), (5, 12)):
        x = picture(2 * height, 2 * width)
        tokens = x.view(1, WIDTH, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
        q = heads(tokens.reshape(1, height * width, -1))
        torch.testing.assert_close(compiled(x), specified(q, (height, width)))
    assert len(graphs) == 1


def test_text_around_the_grid() -> None:
    def joint(text: Tensor, x: Tensor) -> Tensor:
        x = torch.cat([text, x.flatten(2).transpose(1, 2)], dim=1)
        return self_attention(x)

    text, x = torch.randn(1, TEXT, WIDTH), picture(6, 9)
    result = rewrite(joint, text, x, policy=POLICY)
    (decision,) = result.decisions
    assert (decision.policy.exact, decision.policy.grid) == ((TEXT, 0), (6, 9))
    q = heads(torch.cat([text, x.flatten(2).transpose(1, 2)], dim=1))
    torch.testing.assert_close(result.output, specified(q, (6, 9), TEXT))


def packed(text: Tensor, image: Tensor) -> Tensor:
    return self_attention(torch.cat([text, image], dim=1))


def packed_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(1, TEXT, WIDTH), torch.randn(1, 54, WIDTH)


@pytest.mark.parametrize("grid", [(6, 9), [1, 6, 9]])
def test_a_given_grid(grid: Any) -> None:
    text, image = packed_inputs()
    result = rewrite(packed, text, image, policy=Policy(grid=grid).over(POLICY))
    q = heads(torch.cat([text, image], dim=1))
    torch.testing.assert_close(result.output, specified(q, (6, 9), TEXT))


def test_a_given_grid_of_all_tokens_and_of_those_within_a_given_range() -> None:
    policy = Policy(grid=(8, 8), exact=(0, 0)).over(POLICY)
    assert tuple(orders(rewrite(packed, *packed_inputs(), policy=policy))[0].args[2:5]) == (
        64,
        0,
        0,
    )
    policy = Policy(grid=(5, 8), exact=(20, 4)).over(POLICY)
    assert tuple(orders(rewrite(packed, *packed_inputs(), policy=policy))[0].args[2:5]) == (
        64,
        20,
        4,
    )


def test_a_given_grid_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        Exception, match=r"grid \(7, 9\) has 63 cells, but the attention has 64 tok"
    ):
        rewrite(packed, *packed_inputs(), policy=Policy(grid=(7, 9)).over(POLICY))


def test_raster_order_when_asked_for_or_when_nothing_is_known() -> None:
    (decision,) = rewrite(packed, *packed_inputs(), policy=POLICY).decisions
    assert decision.policy.grid is None
    assert decision.notes == ("raster order: the grid of its tokens is not known",)
    result = rewrite(conv2d, picture(12, 18), policy=Policy(curve="raster").over(POLICY))
    assert orders(result) == []
    assert result.decisions[0].notes == ()
    assert result.decisions[0].policy.grid == (6, 9)  # known all the same


@pytest.mark.parametrize(
    ("field", "error", "text"),
    [
        ({"grid": "raster"}, TypeError, "grid must be"),
        ({"grid": (4,)}, ValueError, "grid must be"),
        ({"grid": (4, 0)}, ValueError, "grid must be"),
        ({"grid": (4.0, 2)}, TypeError, "grid must be"),
        ({"curve": "peano"}, ValueError, "curve must be one of"),
        ({"exact": "text"}, ValueError, "exact must be one of"),
        ({"exact": 512}, TypeError, r"exact must be \(prefix, suffix\)"),
    ],
    ids=str,
)
def test_bad_fields(field: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Policy(**field)


class Model(nn.Module):
    """Packed or latent tokens and a block that sees nothing else."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.block = nn.Identity()
        self.seen = NO_CALLER

    def forward(self, hidden_states: Tensor | None = None, img_ids: Any = None, **_: Any) -> None:
        self.seen = tokens_of_caller()


def ids(frames: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, (frames, height, width))).float()


CALLS: list[tuple[str, dict[str, Any], dict[str, Any], CallerTokens]] = [
    ("ids", {}, {"img_ids": ids(1, 6, 9)}, CallerTokens(((6, 9),))),
    ("ids_batch", {}, {"img_ids": ids(2, 6, 9)[None]}, CallerTokens(((2, 6, 9),))),
    ("ids_shuffled", {}, {"img_ids": ids(1, 6, 9).flip(0)}, NO_CALLER),
    (
        "text_ids",
        {},
        {"img_ids": ids(1, 6, 9), "txt_ids": torch.zeros(7, 3)},
        CallerTokens(((6, 9),), 7),
    ),
    ("shapes", {}, {"img_shapes": [[(1, 6, 9)]] * 2}, CallerTokens(((6, 9),))),
    ("two_pictures", {}, {"img_shapes": [[(1, 6, 9), (1, 4, 4)]]}, NO_CALLER),
    ("sizes", {}, {"num_frames": 3, "height": 6, "width": 9}, CallerTokens(((3, 6, 9),))),
    (
        "image",
        {"patch_size": 2},
        {"hidden_states": torch.zeros(1, 4, 12, 18)},
        CallerTokens(((6, 9),)),
    ),
    ("no_patch_size", {}, {"hidden_states": torch.zeros(1, 4, 12, 18)}, NO_CALLER),
    ("packed", {"patch_size": 1}, {"hidden_states": torch.zeros(1, 54, 8)}, NO_CALLER),
]


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [case[1:] for case in CALLS],
    ids=[case[0] for case in CALLS],
)
def test_what_a_call_says(
    config: dict[str, Any], arguments: dict[str, Any], expected: CallerTokens
) -> None:
    model = Model(**config)
    model(**arguments)
    assert model.seen == expected
    assert tokens_of_caller() == NO_CALLER  # the call is over


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 16, 3, 12, 18)),
        ({"patch_size": 2, "patch_size_t": 1}, (1, 16, 3, 12, 18)),
        ({"patch_size": 2, "patch_size_t": None}, (1, 3, 16, 12, 18)),
        ({"patch_size": [1, 2, 2]}, (1, 3, 12, 18, 16)),
    ],
    ids=["Wan", "HunyuanVideo", "CogVideoX", "Kandinsky"],
)
def test_videos_in_any_order(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = Model(**config)
    model(torch.zeros(shape))
    assert (3, 6, 9) in model.seen.grids


def test_ids_are_read_once() -> None:
    model, positions = Model(), ids(1, 6, 9)
    model(img_ids=positions)
    positions.data.zero_()  # does not count as a change
    model(img_ids=positions)
    assert model.seen.grids == ((6, 9),)
    positions.copy_(ids(1, 9, 6))
    model(img_ids=positions)
    assert model.seen.grids == ((9, 6),)


# Real geometry, tiny width: 1024x1024 and 832x1248 pixels, 720p with 81 and 129 frames.


def flux(height: int, width: int) -> dict[str, Any]:
    return {
        **CASES["FluxTransformer2DModel"].inputs(),
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, 512, 24),
        "img_ids": ids(1, height, width),
        "txt_ids": torch.zeros(512, 3),
    }


def hunyuan_video() -> dict[str, Any]:
    return {
        **CASES["HunyuanVideoTransformer3DModel"].inputs(),
        "hidden_states": torch.randn(1, 4, 33, 90, 160),
        "encoder_hidden_states": torch.randn(1, 256, 24),
        "encoder_attention_mask": (torch.arange(256) < 100)[None].long(),
    }


def wan() -> dict[str, Any]:
    latents = torch.randn(1, 4, 21, 90, 160)
    return {**CASES["WanTransformer3DModel"].inputs(), "hidden_states": latents}


REAL = {
    "FLUX square": ("FluxTransformer2DModel", lambda: flux(64, 64), (512, 0), (64, 64)),
    "FLUX tall": ("FluxTransformer2DModel", lambda: flux(78, 52), (512, 0), (78, 52)),
    "Wan": ("WanTransformer3DModel", wan, (0, 0), (21, 45, 80)),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", hunyuan_video, (0, 256), (33, 45, 80)),
}


def outputs_only(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
    """In the place of the compiler: outputs of the right shape, nothing is computed."""
    (output,) = gm.graph.find_nodes(op="output")
    fakes = [x.meta["example_value"] if isinstance(x, fx.Node) else x for x in output.args[0]]
    return lambda *_: tuple(
        torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in fakes
    )


def large(name: str) -> nn.Module:
    case = CASES[name]
    more = {"rope_max_seq_len": 1024} if name.startswith("Wan") else {}
    return replace(case, config=lambda: case.config() | more).build()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (kind, how)
        for kind in REAL
        for how in ("whole", "blocks")
        if (kind, how) != ("FLUX tall", "whole")
    ],
)
def test_found_with_nothing_but_the_backend(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    name, make_inputs, exact, grid = REAL[kind]
    monkeypatch.setattr(backend, "compile_inner", outputs_only)
    torch._dynamo.reset()
    model, inputs = large(name), make_inputs()
    if how == "whole":
        model.compile(backend="pisa")
    else:
        model.compile_repeated_blocks(backend="pisa", fullgraph=True)
    report = pisa.explain(model, **inputs)
    tokens = torch.Size(grid).numel() + sum(exact)
    joint = [site for site in report.sites if site.query_shape[2] == site.key_shape[2] == tokens]
    assert len(joint) >= 2 if how == "whole" else joint
    for site in joint:
        if site.replaced:
            assert (site.policy.exact, site.policy.grid) == (exact, grid)
            assert f"{'x'.join(map(str, grid))} raster" in _policy_text(site.policy)
    assert any(site.replaced for site in joint)


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("kind", ["FLUX square", "Wan", "HunyuanVideo"])
def test_equal_to_dense_at_sparsity_zero(kind: str, how: str) -> None:
    pytest.importorskip("diffusers")
    case: Case = CASES[REAL[kind][0]]
    options = {**OPTIONS, "sparsity": 0.0}
    torch._dynamo.reset()
    model = case.build()
    with torch.no_grad():
        (dense,) = model(**case.inputs())
        if how == "whole":
            model.compile(backend="pisa", options=options)
        else:
            model.compile_repeated_blocks(backend="pisa", fullgraph=True, options=options)
        (out,) = model(**case.inputs())
    assert dense.abs().max() > 1
    torch.testing.assert_close(out, dense, atol=1e-4, rtol=0)


def test_a_block_that_is_compiled_alone_follows_the_picture() -> None:
    """The same number of tokens on another grid, through the same compiled code."""
    pytest.importorskip("diffusers")
    case = CASES["FluxTransformer2DModel"]
    torch._dynamo.reset()
    options = {**OPTIONS, "sparsity": 0.8}
    blocks, alone = case.build(), case.build()
    blocks.compile_repeated_blocks(backend="pisa", fullgraph=True, options=options)
    with torch.no_grad():
        wide = {**case.inputs(), "img_ids": ids(1, 8, 32)}
        tall = {**case.inputs(), "img_ids": ids(1, 32, 8)}
        blocks(**wide)
        with torch.compiler.set_stance("fail_on_recompile"):
            (out,) = blocks(**tall)
        for grid, equal in (((32, 8), True), ((8, 32), False)):
            torch._dynamo.reset()
            given = torch.compile(alone, backend="pisa", options={**options, "grid": grid})
            (expected,) = given(**tall)
            assert torch.allclose(out, expected, atol=1e-4) == equal
