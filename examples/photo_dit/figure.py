"""The two drawings: a comparison of dense and sparse pictures, and the loss of a training run."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from .sampling import to_uint8

GAIN = 8
"""Factor on the difference, which would hardly be seen otherwise."""


def save_comparison(
    dense: list[Tensor], sparse: list[Tensor], numbers: dict[str, Any], path: Path
) -> None:
    """Draw pictures `[3, S, S]` in [-1, 1]; `numbers` is the record of the run."""
    seconds = numbers["seconds_per_step"]
    rows = (
        (f"dense\n{seconds['dense']['median']:.2f} s per step", dense),
        (
            f"pisa, {numbers['sparsity']:.0%} sparse\n{seconds['pisa']['median']:.2f} s per step "
            f"({numbers['speedup']:.2f}x)",
            sparse,
        ),
        (
            f"difference x {GAIN}",
            [
                (a.clamp(-1, 1) - b.clamp(-1, 1)).abs() * GAIN - 1
                for a, b in zip(dense, sparse, strict=True)
            ],
        ),
    )
    columns = numbers["pictures"]
    figure, grid = plt.subplots(
        len(rows),
        len(columns),
        figsize=(2.7 * len(columns) + 0.5, 8.4),
        squeeze=False,
        layout="constrained",
    )
    for axes_row, (title, pictures) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(title, fontsize=12)
        for axes, picture in zip(axes_row, pictures, strict=True):
            _show(axes, picture)
    for top, bottom, column in zip(grid[0], grid[-1], columns, strict=True):
        top.set_title(column["label"], fontsize=13)
        bottom.set_xlabel(f"PSNR {column['psnr_db']:.1f} dB", fontsize=11)
    figure.suptitle(
        f"{numbers['tokens']:,} tokens, {numbers['steps']} steps, same noise", fontsize=12
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_loss(losses: list[tuple[int, float]], stages: list[tuple[str, int]], path: Path) -> None:
    """Draw (step, loss) over a shade per kind of stage; `stages` is (name, steps) in order."""
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    axes.plot(*zip(*losses, strict=True), lw=1, color="0.15")
    shades: dict[str, str] = {}
    first = 0
    for name, steps in stages:
        label = None if name in shades else name
        shade = shades.setdefault(name, f"C{len(shades)}")
        axes.axvspan(first, first + steps, color=shade, alpha=0.25, lw=0, label=label)
        first += steps
    axes.set(xlabel="step", ylabel="mean square velocity error", yscale="log", xlim=(0, first))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axes: Axes, picture: Tensor) -> None:
    axes.imshow(to_uint8(picture).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
