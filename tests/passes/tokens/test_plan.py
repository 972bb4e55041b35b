"""The grid of the tokens is found in the graph, and followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from pisa_compile.kernels.curves import curve
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.reference import attention
from pisa_compile.policies.policy import Policy

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
