"""The command: measure, draw, write tables. See the package's docstring."""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks import records
from examples.photo_dit.weights import load_model

from . import __doc__ as description
from . import data, operator, pictures, plots, tables, timing

PARTS = ("operator", "timing", "pictures")
console = Console()


def main() -> None:
    arguments = _arguments()
    record: dict[str, Any] = {}
    if arguments.output.exists():
        record = records.read(arguments.output)
    for part in arguments.parts:
        if part == "timing":  # with no workers beside it
            console.print("timing")
            record[part] = timing.measure(arguments.quick)
        else:
            record[part] = _operator(arguments) if part == "operator" else _pictures(arguments)
        record.setdefault("environment", {})[part] = records.environment(
            "python -m benchmarks.fidelity"
        )
        records.write(arguments.output, record)
    if not arguments.quick:
        plots.draw(record, arguments.cache, arguments.images)
        if arguments.document.exists():
            tables.write(record, arguments.document)
    for table in tables.terminal(record):
        console.print(table)


def _operator(arguments: argparse.Namespace) -> dict[str, Any]:
    quick, rows = arguments.quick, []
    jobs = []
    for sample in (*data.structured(quick), *data.adversarial(quick)):
        jobs.append((operator.measure, (sample, quick)))
    # Capturing runs the model, so the workers start before it is done.
    samples = data.captured(load_model(), quick)
    jobs_after = ((operator.measure, (sample, quick)) for sample in samples)
    for result in _in_workers((*jobs, *jobs_after), arguments.workers, "attention calls"):
        rows += result
    rows.sort(
        key=lambda row: (row["method"], row["order"], row["density"], row["group"], row["place"])
    )
    return {"rows": operator.merged(rows)}


def _pictures(arguments: argparse.Namespace) -> dict[str, Any]:
    seeds = pictures.SEEDS[:2] if arguments.quick else pictures.SEEDS
    steps = 2 if arguments.quick else pictures.STEPS
    keys = [
        (name, density, seed)
        for name, density in pictures.settings(arguments.quick)
        for seed in seeds
    ]
    jobs = [(pictures.make, (*key, steps, arguments.cache)) for key in keys]
    for _ in _in_workers(jobs, arguments.workers, "pictures"):
        pass
    made: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
    for name, density, seed in keys:
        made[name, density].append(pictures.picture(name, density, seed, steps, arguments.cache))
    return pictures.record(made, seeds) | {"steps": steps}


def _in_workers(jobs: Iterable[Any], workers: int, title: str) -> Iterable[Any]:
    """Results in the order in which they are done. Small products gain nothing from threads."""
    jobs = list(jobs)
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        Progress(console=console) as progress,
    ):
        task = progress.add_task(title, total=len(jobs))
        futures: list[Future[Any]] = [pool.submit(run, *given) for run, given in jobs]
        for future in as_completed(futures):
            progress.advance(task)
            yield future.result()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fidelity.json"))
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="none draws the record again"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes; writes out/fidelity.json"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("out/fidelity"),
        help="finished pictures; an interrupted run goes on from them. Delete it after a change",
    )
    parser.add_argument("--document", type=Path, default=Path("docs/fidelity.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    if arguments.quick and arguments.output == parser.get_default("output"):
        arguments.output = Path("out/fidelity.json")
    if arguments.quick:
        arguments.cache = arguments.cache / "quick"
    return arguments


if __name__ == "__main__":
    main()
