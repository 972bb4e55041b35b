"""The CPU record: correctness first, then dense attention and ours side by side, as one JSON file.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json
    python benchmarks/cpu.py --quick                                 seconds, small sizes only
    python benchmarks/cpu.py --markdown benchmarks/results/cpu.json  the record as a table

Nothing is timed or written when a correctness check fails. In every round all candidates run one
after the other, so that a slow moment of the machine hits all of them; times are medians with the
20th and 80th percentile. Extra memory is the growth of a fresh process's peak resident size
during one call, without the output. The loaded case runs beside a process that keeps a core busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pisa_compile.kernels.cpu import native, torch_path
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2, specified

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (256, 1024)
LOADED_TOKENS = (2048, 8192)
WARM_TOKENS = 2048  # up to here, waking the threads that another candidate let sleep counts
HEAD_DIMS = (64, 128)
HEADS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CANDIDATES = ("dense", "native", "torch")
Run = Callable[[], Any]


def main() -> int:
    arguments = _arguments()
    console = Console()
    if arguments.markdown:
        print(markdown(records.read(arguments.markdown)))
        return 0
    if arguments.memory_of:
        print(json.dumps(peak_growth(json.loads(arguments.memory_of))))
        return 0
    if reason := native.unavailable():
        console.print(f"the native library is missing: {reason}", style="red")
        return 1
    checks = check()
    if wrong := [c for c in checks if not c["passed"]]:
        console.print("not measured, because results are wrong:", *wrong, style="red")
        return 1

    record: dict[str, Any] = {"results": []}
    if arguments.update:
        record = records.read(arguments.output)
    record |= {
        "environment": environment("python benchmarks/cpu.py", arguments.note),
        "sparsity": arguments.sparsity,
        "checks": checks,
    }
    cases = _cases(arguments)
    record["results"] = [r for r in record["results"] if _key(r) not in cases]
    with Progress(console=console) as progress:
        task = progress.add_task("CPU attention", total=sum(_cost(case) for case in cases))
        for case in cases:
            progress.update(task, description=f"T={case[0]} D={case[1]} {case[2]}")
            result = measure(*case, sparsity=arguments.sparsity, rounds=arguments.rounds)
            record["results"].append(result)
            progress.advance(task, _cost(case))
    record["results"].sort(key=lambda r: (r["busy_process"], r["tokens"], r["head_dim"]))
    record["environment"]["load_after"] = os.getloadavg()
    record["break_even_tokens"] = break_even(record["results"])
    if arguments.output:
        records.write(arguments.output, record)
    console.print(table(record))
    return 0


def _cases(arguments: argparse.Namespace) -> list[tuple[int, int, str, bool]]:
    tokens = QUICK_TOKENS if arguments.quick else arguments.tokens
    cases = [(t, d, n, False) for t, d, n in product(tokens, HEAD_DIMS, DTYPES)]
    loaded = [t for t in LOADED_TOKENS if t in tokens]
    cases += [(t, d, n, True) for t, d, n in product(loaded, HEAD_DIMS, DTYPES)]
    return [case for case in cases if ("loaded" if case[3] else "idle") in arguments.cases]


def _key(result: dict[str, Any]) -> tuple[int, int, str, bool]:
    return result["tokens"], result["head_dim"], result["dtype"], result["busy_process"]


def check() -> list[dict[str, Any]]:
    """Both implementations against the specification in float64, on odd shapes."""
    checks = []
    for name, dtype in DTYPES.items():
        for options in ({}, {"head_dim": 72}, {"masked": 0.3}, {"heads": 4, "kv_heads": 2}):
            inputs = random_inputs(query_len=700, **{"head_dim": 64, **options}, dtype=dtype)
            params = AttentionParams(scale=inputs.query.shape[3] ** -0.5, sparsity=0.7)
            expected, _ = specified(inputs, params)
            rounding = relative_l2(expected.to(dtype), expected)
            for implementation in (native, torch_path):
                out, _ = implementation.attention(*inputs.astuple(), params)
                error = relative_l2(out, expected)
                budget = 1e-5 if dtype == torch.float32 else 2 * rounding
                checks.append(
                    {
                        "implementation": implementation.__name__.rsplit(".", 1)[1],
                        "dtype": name,
                        "shape": options,
                        "error": error,
                        "budget": budget,
                        "passed": error <= budget,
                    }
                )
    return checks


def measure(
    tokens: int, head_dim: int, dtype: str, busy: bool, *, sparsity: float, rounds: int
) -> dict[str, Any]:
    """Times, and for an idle machine the memory, of the candidates on one shape."""
    inputs = _inputs(tokens, head_dim, dtype)
    params = AttentionParams(scale=head_dim**-0.5, sparsity=sparsity)
    runs = candidates(inputs, params)
    times: dict[str, list[float]] = {name: [] for name in runs}
    # Short calls are repeated more often, because one interruption is a larger part of them.
    rounds = max(rounds, min(51, 2 * 8192 // tokens))
    with busy_process() if busy else _nothing():
        for _ in range(1 + rounds):
            for name, run in runs.items():
                if tokens <= WARM_TOKENS:
                    run()
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    result: dict[str, Any] = {
        "tokens": tokens,
        "head_dim": head_dim,
        "heads": HEADS,
        "dtype": dtype,
        "busy_process": busy,
        "rounds": rounds,
        "input_bytes": 3 * inputs.query.nbytes,
    }
    for name, values in times.items():
        ordered = sorted(values[1:])  # the first round warms up
        result[f"{name}_ms"] = {
            "p20": ordered[len(ordered) // 5],
            "median": statistics.median(ordered),
            "p80": ordered[-1 - len(ordered) // 5],
        }
    if not busy:
        for name in CANDIDATES:
            result[f"{name}_extra_bytes"] = _extra_memory(name, tokens, head_dim, dtype, sparsity)
    return result


def candidates(inputs: Inputs, params: AttentionParams) -> dict[str, Run]:
    query, key, value, _ = inputs.astuple()
    return {
        "dense": lambda: sdpa(query, key, value, scale=params.scale),
        "native": lambda: native.attention(query, key, value, None, params),
        "torch": lambda: torch_path.attention(query, key, value, None, params),
    }


def _inputs(tokens: int, head_dim: int, dtype: str) -> Inputs:
    return random_inputs(
        query_len=tokens, heads=HEADS, head_dim=head_dim, dtype=DTYPES[dtype], seed=tokens
    )


def _cost(case: tuple[int, int, str, bool]) -> int:
    return case[0] * case[0] * case[1] + 10**8


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _extra_memory(name: str, tokens: int, head_dim: int, dtype: str, sparsity: float) -> int | None:
    """Measured in a process of its own, whose allocator holds nothing to reuse."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    case = json.dumps([name, tokens, head_dim, dtype, sparsity])
    command = [sys.executable, __file__, "--memory-of", case]
    # Every larger block comes from the system and returns to it, none from an earlier free.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return int(json.loads(done.stdout))


def peak_growth(case: tuple[str, int, int, str, float]) -> int:
    """Bytes by which one call raises the peak resident size, without its output."""
    name, tokens, head_dim, dtype, sparsity = case
    params = AttentionParams(scale=head_dim**-0.5, sparsity=sparsity)
    candidates(_inputs(64, head_dim, dtype), params)[name]()  # loads code, starts threads
    run = candidates(_inputs(tokens, head_dim, dtype), params)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    result = run()
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    return max(0, _resident("VmHWM") - before - out.nbytes)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def break_even(results: list[dict[str, Any]]) -> dict[str, int | None]:
    """The shortest length measured from which on ours is faster at every longer one, else None."""
    found: dict[str, int | None] = {}
    for name, dtype, head_dim in product(("native", "torch"), DTYPES, HEAD_DIMS):
        key = f"{name} {dtype} D={head_dim}"
        found[key] = None
        for result in sorted(results, key=lambda r: -r["tokens"]):
            if (result["dtype"], result["head_dim"]) != (dtype, head_dim) or result["busy_process"]:
                continue
            if result[f"{name}_ms"]["p80"] >= result["dense_ms"]["p20"]:
                break
            found[key] = result["tokens"]
    return found


def environment(command: str, note: str | None) -> dict[str, Any]:
    return records.environment(command, instruction_set=native.variants()[0], note=note)


COLUMNS = ("tokens", "head dim", "dtype", "SDPA", "native", "speed-up", "torch path", "speed-up")
COLUMNS += ("memory / q+k+v",)


def rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for result in record["results"]:
        dense, ours, fallback = (result[f"{name}_ms"]["median"] for name in CANDIDATES)
        extra = result.get("native_extra_bytes")
        yield (
            f"{result['tokens']:,}" + (" (loaded)" if result["busy_process"] else ""),
            str(result["head_dim"]),
            result["dtype"],
            f"{dense:,.2f} ms",
            f"{ours:,.2f} ms",
            f"{dense / ours:.1f}x",
            f"{fallback:,.2f} ms",
            f"{dense / fallback:.1f}x",
            "" if extra is None else f"{extra / result['input_bytes']:.2f}",
        )


def table(record: dict[str, Any]) -> Table:
    drawn = Table(*COLUMNS, title=_caption(record))
    for row in rows(record):
        drawn.add_row(*row)
    return drawn


def markdown(record: dict[str, Any]) -> str:
    """One line per length: speed-up of the native library and, in brackets, of the torch path."""
    shapes = list(product(DTYPES, HEAD_DIMS))
    header = ["tokens", *(f"{dtype}, D={head_dim}" for dtype, head_dim in shapes), "extra memory"]
    lines = [f"| {' | '.join(header)} |", "|" + "---:|" * len(header)]
    results = {_key(result): result for result in record["results"]}
    for busy, tokens in sorted({(key[3], key[0]) for key in results}):
        cells = [f"{tokens:,}" + (", loaded" if busy else "")]
        found = [results.get((tokens, head_dim, dtype, busy)) for dtype, head_dim in shapes]
        for result in found:
            dense, ours, fallback = (
                result[f"{name}_ms"]["median"] if result else float("nan") for name in CANDIDATES
            )
            cells.append(f"{dense / ours:.1f}x ({dense / fallback:.1f}x)" if result else "")
        extra = [r["native_extra_bytes"] / r["input_bytes"] for r in found if r and not busy]
        cells.append(f"{max(extra):.2f}" if extra else "")
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{_caption(record)} In brackets: without a compiler. Extra memory: of q+k+v, at most."
    return "\n".join([*lines, "", about])


def _caption(record: dict[str, Any]) -> str:
    about = record["environment"]
    return (
        f"B=1, H={HEADS}, sparsity {record['sparsity']}, block size 64, hybrid; {about['cpu']}, "
        f"{about['threads']} threads, {about['instruction_set']}, torch {about['torch']}; medians "
        "of interleaved runs; “loaded”: beside another process that keeps one core busy."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="where to write the record")
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sparsity", type=float, default=0.875)
    parser.add_argument("--rounds", type=int, default=5, help="at least; more for short sequences")
    parser.add_argument("--note", default="", help="what a reader of the record should know")
    parser.add_argument(
        "--cases", nargs="+", choices=("idle", "loaded"), default=("idle", "loaded")
    )
    parser.add_argument("--update", action="store_true", help="add to the record at --output")
    parser.add_argument("--markdown", type=Path, metavar="RECORD", help="print a record as a table")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
