r"""Calibrated against uniform policies on the photo DiT: PSNR to dense pictures at equal cost.

    python benchmarks/calibration.py --output benchmarks/results/calibration.json
    python benchmarks/calibration.py --draw benchmarks/results/calibration.json

Calibration sees one picture; PSNR is measured on others, from other noise. Every pair of policies
has the same predicted attention time. "preset" is what happens without any setting. `--draw` makes
the picture and the table of docs/calibration.md from a record.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import pisa_compile as pisa
from benchmarks import records
from examples.photo_dit.data import NAMES
from examples.photo_dit.demo import psnr
from examples.photo_dit.sampling import euler_step, noise, time_grid
from examples.photo_dit.weights import WEIGHTS, load_model
from pisa_compile.policies.policy import DEFAULT
from pisa_compile.study.calibration.calibrate import DENSITIES
from pisa_compile.study.calibration.plan import Plan, measured
from pisa_compile.study.calibration.progress import progress
from pisa_compile.study.calibration.runner import Runner

SPARSITIES = (0.7, 0.85, 0.92)
CALIBRATED_ON = (0, 3)  # seed of the noise, number of the photograph
PICTURES = ((101, 0), (102, 4), (103, 7))
DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "calibration.md", DOCS / "images" / "calibration.png"
BEGIN, END = "<!-- table: python benchmarks/calibration.py -->", "<!-- end -->"
ORDERS = {"raster": pisa.Policy(curve="raster"), "curve": pisa.Policy(curve="hilbert")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--draw", type=Path, metavar="RECORD")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="4 steps, one picture, one sparsity")
    arguments = parser.parse_args()
    if arguments.draw:
        record = records.read(arguments.draw)
        plot(record, PICTURE)
        PAGE.write_text(page(record, PAGE.read_text()))
        return
    record = run(arguments)
    save(record, arguments.output)
    show(record)


def save(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        records.write(path, record)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = 4 if arguments.quick else arguments.steps
    sparsities = SPARSITIES[1:2] if arguments.quick else SPARSITIES
    pictures = PICTURES[:1] if arguments.quick else PICTURES
    record: dict[str, Any] = {
        "environment": records.environment("python benchmarks/calibration.py"),
        "steps": steps,
        "pictures": [{"seed": seed, "label": NAMES[label]} for seed, label in pictures],
        "results": [],
    }
    model = load_model(WEIGHTS)

    def generate(model: nn.Module, input_: tuple[int, int]) -> Tensor:
        seed, label = input_
        x, times = noise(seed, model.config.grid * model.config.patch), time_grid(steps)
        with pisa.denoising(steps) as done:
            for i in done:
                x = euler_step(model, x, torch.tensor([label]), times[i], times[i + 1])
        return x

    with ExitStack() as stack:
        bar = stack.enter_context(progress(True))
        stack.enter_context(torch.no_grad())
        plain = stack.enter_context(Runner(model, generate, DEFAULT))
        dense = [plain(picture) for picture in bar.track(pictures, "dense")]

        def add(policy: str, order: str, run: Callable[[Any], Tensor], **more: Any) -> None:
            quality = [
                psnr(run(picture), expected)
                for picture, expected in bar.track(
                    list(zip(pictures, dense, strict=True)), f"{policy} {order}"
                )
            ]
            record["results"].append(
                {
                    "policy": policy,
                    "order": order,
                    "psnr_db": quality,
                    "psnr_db_mean": statistics.mean(quality),
                    **more,
                }
            )

        for order, policy in ORDERS.items():
            save(record, arguments.output)  # half a record is better than none
            runner = stack.enter_context(Runner(model, generate, policy.over(DEFAULT)))
            start = time.perf_counter()
            table, results = measured(runner, [CALIBRATED_ON], DENSITIES, bar)
            plan = Plan.of(table, per_head=True)
            plan.weigh(runner, CALIBRATED_ON, results[0], bar)
            record.setdefault("calibration_seconds", {})[order] = time.perf_counter() - start
            for sparsity in sparsities:
                chosen = plan.solve(sparsity=sparsity, speedup=None, max_error=None)
                even = plan.uniform_sparsity(chosen)
                speedup = plan.dense_seconds / plan.seconds(chosen)
                cost = {"predicted_attention_speedup": speedup, "sparsity": even}
                named = {"policy": plan.policies(chosen, policy)}
                predicted = plan.predicted_error(chosen)
                calibrated = partial(runner, options=named)
                add("calibrated", order, calibrated, predicted_error=predicted, **cost)
                add("uniform", order, partial(runner, options={"sparsity": even}), **cost)
            if order == DEFAULT.curve:
                chosen = plan.solve(sparsity=DEFAULT.sparsity, speedup=None, max_error=None)
                speedup = plan.dense_seconds / plan.seconds(chosen)
                zero_code = plain.of({})

                def preset(picture: Any, compiled: Any = zero_code) -> Tensor:
                    return generate(compiled, picture).flatten()

                add("preset", order, preset, predicted_attention_speedup=speedup)
    return record


def gains(record: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Order, speed-up, and how much better calibrated is than uniform there, in dB."""
    found = []
    for result in record["results"]:
        if result["policy"] != "calibrated":
            continue
        (even,) = (
            other
            for other in record["results"]
            if other["policy"] == "uniform"
            and other["order"] == result["order"]
            and other["sparsity"] == result["sparsity"]
        )
        difference = result["psnr_db_mean"] - even["psnr_db_mean"]
        found.append((result["order"], result["predicted_attention_speedup"], difference))
    return found


def page(record: dict[str, Any], old: str) -> str:
    """The page with this record's table in place of the one that it shows."""
    before, _, rest = old.partition(BEGIN)
    return f"{before}{BEGIN}\n{markdown(record)}\n{END}{rest.partition(END)[2]}"


def markdown(record: dict[str, Any]) -> str:
    """PSNR by speed-up: a row for each pair of policies of equal cost, and the presets."""
    lines = [
        "| order of tokens | attention, times faster | uniform, dB | calibrated, dB | gain, dB |",
        "|---|--:|--:|--:|--:|",
    ]
    by_policy = {
        policy: [r for r in record["results"] if r["policy"] == policy]
        for policy in ("calibrated", "uniform", "preset")
    }
    for ours, even in zip(by_policy["calibrated"], by_policy["uniform"], strict=True):
        quality = ours["psnr_db_mean"], even["psnr_db_mean"]
        lines.append(
            f"| {ours['order']} | {ours['predicted_attention_speedup']:.2f} | {quality[1]:.2f} | "
            f"{quality[0]:.2f} | {quality[0] - quality[1]:+.2f} |"
        )
    for preset in by_policy["preset"]:
        lines.append(
            f"| {preset['order']}, no setting at all | "
            f"{preset['predicted_attention_speedup']:.2f} | {preset['psnr_db_mean']:.2f} | | |"
        )
    return "\n".join(lines)


def show(record: dict[str, Any]) -> None:
    table = Table("policy", "order", "attention speed-up", "PSNR dB (mean)", "PSNR dB")
    for r in record["results"]:
        table.add_row(
            r["policy"],
            r["order"],
            f"{r['predicted_attention_speedup']:.2f}x",
            f"{r['psnr_db_mean']:.2f}",
            " ".join(f"{value:.1f}" for value in r["psnr_db"]),
        )
    console = Console()
    console.print(table)
    for order, speedup, gain in gains(record):
        console.print(f"{order} at {speedup:.2f}x: calibrated is {gain:+.2f} dB from uniform")


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    styles = {"calibrated": "o-", "uniform": "s--", "preset": "*"}
    colours = {"raster": "#b0522a", "curve": "#2a6fb0"}
    for order in ORDERS:
        for policy, style in styles.items():
            points = [
                (r["predicted_attention_speedup"], r["psnr_db_mean"])
                for r in record["results"]
                if (r["policy"], r["order"]) == (policy, order)
            ]
            if points:
                axes.plot(
                    *zip(*sorted(points), strict=True), style, color=colours[order],
                    markersize=14 if policy == "preset" else 7, label=f"{policy}, {order} order",
                )  # fmt: skip
    axes.set_xlabel("attention speed-up over dense (predicted by the cost model)")
    axes.set_ylabel("PSNR to dense pictures, dB")
    axes.set_title(f"Photo DiT, {record['steps']} steps, pictures not calibrated on")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
