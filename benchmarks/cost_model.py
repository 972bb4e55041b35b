"""How well the cost model predicts: predicted and measured times at shapes it was not fitted to.

    python benchmarks/cost_model.py --output benchmarks/results/cost_model.json

The profile is measured first, as a user's first compilation does, then dense and sparse attention
are timed at every shape, interleaved. The error of a prediction is |predicted / measured - 1|.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pisa_compile.cost.measure import interleaved, measure
from pisa_compile.cost.model import Profile, Workload, break_even
from pisa_compile.cost.store import device_name
from pisa_compile.kernels.params import Settings
from pisa_compile.kernels.testing import random_inputs
from pisa_compile.ops import dispatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

TOKENS = {"cpu": (700, 1536, 3000, 6144), "cuda": (3000, 6144, 16000, 32760)}
HEADS = (3, 12)
DENSITIES = (0.1, 0.3)
HEAD_DIMS = (64, 72, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="one dtype and head dimension")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = list(product(DTYPES, HEAD_DIMS))[: 1 if arguments.quick else None]
    about = records.environment("python benchmarks/cost_model.py", device=device_name(device))
    record: dict[str, Any] = {"environment": about, "profiles": [], "results": []}
    with torch.inference_mode():
        for name, head_dim in kinds:
            start = time.perf_counter()
            profile = measure(device, DTYPES[name], head_dim, head_dim)
            seconds = time.perf_counter() - start
            record["profiles"].append(
                {"dtype": name, "head_dim": head_dim, "seconds_to_measure": seconds}
            )
            shapes = list(product(TOKENS[device.type], HEADS, DENSITIES))
            for shape in track(shapes, description=f"{name} D={head_dim}"):
                record["results"].append(compare(profile, name, head_dim, *shape, device))
    record["environment"]["load_after"] = os.getloadavg()
    record["median_error"] = {
        kind: statistics.median(r[f"{kind}_error"] for r in record["results"])
        for kind in ("dense", "sparse", "ratio")
    }
    wrong = [r for r in record["results"] if (r["predicted_ratio"] > 1) != (r["ratio"] > 1)]
    record["wrong_decisions"] = len(wrong)
    if arguments.output:
        records.write(arguments.output, record)
    show(record)


def compare(
    profile: Profile,
    dtype: str,
    head_dim: int,
    tokens: int,
    heads: int,
    density: float,
    device: torch.device,
) -> dict[str, Any]:
    settings = Settings(sparsity=1 - density)
    params = settings.scaled(head_dim**-0.5)
    work = Workload(1, heads, heads, tokens, head_dim, head_dim, settings)
    inputs = random_inputs(
        heads=heads, query_len=tokens, head_dim=head_dim, dtype=DTYPES[dtype], device=str(device)
    )
    q, k, v, _ = inputs.astuple()
    dense, sparse = interleaved(
        [partial(sdpa, q, k, v), partial(dispatch.attention, q, k, v, None, params)], device
    )
    predicted_dense, predicted_sparse = profile.dense_seconds(work), profile.sparse_seconds(work)
    ratio, predicted_ratio = dense / sparse, predicted_dense / predicted_sparse
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "tokens": tokens,
        "heads": heads,
        "density": density,
        "dense_seconds": dense,
        "sparse_seconds": sparse,
        "ratio": ratio,
        "predicted_dense_seconds": predicted_dense,
        "predicted_sparse_seconds": predicted_sparse,
        "predicted_ratio": predicted_ratio,
        "dense_error": abs(predicted_dense / dense - 1),
        "sparse_error": abs(predicted_sparse / sparse - 1),
        "ratio_error": abs(predicted_ratio / ratio - 1),
        "break_even_tokens": break_even(work, profile),
    }


def show(record: dict[str, Any]) -> None:
    table = Table(title="predicted against measured")
    for column in ("dtype", "D", "tokens", "heads", "density", "dense ms", "sparse ms", "errors"):
        table.add_column(column, justify="right")
    for r in record["results"]:
        table.add_row(
            r["dtype"],
            str(r["head_dim"]),
            f"{r['tokens']:,}",
            str(r["heads"]),
            str(r["density"]),
            f"{1e3 * r['dense_seconds']:.2f} ({1e3 * r['predicted_dense_seconds']:.2f})",
            f"{1e3 * r['sparse_seconds']:.2f} ({1e3 * r['predicted_sparse_seconds']:.2f})",
            f"{r['dense_error']:.0%} {r['sparse_error']:.0%}",
        )
    console = Console()
    console.print(table)
    errors = ", ".join(f"{kind} {error:.1%}" for kind, error in record["median_error"].items())
    console.print(
        f"median error: {errors}; wrong decisions: {record['wrong_decisions']} "
        f"of {len(record['results'])}"
    )


if __name__ == "__main__":
    main()
