"""The drawings of docs/fidelity.md, from the record alone (pictures come from the cache)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.photo_dit.sampling import to_uint8

from . import metrics, pictures, timing
from .methods import BY_NAME, FINE, OURS, PAPER

GAIN = 6
"""Factor on the difference of two pictures, which would hardly be seen otherwise."""
SHOWN = (2, 3, 4, 6)  # seeds of the side-by-side pictures
_COLOURS = {
    OURS: "#c2185b",
    FINE: "#f06292",
    PAPER: "#1565c0",
    "zeroth": "#64b5f6",
    "covariance": "#0d3c75",
    "blockwise": "#90a4ae",
    "pasa": "#00897b",
    "sol": "#7cb342",
    "topk": "#424242",
    "topp": "#9e9e9e",
    "spargeattn": "#ef6c00",
    "xattention": "#f9a825",
    "psa": "#6a1b9a",
    "rectified": "#8d6e63",
}


def draw(record: dict[str, Any], cache: Path, folder: Path) -> None:
    """Every drawing whose data the record holds, as PNG files `fidelity-*.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, tuple[str, ...], Callable[[], Figure]]] = [
        ("density", ("operator",), lambda: _density(record)),
        ("time", ("operator", "timing"), lambda: _time(record)),
        ("speedup", ("pictures", "timing"), lambda: _speedup(record)),
        ("heads", ("operator",), lambda: _heads(record)),
        ("pictures", ("pictures",), lambda: _side_by_side(record, cache)),
    ]
    for name, parts, make in drawings:
        if all(part in record for part in parts):
            figure = make()
            figure.savefig(folder / f"fidelity-{name}.png", dpi=72 if name == "pictures" else 110)
            plt.close(figure)


def mean_errors(record: dict[str, Any], group: str, order: str) -> dict[str, dict[float, float]]:
    """Geometric mean error of each method at each density."""
    found: dict[str, dict[float, float]] = {}
    for row in record["operator"]["rows"]:
        if row["group"] == group and row["order"] == order:
            errors = found.setdefault(row["method"], {})
            errors[row["density"]] = metrics.geometric_mean(row["error"])
    return found


def _style(name: str) -> dict[str, Any]:
    return {
        "label": BY_NAME[name].label,
        "color": _COLOURS[name],
        "linewidth": 2.6 if name in (OURS, FINE, PAPER) else 1.4,
        "marker": "o",
        "markersize": 6 if name in (OURS, FINE, PAPER) else 4,
        "zorder": 3 if name in (OURS, FINE, PAPER) else 2,
    }


def _log_axis(axes: Axes, which: str, ticks: list[float], text: str) -> None:
    """A logarithmic axis with the ticks that are data, and no others."""
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
    axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter(text))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


_ERROR_TICKS = [0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8]


def _density(record: dict[str, Any]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(12.5, 5.4), layout="constrained", sharex=True)
    for axes, group in zip(panels, ("captured", "structured"), strict=True):
        found = mean_errors(record, group, "hilbert")
        for name, errors in sorted(found.items(), key=lambda item: list(BY_NAME).index(item[0])):
            if len(errors) > 2:
                densities = sorted(errors)
                axes.plot(densities, [errors[d] for d in densities], **_style(name))
        _log_axis(axes, "x", [0.05, 0.1, 0.15, 0.3, 0.5], "%g")
        _log_axis(axes, "y", _ERROR_TICKS, "%g")
        heads = len(next(r for r in record["operator"]["rows"] if r["group"] == group)["error"])
        title = {"captured": "photo DiT", "structured": "structured random fields"}[group]
        axes.set_title(f"{title}, {heads} heads")
        axes.set_xlabel("density: share of exact blocks")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative L2 error, geometric mean over heads")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _time(record: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    errors = mean_errors(record, "captured", "hilbert")
    calls = record["timing"]["calls"]
    dense = next(row["median"] for row in calls if row["method"] == "dense")
    for name in sorted({row["method"] for row in calls} - {"dense"}, key=list(BY_NAME).index):
        points = [
            (1e3 * row["median"], errors[name][row["density"]], row["density"])
            for row in calls
            if row["method"] == name and row["density"] in errors[name]
        ]
        axes.plot([p[0] for p in points], [p[1] for p in points], **_style(name))
        if name == FINE:
            for milliseconds, error, density in points:
                axes.annotate(
                    f"{density:g}",
                    (milliseconds, error),
                    xytext=(-4, -14),
                    textcoords="offset points",
                    fontsize=9,
                    ha="right",
                    color=_COLOURS[FINE],
                )
    axes.axvline(1e3 * dense, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(
        "dense",
        (1e3 * dense, 0.98),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        xytext=(-5, 0),
        textcoords="offset points",
    )
    _log_axis(axes, "y", _ERROR_TICKS, "%g")
    axes.set_xlim(left=0)
    axes.set_xlabel("CPU milliseconds per call (8 heads, 4,096 tokens, one thread)")
    axes.set_ylabel("relative L2 error, geometric mean over heads")
    axes.set_title("Error against time; the numbers are densities")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _speedup(record: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    speedups = timing.speedups(record["timing"]["steps"])
    psnr = {(r["method"], r["density"]): r["psnr_db"] for r in record["pictures"]["rows"]}
    for name in BY_NAME:
        keys = sorted((k for k in speedups if k[0] == name and k in psnr), key=lambda key: key[1])
        if not keys:
            continue
        points = [(speedups[key], *_paired(psnr, key), key[1]) for key in keys]
        x, y, half, _ = zip(*points, strict=True)
        bars = None if name == OURS else half
        axes.errorbar(x, y, yerr=bars, capsize=3, elinewidth=1, **_style(name))
        if name == FINE:
            for speedup, level, _, density in points:
                axes.annotate(
                    f"{density:g}",
                    (speedup, level),
                    xytext=(7, 6),
                    textcoords="offset points",
                    fontsize=9,
                    color=_COLOURS[FINE],
                )
    axes.margins(0.08)
    axes.set_xlabel("speed-up of a whole step over dense attention, eager mode, one CPU thread")
    axes.set_ylabel(
        "PSNR against dense, dB\n(bars: 95 % interval of the paired difference to corrected)"
    )
    axes.set_title("Pictures against speed; the numbers are densities")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _paired(
    psnr: dict[tuple[str, float], list[float]], key: tuple[str, float]
) -> tuple[float, float]:
    """Mean PSNR, and the interval of its difference to ours on the same noise.

    How much PSNR varies from picture to picture says nothing about the methods.
    """
    mean, _ = metrics.mean_interval(psnr[key])
    ours = psnr[OURS, key[1]]
    return mean, metrics.mean_interval([a - b for a, b in zip(psnr[key], ours, strict=True)])[1]


def _heads(record: dict[str, Any]) -> Figure:
    """Error by layer and head, the paper's method and ours, and their ratio."""
    rows = {
        row["method"]: row
        for row in record["operator"]["rows"]
        if (row["group"], row["order"], row["density"]) == ("captured", "hilbert", 0.15)
    }
    grids = [_by_head(rows[name]) for name in (PAPER, OURS)]
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained")
    limit = float(grids[0].max())
    panel_data = [
        (BY_NAME[PAPER].label, grids[0], "magma_r", 0.0, limit, "{:.3f}"),
        (BY_NAME[OURS].label, grids[1], "magma_r", 0.0, limit, "{:.3f}"),
        ("ratio, ours / paper", grids[1] / grids[0], "RdBu_r", 0.4, 1.6, "{:.2f}"),
    ]
    for axes, (title, grid, colours, low, high, text) in zip(panels, panel_data, strict=True):
        image = axes.imshow(grid.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto")
        for layer, head in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
            value = float(grid[layer, head])
            middle = (value - low) / (high - low)
            dark = middle > 0.42 if colours == "magma_r" else abs(middle - 0.5) > 0.35
            axes.text(
                head,
                layer,
                text.format(value),
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=10,
            )
        axes.set_title(title)
        axes.set_xlabel("head")
        axes.set_xticks(range(grid.shape[1]))
        axes.set_yticks(range(grid.shape[0]))
        figure.colorbar(image, ax=axes, shrink=0.85)
    panels[0].set_ylabel("layer")
    figure.suptitle("Relative L2 error at density 0.15, geometric mean over trajectories and steps")
    return figure


def _by_head(row: dict[str, Any]) -> torch.Tensor:
    found: dict[tuple[int, int], list[float]] = {}
    for place, error in zip(row["head"], row["error"], strict=True):
        layer, head = map(int, re.findall(r"(?:layer|head) (\d+)", place))
        found.setdefault((layer, head), []).append(error)
    shape = [1 + max(key[axis] for key in found) for axis in (0, 1)]
    grid = torch.zeros(*shape)
    for key, errors in found.items():
        grid[key] = metrics.geometric_mean(errors)
    return grid


def _side_by_side(record: dict[str, Any], cache: Path) -> Figure:
    made = record["pictures"]
    names = ["dense", OURS, PAPER, "sol", "topk"]
    seeds = [seed for seed in SHOWN if seed in made["seeds"]]
    psnr = {r["method"]: r["psnr_db"] for r in made["rows"] if r["density"] in (pictures.DENSITY,)}
    figure, grid = plt.subplots(
        len(seeds),
        2 * len(names) - 1,
        figsize=(16.5, 1.98 * len(seeds) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for row, seed in zip(grid, seeds, strict=True):
        shown = {
            name: pictures.picture(
                name, 1.0 if name == "dense" else pictures.DENSITY, seed, made["steps"], cache
            )
            for name in names
        }
        dense = shown["dense"].clamp(-1, 1)
        index = made["seeds"].index(seed)
        row[0].imshow(to_uint8(dense).permute(1, 2, 0).numpy())
        row[0].set_ylabel(made["labels"][index], fontsize=11)
        for place, name in enumerate(names[1:]):
            picture, difference = row[2 * place + 1 : 2 * place + 3]
            error = (shown[name].clamp(-1, 1) - dense).abs() * GAIN - 1
            picture.imshow(to_uint8(shown[name]).permute(1, 2, 0).numpy())
            difference.imshow(to_uint8(error).permute(1, 2, 0).numpy())
            picture.set_xlabel(f"{psnr[name][index]:.1f} dB", fontsize=10)
    grid[0, 0].set_title("dense", fontsize=11)
    for place, name in enumerate(names[1:]):
        grid[0, 2 * place + 1].set_title(BY_NAME[name].label, fontsize=11)
        grid[0, 2 * place + 2].set_title(f"difference x {GAIN}", fontsize=10)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    title = f"85 % sparse in every layer and each of {made['steps']} steps, same noise"
    figure.suptitle(title, fontsize=12)
    return figure
