"""The picture of exact and approximate blocks: `python docs/tools/picture.py`.

It is computed, not drawn: attention over a small picture of tokens, with the blocks that the
specification routes exactly.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams

mpl.rcParams["svg.hashsalt"] = "pisa_compile"  # the same file from the same numbers
OUTPUT = Path(__file__).parent.parent / "images" / "blocks.svg"
SIDE, DIM, BLOCK = 16, 16, 16  # a picture of 16 x 16 tokens, 16 blocks of 16
SPARSITY = 0.75


def example() -> tuple[Tensor, Tensor]:
    """Query and key [1, 1, T, D] of tokens that look at their surroundings, and some far away."""
    generator = torch.Generator().manual_seed(4)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    place = torch.stack([rows, columns], -1).flatten(0, 1).float() / SIDE  # [T, 2]
    frequencies = torch.randn(2, DIM // 2, generator=generator) * 3.2
    angles = place @ frequencies
    key = torch.cat([angles.cos(), angles.sin()], -1)
    noise = torch.randn(2, SIDE * SIDE, DIM, generator=generator)
    return (2.6 * key + 0.5 * noise[0])[None, None], (2.6 * key + 0.5 * noise[1])[None, None]


def main() -> None:
    query, key = example()
    params = AttentionParams(scale=DIM**-0.5, sparsity=SPARSITY, block_size=BLOCK, order="hybrid")
    tokens = key.shape[2]
    mask = torch.ones(1, tokens, dtype=torch.bool)
    stats = reference.block_statistics(key, key, mask, BLOCK)
    exact = reference.route(query, stats, tokens, params, None)[0, 0]  # [M, N]
    weights = (params.scale * query @ key.transpose(-1, -2)).softmax(-1)[0, 0]  # [T, T]
    centroid = key[0, 0].unflatten(0, (-1, BLOCK)).mean(1)  # [N, D]
    means = (params.scale * query[0, 0] @ centroid.T).repeat_interleave(BLOCK, 1)
    chosen = exact.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    logits = params.scale * query[0, 0] @ key[0, 0].T
    pieces = torch.where(chosen, logits, means).softmax(-1)

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    limit = float(weights.quantile(0.995))
    titles = (
        "dense attention: every key\nof every query",
        "chosen by block means: exact blocks\n(blue), all others approximated",
        "what is computed: exact blocks,\none mean for each of the others",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key tokens")
        axis.set_xticks(range(0, tokens + 1, 64))
        axis.set_yticks(range(0, tokens + 1, 64))
    axes[0].set_ylabel("query tokens")
    _show(axes[0], weights, limit)
    axes[1].imshow(exact.bool(), cmap="Blues", vmin=0, vmax=1.4, extent=(0, tokens, tokens, 0))
    _grid(axes[1], tokens)
    _show(axes[2], pieces, limit)
    _grid(axes[2], tokens)
    figure.savefig(OUTPUT, metadata={"Date": None})


def _show(axis: Axes, weights: Tensor, limit: float) -> None:
    size = len(weights)
    scale = PowerNorm(0.4, 0, limit)  # small weights would all look alike
    axis.imshow(weights, cmap="magma_r", norm=scale, extent=(0, size, size, 0))


def _grid(axis: Axes, tokens: int) -> None:
    for place in range(0, tokens + 1, BLOCK):
        axis.axhline(place, color="0.75", linewidth=0.4)
        axis.axvline(place, color="0.75", linewidth=0.4)


if __name__ == "__main__":
    main()
