"""What order "corrected", a permutation and a density tensor cost on the CPU, as one JSON file.

    python benchmarks/cpu_features.py --output benchmarks/results/cpu_features.json
    python benchmarks/cpu_features.py --clock wall --tokens 4096

Every feature is a call of the native library that differs from the plain one (order "hybrid") in
that feature alone. In every round all of them run one after the other, and a cost is the median
over the rounds of the ratio to the plain call of the same round. By default the clock is the
processor time of a single thread, which other processes on the machine disturb least; "wall" is
elapsed time on all threads. Nothing is timed when a result is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu import DTYPES, HEADS, environment
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.cpu import native
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

SPARSITY = 0.875
# tokens, head_dim, dtype
CASES = (
    (4096, 64, "float32"),
    (4096, 64, "bfloat16"),
    (4096, 128, "float32"),
    (16384, 64, "float32"),
    (16384, 128, "float32"),
    (32768, 64, "float32"),
)
PLAIN = "hybrid"


def main() -> int:
    arguments = _arguments()
    console = Console()
    if reason := native.unavailable():
        console.print(f"the native library is missing: {reason}", style="red")
        return 1
    errors = {name: error(name, *case) for name, case in checked_cases()}
    if wrong := {name: error for name, error in errors.items() if error > 1e-5}:
        console.print("not measured, because results are wrong:", wrong, style="red")
        return 1
    record: dict[str, Any] = {
        "environment": environment("python benchmarks/cpu_features.py", arguments.note),
        "clock": arguments.clock,
        "threads": threads_of(arguments.clock),
        "sparsity": SPARSITY,
        "heads": HEADS,
        "errors": errors,
        "results": [],
    }
    cases = [case for case in CASES if arguments.tokens is None or case[0] in arguments.tokens]
    for tokens, head_dim, dtype in track(cases, "cost of features", console=console):
        # About the same time for every length, but never less than three rounds.
        rounds = max(3, arguments.rounds * 4096 * 64 // (tokens * head_dim))
        record["results"].append(measure(tokens, head_dim, dtype, rounds, arguments.clock))
    record["environment"]["load_after"] = os.getloadavg()
    if arguments.output:
        records.write(arguments.output, record)
    console.print(table(record))
    return 0


def features(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Keyword arguments of every candidate, the plain call first."""
    tokens = inputs.query.shape[2]
    params = AttentionParams(scale=inputs.query.shape[3] ** -0.5, sparsity=SPARSITY)
    random = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return {
        PLAIN: {"params": params},
        "corrected": {"params": replace(params, order="corrected")},
        "tiles": {"params": params, "permutation": tiles(tokens)},
        "random order": {"params": params, "permutation": random},
        "density": {"params": params, "density": torch.full((HEADS,), 1 - SPARSITY)},
    }


def tiles(tokens: int) -> Tensor:
    """Squares of 8 x 8 pixels as blocks, in a picture 64 pixels wide."""
    raster = torch.arange(tokens - tokens % 512).view(-1, 8, 8, 8)  # tile row, y, tile column, x
    return torch.cat(
        [raster.transpose(1, 2).flatten(), torch.arange(tokens - tokens % 512, tokens)]
    )


def checked_cases() -> list[tuple[str, tuple[int, int]]]:
    names = list(features(random_inputs(query_len=64, heads=HEADS)))
    return [(name, (700, 64)) for name in names]


def error(name: str, tokens: int, head_dim: int) -> float:
    """Relative error of one candidate against the specification in float64."""
    inputs = random_inputs(query_len=tokens, heads=HEADS, head_dim=head_dim)
    keywords = features(inputs)[name]
    out, _ = native.attention(*inputs.astuple(), **keywords)
    expected, _ = reference.attention(*inputs.to(torch.float64).astuple(), **keywords)
    return relative_l2(out, expected)


def threads_of(clock: str) -> int:
    return 1 if clock == "cpu" else torch.get_num_threads()


def measure(tokens: int, head_dim: int, dtype: str, rounds: int, clock: str) -> dict[str, Any]:
    inputs = random_inputs(
        query_len=tokens, heads=HEADS, head_dim=head_dim, dtype=DTYPES[dtype], seed=tokens
    )
    now: Callable[[], float] = time.thread_time if clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {}
    run = partial(native.attention, *inputs.astuple(), threads=threads_of(clock))
    candidates = features(inputs)
    for _ in range(1 + rounds):
        for name, keywords in candidates.items():
            start = now()
            run(**keywords)
            times.setdefault(name, []).append(1e3 * (now() - start))
    measured = {name: values[1:] for name, values in times.items()}  # the first round warms up
    result: dict[str, Any] = {
        "tokens": tokens, "head_dim": head_dim, "dtype": dtype, "rounds": rounds,
    }  # fmt: skip
    for name, values in measured.items():
        pairs = zip(values, measured[PLAIN], strict=True)
        ratios = sorted(own / plain for own, plain in pairs)
        result[name] = {
            "median_ms": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_p20": ratios[len(ratios) // 5],
            "ratio_p80": ratios[-1 - len(ratios) // 5],
        }
    return result


def table(record: dict[str, Any]) -> Table:
    names = [name for name, value in record["results"][0].items() if isinstance(value, dict)]
    about = record["environment"]
    drawn = Table(
        "tokens", "head dim", "dtype", PLAIN, *names[1:],
        title=f"{record['clock']} time, {record['threads']} threads, {about['cpu']}",
    )  # fmt: skip
    for result in record["results"]:
        drawn.add_row(
            f"{result['tokens']:,}",
            str(result["head_dim"]),
            result["dtype"],
            f"{result[PLAIN]['median_ms']:,.1f} ms",
            *(f"{100 * (result[name]['ratio'] - 1):+.1f} %" for name in names[1:]),
        )
    return drawn


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="where to write the record")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    lengths = sorted({case[0] for case in CASES})
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=lengths, help="of the cases, only these lengths"
    )
    parser.add_argument("--rounds", type=int, default=21, help="at 4,096 tokens; fewer for more")
    parser.add_argument("--note", default="", help="what a reader of the record should know")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
