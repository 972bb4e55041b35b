"""How long the first call takes: in a process that compiles, and in one that finds the caches full.

    python benchmarks/compile_time.py --output benchmarks/results/compile_time.json

FLUX's transformer from diffusers at a tiny width, as a whole and by repeated blocks, with Inductor
alone and with pisa. Every measurement is a fresh process; the second one of each pair shares the
cache folder of the first. CPU seconds include those of the C++ compiler and of worker processes; a
busy machine changes them less than the time on the wall. What the caches did is in the counters.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "deployment.md"
BEGIN, END = "<!-- table: python benchmarks/compile_time.py -->", "<!-- end -->"
# Depth as published where blocks share their code; less where every block is compiled.
CASES = {"whole": (1, 2), "blocks": (19, 38)}
BACKENDS = ("inductor", "pisa")
COUNTERS = {
    "inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"),
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
}

Measurement = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON record to write")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "BACKEND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(first_call(*arguments.worker)))
        return
    record = {
        "benchmark": "compile_time",
        "model": "FluxTransformer2DModel, 2 heads of 16, 80 tokens",
        "double_and_single_blocks": CASES,
        "environment": records.environment("python benchmarks/compile_time.py"),
        "measurements": [
            measurement
            for case in CASES
            for backend in BACKENDS
            for measurement in pair(case, backend)
        ],
    }
    print(records.text(record))
    if arguments.output is not None:
        records.write(arguments.output, record)
        PAGE.write_text(page(record, PAGE.read_text()))


def page(record: dict[str, Any], old: str) -> str:
    """The page with this record's table in place of the one that it shows."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda match: f"{BEGIN}\n{table(record)}\n{END}", old, flags=re.DOTALL)


def table(record: dict[str, Any]) -> str:
    about = record["environment"]
    lines = [
        "| compiled | backend | caches | CPU seconds | wall seconds | new graphs | from a cache |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in record["measurements"]:
        double, single = record["double_and_single_blocks"][row["case"]]
        compiled = {"whole": "whole model", "blocks": "repeated blocks"}[row["case"]]
        lines.append(
            f"| {compiled}, {double} + {single} blocks | {row['backend']} | {row['cache']} | "
            f"{row['cpu_seconds']:.1f} | {row['wall_seconds']:.1f} | {row['fxgraph_cache_miss']} | "
            f"{row['autograd_cache_hit']} |"
        )
    lines += [
        "",
        f"First call of {record['model']} in a fresh process; {about['machine']}, torch "
        f"{about['torch']}, commit {about['commit']}, load average {about['load_before'][0]:.0f} "
        "at the start. CPU seconds include the C++ compiler's.",
    ]
    return "\n".join(lines)


def pair(case: str, backend: str) -> list[Measurement]:
    """A process with an empty cache, and one after it with the same cache."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            {"case": case, "backend": backend, "cache": cache}
            | fresh_process(case, backend, folder)
            for cache in ("empty", "full")
        ]


def fresh_process(case: str, backend: str, folder: str) -> Measurement:
    result = subprocess.run(
        [sys.executable, __file__, "--worker", case, backend],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    measurement: Measurement = json.loads(result.stdout.splitlines()[-1])
    return measurement


def first_call(case: str, backend: str) -> Measurement:
    """Time of the first call of a compiled model, and what the caches did meanwhile."""
    from torch._dynamo.utils import counters

    from benchmarks.pass_time import flux

    model, inputs = flux(*CASES[case])
    options = {"min_tokens": 0, "block_size": 16, "preset": None} if backend == "pisa" else None
    if case == "whole":
        model.compile(backend=backend, options=options, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=backend, options=options, fullgraph=True)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    with torch.no_grad():
        model(**inputs)
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": _cpu_seconds() - cpu}
    found = {
        name: counters[kind].get(name, 0) for kind, names in COUNTERS.items() for name in names
    }
    return {name: round(value, 2) for name, value in seconds.items()} | found


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
