"""The GPU record: correctness first, then times side by side, as one JSON file.

    python -m benchmarks.gpu                                       every shape and density
    python -m benchmarks.gpu --shapes flux wan_14b_720p --densities 0.125
    python -m benchmarks.gpu --reference-path ~/piecewise-sparse-attention
    python -m benchmarks.gpu --smoke                               toy sizes, interpreter, no GPU

Nothing is timed or written when a correctness check fails. Times are medians over rounds in which
all candidates run one after the other, each from a captured graph and with a cold cache. The smoke
run goes through every line of this on toy sizes; its times mean nothing, and it writes a file only
where --output names one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton

import torch

from benchmarks import records
from pisa_compile.kernels.triton.launcher import device_of

from . import checks, measure, timing
from .shapes import DENSITIES, SHAPES, TOYS
from .timing import Timer


def main() -> int:
    arguments = _arguments()
    device = torch.device("cpu" if arguments.smoke else "cuda")
    found = checks.check_features(device, arguments.smoke)
    shapes = [s for s in SHAPES if not arguments.shapes or s.name in arguments.shapes]
    shapes = list(TOYS) if arguments.smoke else shapes
    for shape in shapes:
        found += checks.check_shape(shape, device)
    found += checks.check_replay(device, arguments.smoke)
    found.append(checks.check_fallbacks())
    failures = [json.dumps(check) for check in found if not check["passed"]]
    if failures:
        print("\n".join(["not measured, because results are wrong:", *failures]), file=sys.stderr)
        return 1
    record: dict[str, Any] = {
        "environment": timing.environment(device, device_of(device).arch),
        "checks": found,
        "results": [],
    }
    timer = Timer(device, arguments.rounds)
    record["matmul_tflops"] = timing.matmul_tflops(timer, device)
    for shape in shapes:
        for density in arguments.densities:
            result = measure.measure(shape, density, device, timer, arguments.reference_path)
            record["results"].append(result)
            print(measure.line(result), flush=True)
            _write(arguments.output, record)
    record["permutation"] = measure.measure_permutation(shapes, device, timer)
    record["environment_after"] = timing.environment(device, device_of(device).arch)
    _write(arguments.output, record)
    if arguments.output:
        print(f"written to {arguments.output}")
    return 0


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        records.write(path, record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=[s.name for s in SHAPES])
    parser.add_argument("--densities", nargs="*", type=float, default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--reference-path", type=Path, help="checkout of the public implementation")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/gpu.json")
    parser.add_argument("--smoke", action="store_true", help="toy sizes in the interpreter")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.densities, arguments.rounds = (0.5,), 1
    elif arguments.output is None:
        arguments.output = records.RESULTS / "gpu.json"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
