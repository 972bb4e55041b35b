"""Dense and piecewise sparse attention side by side, on the same noise.

    python -m examples.photo_dit.demo --sparsity 0.85

Two compiled copies of one model, `backend="inductor"` and `backend="pisa"`, each follow their own
sampling trajectory from the same starting noise. Their steps take turns, so that whatever else the
machine does slows both alike.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import pisa_compile as pisa

from .data import NAMES
from .figure import save_comparison
from .sampling import Velocity, euler_step, noise, time_grid
from .weights import WEIGHTS, load_model


@dataclass
class Sampled:
    """What one of the two models produced."""

    pictures: list[Tensor] = field(default_factory=list)  # each [3, S, S] in [-1, 1]
    seconds: list[float] = field(default_factory=list)  # one per step
    compile_seconds: float = 0.0

    def timing(self) -> dict[str, float]:
        """Seconds per step."""
        p20, median, p80 = (
            torch.tensor(self.seconds).quantile(torch.tensor((0.2, 0.5, 0.8))).tolist()
        )
        return {"median": median, "p20": p20, "p80": p80, "compile": self.compile_seconds}


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [-1, 1], clamped as they are shown."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4
    return float(-10 * torch.log10(error.clamp_min(1e-12)))


@torch.no_grad()
def sample(
    models: dict[str, Velocity], args: argparse.Namespace, progress: Progress
) -> dict[str, Sampled]:
    """Every picture from every model, the models taking turns step by step."""
    results = {name: Sampled() for name in models}
    times = time_grid(args.steps)
    side = args.grid * args.patch
    first = noise(args.seed, side), torch.full((1,), times[0]), torch.tensor([0])
    for name, model in models.items():
        task = progress.add_task(f"compile {name}", total=1)
        begin = time.perf_counter()
        model(*first)
        results[name].compile_seconds = time.perf_counter() - begin
        model(*first)  # the first call after compilation still allocates
        progress.advance(task)

    task = progress.add_task("sample", total=len(args.labels) * args.steps)
    for index, name in enumerate(args.labels):
        label = torch.tensor([NAMES.index(name)])
        state = {key: noise(args.seed + index, side) for key in models}
        for start, end in itertools.pairwise(times):
            progress.update(task, description=f"sample {name}")
            for key, model in models.items():
                begin = time.perf_counter()
                state[key] = euler_step(model, state[key], label, start, end)
                results[key].seconds.append(time.perf_counter() - begin)
            progress.advance(task)
        for key, picture in state.items():
            results[key].pictures.append(picture[0])
    return results


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photo_dit.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument(
        "--labels",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        default=["cat", "coffee", "flower", "pagoda"],
        help=f"one picture each; of {', '.join(NAMES)}",
    )
    parser.add_argument("--steps", type=int, default=24, help="Euler steps per picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 keeps the default of torch")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--output", type=Path, default=Path("out/photo_dit.png"))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args(argv)


def record(args: argparse.Namespace, results: dict[str, Sampled]) -> dict[str, Any]:
    """The numbers of a run, with what is needed to repeat it."""
    quality = [
        psnr(a, b) for a, b in zip(results["dense"].pictures, results["pisa"].pictures, strict=True)
    ]
    dense, sparse = results["dense"].timing(), results["pisa"].timing()
    return {
        "tokens": args.grid**2,
        "dtype": "float32",
        "sparsity": args.sparsity,
        "steps": args.steps,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "seconds_per_step": {"dense": dense, "pisa": sparse},
        "speedup": dense["median"] / sparse["median"],
        "pictures": [
            {"label": label, "psnr_db": value}
            for label, value in zip(args.labels, quality, strict=True)
        ],
        "psnr_db_mean": statistics.mean(quality),
    }


def summarise(numbers: dict[str, Any], console: Console) -> None:
    for name, timing in numbers["seconds_per_step"].items():
        console.print(
            f"{name:6} {timing['median']:.3f} s per step "
            f"(p20 {timing['p20']:.3f}, p80 {timing['p80']:.3f}), "
            f"compiled in {timing['compile']:.0f} s"
        )
    console.print(f"speed-up {numbers['speedup']:.2f}x per step, the whole model")
    for picture in numbers["pictures"]:
        console.print(f"PSNR {picture['label']:12} {picture['psnr_db']:.2f} dB")
    console.print(f"PSNR {'mean':12} {numbers['psnr_db_mean']:.2f} dB")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width to fit, and the report is a wide table
    model = load_model(args.weights)
    args.grid, args.patch = model.config.grid, model.config.patch
    options = {"sparsity": args.sparsity}
    # The cast: torch's annotations do not say that a compiled module is a module.
    sparse = cast(nn.Module, torch.compile(model, backend="pisa", fullgraph=True, options=options))
    models: dict[str, Velocity] = {
        "dense": torch.compile(model, backend="inductor", fullgraph=True),
        "pisa": sparse,
    }
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        results = sample(models, args, progress)
    numbers = record(args, results)

    example = noise(args.seed, args.grid * args.patch), torch.zeros(1), torch.tensor([0])
    report = pisa.explain(sparse, *example)
    console.print(report, report.summary, sep="\n")
    summarise(numbers, console)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_comparison(results["dense"].pictures, results["pisa"].pictures, numbers, args.output)
    console.print(f"wrote {args.output}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
