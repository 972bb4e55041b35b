"""Blocks along a curve against blocks of raster order: compactness, error, pictures and cost.

    python benchmarks/token_order.py --output benchmarks/results/token_order.json
    python benchmarks/token_order.py --only cost ...       one part, the others stay in the record

Compactness is the mean distance between two tokens of one block. Errors are those of the op on the
queries, keys and values of the demo's diffusion transformer, PSNR is that of its pictures against
dense attention's on the same noise. Costs are CPU seconds of one thread, medians of interleaved
runs, which other load on the machine changes little.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode

import pisa_compile as pisa
from benchmarks import records
from examples.photo_dit.data import NAMES
from examples.photo_dit.demo import psnr
from examples.photo_dit.sampling import euler_step, noise, time_grid
from examples.photo_dit.weights import load_model
from pisa_compile.kernels.curves import CURVES, curve
from pisa_compile.kernels.testing import relative_l2

GRIDS = {
    "FLUX, 1024x1024": (64, 64),
    "FLUX, 832x1248": (78, 52),
    "Wan, 480p": (21, 30, 52),
    "Wan, 720p": (21, 45, 80),
    "HunyuanVideo, 720p": (33, 45, 80),
}
LABELS = ("cat", "coffee", "flower", "pagoda")
ORDERS = ("hybrid", "corrected")
SPARSITY = 0.85
BLOCK = 64
SEED = 0
COST_GRIDS = ((64, 64), (96, 128))
COST_SHAPES = ((8, 64), (8, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=tuple(PARTS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--labels", choices=NAMES, nargs="+", default=LABELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    record = records.read(arguments.output) if arguments.output.exists() else {}
    record["environment"] = records.environment(
        "python benchmarks/token_order.py", sparsity=SPARSITY, block_size=BLOCK
    )
    with Progress() as progress, torch.no_grad():
        for part in arguments.only:
            record[part] = PARTS[part](arguments, progress)
            records.write(arguments.output, record)


def compactness(arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    rows = []
    for name, grid in GRIDS.items():
        distance = {kind: _distance(grid, kind) for kind in CURVES}
        rows.append({"model": name, "grid": grid, "mean_distance": distance})
    return rows


def _distance(grid: tuple[int, ...], kind: str) -> float:
    places = torch.stack(torch.unravel_index(curve(grid, kind).long(), grid), dim=1).float()
    blocks = places[: len(places) // BLOCK * BLOCK].view(-1, BLOCK, len(grid))
    return round(torch.cdist(blocks, blocks).mean().item(), 3)


class _Capture(TorchFunctionMode):
    """Keeps what attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is sdpa:
            self.calls.append(args[:3])
        return function(*args, **(kwargs or {}))


def error(arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Relative L2 error of the op over all sites of some steps, per order and curve."""
    model = load_model()
    grid = (model.config.grid, model.config.grid)
    found: dict[tuple[str, str], list[float]] = {}
    times = time_grid(arguments.steps)
    watched = range(1, arguments.steps, max(1, arguments.steps // 6))
    task = progress.add_task("error", total=len(arguments.labels) * arguments.steps)
    for index, name in enumerate(arguments.labels):
        label, x = torch.tensor([NAMES.index(name)]), _noise(model, index)
        for step, (start, end) in enumerate(itertools.pairwise(times)):
            with _Capture() as capture:
                x = euler_step(model, x, label, start, end)
            for q, k, v in capture.calls if step in watched else ():
                dense = sdpa(q, k, v)
                for order, kind in itertools.product(ORDERS, CURVES):
                    out = pisa.attention(
                        q, k, v, sparsity=SPARSITY, order=order, permutation=curve(grid, kind)
                    )
                    found.setdefault((order, kind), []).append(relative_l2(out, dense))
            progress.advance(task)
    return [
        {
            "order": order,
            "curve": kind,
            "sites": len(errors),
            "relative_l2_mean": statistics.mean(errors),
            "of_raster_median": statistics.median(
                mine / raster for mine, raster in zip(errors, found[order, "raster"], strict=True)
            ),
            "worse_than_raster": sum(
                mine > raster for mine, raster in zip(errors, found[order, "raster"], strict=True)
            ),
        }
        for (order, kind), errors in found.items()
    ]


def pictures(arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """PSNR of final pictures to dense ones, with nothing set but sparsity, order and curve."""
    model = load_model()
    total = len(arguments.labels) * (1 + len(ORDERS) * len(CURVES))
    task = progress.add_task("pictures", total=total)
    dense = _pictures(torch.compile(model), model, arguments, progress, task)
    rows = []
    for order, kind in itertools.product(ORDERS, CURVES):
        torch._dynamo.reset()
        options = {"sparsity": SPARSITY, "order": order, "curve": kind}
        sparse = torch.compile(model, backend="pisa", options=options)
        values = [
            psnr(mine, theirs)
            for mine, theirs in zip(
                _pictures(sparse, model, arguments, progress, task), dense, strict=True
            )
        ]
        rows.append(
            {
                "order": order,
                "curve": kind,
                "steps": arguments.steps,
                "psnr_db": dict(zip(arguments.labels, values, strict=True)),
                "psnr_db_mean": statistics.mean(values),
            }
        )
    return rows


def _pictures(
    velocity: Callable[..., Tensor],
    model: Any,
    arguments: argparse.Namespace,
    progress: Progress,
    task: Any,
) -> list[Tensor]:
    results = []
    for index, name in enumerate(arguments.labels):
        x, label = _noise(model, index), torch.tensor([NAMES.index(name)])
        for start, end in itertools.pairwise(time_grid(arguments.steps)):
            x = euler_step(velocity, x, label, start, end)
        results.append(x[0])
        progress.advance(task)
    return results


def _noise(model: Any, index: int) -> Tensor:
    return noise(SEED + index, model.config.grid * model.config.patch)


def cost(arguments: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Time of the op with the order against without, the node that makes the order included."""
    rows = []
    torch.set_num_threads(1)  # waiting threads would count
    cases = list(itertools.product(COST_GRIDS, COST_SHAPES, (torch.float32, torch.bfloat16)))
    task = progress.add_task("cost", total=len(cases) * arguments.rounds)
    for grid, (heads, head_dim), dtype in cases:
        tokens = math.prod(grid)
        generator = torch.Generator().manual_seed(SEED)
        shape = (1, tokens, heads, head_dim)
        q, k, v = (
            torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
        )
        seconds: dict[str, list[float]] = {"raster": [], "hilbert": []}
        for round_ in range(arguments.rounds + 1):
            for kind, times in seconds.items():
                begin = time.process_time()
                order = None
                if kind != "raster":
                    order = torch.ops.pisa.token_order(grid, kind, tokens, 0, 0, q.device)
                pisa.attention(q, k, v, sparsity=SPARSITY, permutation=order)
                if round_:  # the first only warms up
                    times.append(time.process_time() - begin)
            progress.advance(task, 1 if round_ else 0)
        median = {kind: statistics.median(times) for kind, times in seconds.items()}
        ratios = [b / a for a, b in zip(seconds["raster"], seconds["hilbert"], strict=True)]
        rows.append(
            {
                "tokens": tokens,
                "heads": heads,
                "head_dim": head_dim,
                "dtype": str(dtype).removeprefix("torch."),
                "seconds": median,
                "extra": statistics.median(ratios) - 1,
            }
        )
    return rows


PARTS = {"compactness": compactness, "error": error, "pictures": pictures, "cost": cost}

if __name__ == "__main__":
    main()
