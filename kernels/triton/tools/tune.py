"""Time candidate configurations on this GPU and write those that win as a table.

    python -m pisa_compile.kernels.triton.tools.tune --output table.json
    python -m pisa_compile.kernels.triton.tools.tune --output table.json --tokens 75600
    PISA_TRITON_TABLE=table.json python ...                        use it

A candidate must pass the ahead-of-time check and give the result of the entry that it replaces.
One aspect is tuned after the other, because the kernels do not depend on each other's tiles. With
TRITON_INTERPRET=1 the whole command runs without a GPU, at whatever size is asked for, and what it
writes means nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

from ...params import AttentionParams
from ...testing import Inputs, random_inputs, relative_l2
from ..configs import DTYPES, Config, Launch, lookup, padded_width, table_width, write_table
from ..launcher import INTERPRETED, device_of
from ..plan import plan
from . import compile_check

logger = logging.getLogger("pisa_compile")

Timer = Callable[[Callable[[], None]], float]  # milliseconds of one run
Proof = Callable[[Config, "Aspect", int, str], bool]

HEAD_DIMS = (64, 128)
# Two results of one function in the same dtype differ by the rounding of weights and output.
AGREEMENT = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Aspect:
    """A part of the configuration that is timed by itself.

    Attributes:
        kernels: what is timed together, by name; those of them that a plan contains.
        candidates: changes to the configuration.
        masked: with a key mask, which takes the guarded path.
        routing: of the timed call.
    """

    name: str
    kernels: tuple[str, ...]
    candidates: tuple[dict[str, Any], ...]
    masked: bool = False
    routing: str = "topk"


def _launches(name: str, warps: Iterable[int], stages: Iterable[int]) -> list[dict[str, Any]]:
    return [{name: Launch(w, s)} for w in warps for s in stages]


def aspects() -> tuple[Aspect, ...]:
    """All candidates, a few hundred compilations for each head_dim and dtype."""
    tiles = [
        {"rows": rows, "keys": keys, "centroids": centroids, "descriptors": descriptors}
        for rows in (64, 128)
        for keys in (32, 64)
        for centroids in (32, 64)
        for descriptors in (False, True)
    ]
    forward = [{**t, **o} for t in tiles for o in _launches("forward", (4, 8), (1, 2, 3, 4))]
    statistics = [
        {"tile": tile, **option}
        for tile in (64, 128)
        for option in _launches("statistics", (4, 8), (1, 2, 3))
    ]
    routing = [
        {"columns": columns, **option}
        for columns in (32, 64, 128)
        for option in _launches("routing", (4, 8), (1, 2, 3))
    ]
    inside = [{"inside": True, **o} for o in _launches("selecting", (4, 8), (1, 2, 3))]
    guarded = _launches("guarded", (4, 8), (1, 2, 3))
    deciding = ("moments", "cuts", "routing", "forward")
    return (
        Aspect("forward", ("forward",), tuple(forward)),
        Aspect("guarded", ("forward",), tuple(guarded), masked=True),
        Aspect("statistics", ("statistics",), tuple(statistics)),
        Aspect("routing", ("routing",), tuple(routing)),
        Aspect("threshold", deciding, ({"inside": False}, *inside), routing="threshold"),
    )


@dataclass(frozen=True)
class Problem:
    """What is timed: self-attention of `tokens` tokens in [B, T, H, D] memory."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    sparsity: float
    device: torch.device

    def inputs(self, masked: bool) -> Inputs:
        return random_inputs(
            heads=self.heads, query_len=self.tokens, head_dim=self.head_dim,
            dtype=getattr(torch, self.dtype), masked=0.05 if masked else 0.0,
            device=str(self.device),
        )  # fmt: skip

    def params(self, aspect: Aspect) -> AttentionParams:
        return AttentionParams(self.head_dim**-0.5, self.sparsity, routing=aspect.routing)


def tune(
    problem: Problem,
    timer: Timer,
    *,
    wanted: Iterable[Aspect] | None = None,
    proven: Proof | None = None,
) -> dict[str, Any]:
    """The best configuration for one head_dim and dtype, as an entry of a table.

    Args:
        problem: the call to time.
        timer: milliseconds of one run of a function.
        wanted: aspects in the order in which they are tuned; all by default.
        proven: whether a configuration passes the ahead-of-time check.
    """
    arch = device_of(problem.device).arch
    start = lookup(arch, problem.head_dim, problem.head_dim, problem.dtype)
    best, times = start, {}
    proven = proven or passes_check
    for aspect in aspects() if wanted is None else wanted:
        inputs, params = problem.inputs(aspect.masked), problem.params(aspect)
        expected, run = _prepared(inputs, params, best, aspect.kernels)
        before = best_time = timer(run)
        for change in aspect.candidates:
            candidate = replace(best, **change)
            if not proven(candidate, aspect, problem.head_dim, problem.dtype):
                continue
            try:
                out, run = _prepared(inputs, params, candidate, aspect.kernels)
                error, taken = relative_l2(out, expected), timer(run)
            except torch.OutOfMemoryError:
                raise
            except Exception as refused:  # a device may refuse what a compiler accepts
                logger.warning("%s of %s cannot run: %s", change, aspect.name, refused)
                continue
            if error > AGREEMENT[problem.dtype]:
                logger.warning("%s of %s is wrong by %.1e", change, aspect.name, error)
            elif taken < best_time:
                best_time, best = taken, candidate
        times[aspect.name] = {"before_ms": before, "after_ms": best_time}
    return {
        "architecture": arch,
        "width": table_width(problem.head_dim, problem.head_dim),
        "head_dim": problem.head_dim,
        "dtype": problem.dtype,
        "times": times,
        "config": best,
    }


def passes_check(config: Config, aspect: Aspect, head_dim: int, dtype: str) -> bool:
    """Whether the kernels of `aspect` compile, use tensor cores, fit and do not spill.

    Also at the other head dimensions of the entry, whose loads are guarded. The interpreter has
    nothing to compile for.
    """
    if INTERPRETED:
        return True
    arch = device_of(torch.device("cuda")).arch
    padded = padded_width(head_dim)
    return all(
        row.ok
        for width in sorted({padded, padded * 3 // 4})
        for row in compile_check.rows(
            [arch], [width], [getattr(torch, dtype)], kernels=aspect.kernels, config=config,
            masked=aspect.masked, routing=aspect.routing,
        )
    )  # fmt: skip


def _launch_all(work: Any, names: Iterable[str] | None = None) -> None:
    for launch in work.launches:
        if names is None or launch.name in names:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)


def _prepared(
    inputs: Inputs, params: AttentionParams, config: Config, names: tuple[str, ...]
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Output of one complete run, and the named kernels alone on the workspace that it filled."""
    work = plan(*inputs.astuple(), params, device_of(inputs.query.device), config=config)
    _launch_all(work)
    return work.out.clone(), lambda: _launch_all(work, names)


def median_time(run: Callable[[], None]) -> float:
    """Milliseconds, from a warm kernel and a cold cache."""
    if INTERPRETED:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    return float(triton.testing.do_bench(run, return_mode="median"))


def main(arguments: list[str] | None = None, timer: Timer = median_time) -> int:
    options = _options(arguments)
    if not INTERPRETED and not torch.cuda.is_available():
        print("tuning needs a CUDA or ROCm device; there is none", file=sys.stderr)  # noqa: T201
        return 1
    device = torch.device("cpu" if INTERPRETED else "cuda")
    names = set(options.aspects or ())
    wanted = [aspect for aspect in aspects() if not names or aspect.name in names]
    if options.candidates is not None:
        wanted = [replace(a, candidates=a.candidates[: options.candidates]) for a in wanted]
    entries = []
    for head_dim in options.head_dims:
        for dtype in options.dtypes:
            problem = Problem(
                options.tokens, options.heads, head_dim, dtype, options.sparsity, device
            )
            entries.append(tune(problem, timer, wanted=wanted))
            _report(entries[-1])
            write_table(
                options.output,
                entries,
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                device=torch.cuda.get_device_name() if device.type == "cuda" else "interpreter",
                torch=torch.__version__,
                triton=triton.__version__,
                tokens=options.tokens,
                heads=options.heads,
                sparsity=options.sparsity,
            )
    return 0


def _report(entry: dict[str, Any]) -> None:
    for name, ms in entry["times"].items():
        print(  # noqa: T201
            f"{entry['architecture']} head_dim {entry['head_dim']} {entry['dtype']} {name}: "
            f"{ms['before_ms']:.4f} ms -> {ms['after_ms']:.4f} ms",
            flush=True,
        )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pisa_compile.kernels.triton.tools.tune",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.875)
    parser.add_argument("--aspects", nargs="+", choices=[a.name for a in aspects()])
    parser.add_argument("--candidates", type=int, help="at most this many for each aspect")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
