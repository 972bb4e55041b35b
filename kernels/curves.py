"""Space-filling curves over the grid of tokens: in which order tokens are cut into blocks.

Sixty-four tokens in raster order are a stripe of the picture. The same number in the order of such
a curve is a compact patch, whose keys are more alike and so better approximated by their mean.
Both curves take a grid of any size, without divisibility. Orders are made on the CPU, once for
each grid, and cost milliseconds.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

CURVES = ("hilbert", "tile", "raster")
_TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@functools.lru_cache(maxsize=32)
def curve(grid: tuple[int, ...], name: str) -> Tensor:
    """The cells of a grid along a curve.

    Args:
        grid: one to three sizes, (t, h, w), (h, w) or (w,).
        name: "hilbert", "tile" or "raster".

    Returns:
        int32 [prod(grid)]: place i of the curve is the cell with raster index `result[i]`. The
        tensor is shared by all callers, who must not change it.
    """
    # Whatever the caller's default device and mode, what is kept is an ordinary CPU tensor.
    with torch.device("cpu"), torch.inference_mode(False):
        if name == "raster":
            return torch.arange(math.prod(grid), dtype=torch.int32)
        return (_hilbert if name == "hilbert" else _tiles)(grid).to(torch.int32)


def _tiles(grid: tuple[int, ...]) -> Tensor:
    """Tile after tile of about 64 cells, to and fro, so that neighbours follow each other.

    An axis that the side of a tile does not divide is cut into nearly equal parts.
    """
    cells = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    turned = torch.zeros(len(cells), dtype=torch.long)
    rank = torch.zeros(len(cells), dtype=torch.long)
    for cell, size, side in zip(cells.unbind(1), grid, _TILE[len(grid)], strict=True):
        count = max(1, round(size / side))
        tile = cell * count // size
        # Every other row of tiles runs backwards.
        rank = rank * count + torch.where(turned % 2 == 1, count - 1 - tile, tile)
        turned = turned + tile
    return rank.argsort(stable=True)


def _hilbert(grid: tuple[int, ...]) -> Tensor:
    """A Hilbert curve for a box of any size.

    A box is crossed from one of its corners to the far end of its first axis. If that axis is much
    the longest, the box is cut in two across it. Else, as in Hilbert's own curve, the path goes out
    along another axis, over, and back, in three smaller boxes, or in five where all three axes are
    of a length. Halves are even where possible, because a box with even sides can be crossed
    without a diagonal step. All boxes of one depth are cut at once; it ends when each is a line.
    """
    sizes = torch.tensor([1] * (3 - len(grid)) + list(grid))
    # Start along the longest axis, which leaves the best shapes.
    axes = sizes.argsort(descending=True, stable=True)
    boxes = torch.zeros(1, 4, 3, dtype=torch.long)
    boxes[0, 1:] = torch.diag(sizes)[axes]
    lengths = _lengths(boxes)
    while bool((uncut := (lengths > 1).sum(-1) > 1).any()):
        boxes = _cut(boxes, lengths, uncut)
        lengths = _lengths(boxes)
    cells = _lines(boxes, lengths)
    return (cells[:, 0] * sizes[1] + cells[:, 1]) * sizes[2] + cells[:, 2]


# A box is a corner and three signed spans along its axes a, b and c, each in (t, h, w): [4, 3].


def _lengths(boxes: Tensor) -> Tensor:
    return boxes[:, 1:].abs().sum(-1)


def _cut(boxes: Tensor, lengths: Tensor, uncut: Tensor) -> Tensor:
    """The boxes [n, 4, 3], those marked `uncut` cut once, in the order of the path."""
    a, b, c = lengths.unbind(1)
    in_two = uncut & (2 * a > 3 * b) & (2 * a > 3 * c)
    flat = uncut & ~in_two
    over_b = flat & (3 * b > 4 * c)
    over_c = flat & (3 * c > 4 * b)
    rules = (
        (in_two, _two),
        (over_b, _over_b),
        (over_c, _over_c),
        (flat & ~over_b & ~over_c, _over_both),
    )
    parts, places = [boxes[~uncut]], [(~uncut).nonzero()[:, 0]]
    for chosen, rule in rules:
        index = chosen.nonzero()[:, 0]
        corner, *spans = boxes[index].unbind(1)
        children = torch.stack([torch.stack(child, dim=1) for child in rule(*spans)], dim=1)
        children[:, :, 0] += corner[:, None]
        parts.append(children.flatten(0, 1))
        places.append(index.repeat_interleave(children.shape[1]))
    cut = torch.cat(parts)[torch.cat(places).argsort(stable=True)]
    # A half of an axis of length 1 is empty.
    return cut[(_lengths(cut) > 0).all(-1)]


_Child = tuple[Tensor, Tensor, Tensor, Tensor]  # corner and spans


def _halved(span: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both halves of a span, the near one even where possible, and the last cell of each."""
    step, length = span.sign(), span.abs().sum(-1, keepdim=True)
    half = length // 2
    near = step * (half + ((half % 2 == 1) & (length > 2)))
    return near, span - near, near - step, span - step


def _two(a: Tensor, b: Tensor, c: Tensor) -> list[_Child]:
    near, far, _, _ = _halved(a)
    return [(0 * a, near, b, c), (near, far, b, c)]


def _over_b(a: Tensor, b: Tensor, c: Tensor) -> list[_Child]:
    near_a, far_a, _, last_a = _halved(a)
    near, far, turn, _ = _halved(b)
    return [(0 * a, near, c, near_a), (near, a, far, c), (last_a + turn, -near, c, -far_a)]


def _over_c(a: Tensor, b: Tensor, c: Tensor) -> list[_Child]:
    near_a, far_a, _, last_a = _halved(a)
    near, far, turn, _ = _halved(c)
    return [(0 * a, near, near_a, b), (near, a, b, far), (last_a + turn, -near, -far_a, b)]


def _over_both(a: Tensor, b: Tensor, c: Tensor) -> list[_Child]:
    near_a, far_a, _, last_a = _halved(a)
    near_b, far_b, turn_b, _ = _halved(b)
    near_c, far_c, _, last_c = _halved(c)
    return [
        (0 * a, near_b, near_c, near_a),
        (near_b, c, near_a, far_b),
        (turn_b + last_c, a, -near_b, -far_c),
        (last_a + near_b + last_c, -c, -far_a, far_b),
        (last_a + turn_b, -near_b, near_c, -far_a),
    ]


def _lines(boxes: Tensor, lengths: Tensor) -> Tensor:
    """The cells [cells, 3] of boxes that are one cell wide in two directions."""
    corner, spans = boxes[:, 0], boxes[:, 1:]
    count, longest = lengths.max(-1)
    step = spans[torch.arange(len(spans)), longest].sign()
    box = torch.arange(len(spans)).repeat_interleave(count)
    offset = torch.arange(len(box)) - (count.cumsum(0) - count)[box]
    return corner[box] + offset[:, None] * step[box]
