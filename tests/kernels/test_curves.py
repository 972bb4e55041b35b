"""Curves visit every cell once, in steps between neighbours, and make compact blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pisa_compile.kernels.curves import CURVES, curve
from pisa_compile.ops.token_order import CallerTokens, called_with

BLOCK = 64
CPU = torch.device("cpu")
# FLUX at two aspect ratios, Wan at 480p and 720p, and sizes without a common divisor.
GRIDS = [(64, 64), (52, 78), (21, 30, 52), (21, 45, 80), (37, 41), (13, 17, 29)]


def cells(grid: tuple[int, ...], kind: str) -> Tensor:
    return torch.stack(torch.unravel_index(curve(grid, kind).long(), grid), dim=1)


def mean_distance(grid: tuple[int, ...], kind: str, offset: int = 0) -> float:
    """Between two tokens of a block; text before the grid shifts where blocks begin."""
    places = cells(grid, kind)[offset:].double()
    blocks = places[: len(places) // BLOCK * BLOCK].view(-1, BLOCK, len(grid))
    return torch.cdist(blocks, blocks).mean().item()


@settings(max_examples=60, deadline=None)
@given(
    grid=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(CURVES),
)
def test_every_cell_is_visited_once(grid: tuple[int, ...], kind: str) -> None:
    order = curve(grid, kind)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(math.prod(grid)))


def test_small_hilbert_curves() -> None:
    assert curve((2, 2), "hilbert").tolist() in ([0, 1, 3, 2], [0, 2, 3, 1])
    assert curve((1, 5), "hilbert").tolist() == [0, 1, 2, 3, 4]
    assert curve((4, 1, 1), "hilbert").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("grid", [(8, 8), (64, 64), (52, 78), (16, 24), (4, 4, 4), (8, 16, 12)])
def test_the_hilbert_curve_steps_between_neighbours(grid: tuple[int, ...]) -> None:
    places = cells(grid, "hilbert")
    steps = (places[1:] - places[:-1]).abs().sum(dim=1)
    assert steps.max() == 1


@pytest.mark.parametrize("grid", [(13, 17, 29), (21, 45, 80)])
def test_odd_boxes_cost_few_diagonal_steps(grid: tuple[int, ...]) -> None:
    places = cells(grid, "hilbert")
    steps = (places[1:] - places[:-1]).abs()
    assert steps.amax(dim=1).max() <= 2
    assert (steps.sum(dim=1) > 1).double().mean() < 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("offset", [0, 13])
def test_blocks_are_compact(grid: tuple[int, ...], offset: int) -> None:
    # What a square of 64 cells, or a cube, has.
    side = round(BLOCK ** (1 / len(grid)))
    ideal = mean_distance((side,) * len(grid), "raster")
    hilbert, tile, raster = (
        mean_distance(grid, kind, offset) for kind in ("hilbert", "tile", "raster")
    )
    assert hilbert < 1.25 * ideal
    assert tile < 1.45 * ideal
    assert raster > 2.4 * ideal


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_that_divide_the_grid_are_blocks(grid: tuple[int, ...]) -> None:
    whole = (32, 64) if len(grid) == 2 else (8, 16, 24)
    blocks = cells(whole, "tile").view(-1, BLOCK, len(whole))
    extent = blocks.amax(dim=1) - blocks.amin(dim=1) + 1
    assert (extent == (8 if len(whole) == 2 else 4)).all()


def test_what_is_kept_does_not_depend_on_who_asked_first() -> None:
    curve.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        order = curve((5, 7), "hilbert")
    assert order.device.type == "cpu"
    assert not order.is_inference()


def token_order(grid: list[int], kind: str, *lengths: int, live: bool = False) -> Tensor:
    out: Tensor = torch.ops.pisa.token_order(grid, kind, *lengths, CPU, live)
    return out


def test_tokens_around_the_grid_keep_their_places() -> None:
    order = token_order([6, 7], "hilbert", 50, 5, 3)
    assert order[:5].tolist() == [0, 1, 2, 3, 4]
    assert order[-3:].tolist() == [47, 48, 49]
    assert torch.equal(order[5:-3] - 5, curve((6, 7), "hilbert"))


def test_every_call_gives_a_tensor_of_its_own() -> None:
    first = token_order([6, 7], "tile", 42, 0, 0)
    first.zero_()
    assert torch.equal(token_order([6, 7], "tile", 42, 0, 0), curve((6, 7), "tile"))


def test_a_grid_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"6x7 has 42, but of 50 tokens 5 stand before and 4"):
        token_order([6, 7], "hilbert", 50, 5, 4)


def test_a_live_order_follows_the_caller() -> None:
    wide, tall = curve((4, 10), "hilbert"), curve((10, 4), "hilbert")
    raster = torch.arange(40, dtype=torch.int32)

    def live() -> Tensor:
        return token_order([4, 10], "hilbert", 40, 0, 0, live=True)

    assert torch.equal(live(), wide)
    with called_with(CallerTokens(((7, 8), (10, 4)))):
        assert torch.equal(live(), tall)
        assert torch.equal(token_order([4, 10], "hilbert", 40, 0, 0), wide)
    with called_with(CallerTokens(((7, 8),))):
        assert torch.equal(live(), raster)
    assert torch.equal(live(), wide)
    assert torch.equal(token_order([4, 11], "hilbert", 40, 0, 0, live=True), raster)


def test_the_op_is_registered_soundly() -> None:
    arguments = ([3, 5], "hilbert", 18, 2, 1, CPU)
    torch.library.opcheck(torch.ops.pisa.token_order.default, arguments)


def test_symbolic_sizes_need_one_compilation() -> None:
    def permuted(x: Tensor) -> Tensor:
        height, width = x.shape
        order = torch.ops.pisa.token_order(
            [height, width], "hilbert", height * width, 0, 0, x.device
        )
        return x.flatten()[order] * 2

    compiled = torch.compile(permuted, dynamic=True, fullgraph=True, backend="aot_eager")
    for shape in ((6, 7), (5, 9), (12, 3)):
        x = torch.randn(shape)
        with torch.compiler.set_stance("default" if shape == (6, 7) else "fail_on_recompile"):
            assert torch.equal(compiled(x), x.flatten()[curve(shape, "hilbert").long()] * 2)
