"""The support matrix: transformer classes of diffusers, timm's attention and DiT, by running them.

    python -m benchmarks.support_matrix                              all models, about half an hour
    python -m benchmarks.support_matrix --models flux hunyuan        those whose name contains these
    python -m benchmarks.support_matrix --inner inductor             compare with Inductor's output
    python -m benchmarks.support_matrix --only-docs                  write the page from the record

Rows of a partial run replace the same rows of the record. The page docs/support-matrix.md is
generated from the record.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import records
from benchmarks.diffusers_models import CASES
from benchmarks.diffusers_models.measure import OPTIONS, UntraceableError, measure

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "support_matrix.json"
PAGE = ROOT / "docs" / "support-matrix.md"
CAPTURE = "capture_dynamic_output_shape_ops"

Row = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    rows: dict[str, Row] = {}
    if args.output.exists():
        rows = {row["name"]: row for row in records.read(args.output)["rows"]}
    if not args.only_docs:
        run(args, rows)
    PAGE.write_text(page(records.read(args.output)))
    wrong = [problem for row in rows.values() for problem in problems(row)]
    for problem in wrong:
        print(problem)
    return 1 if wrong else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[""], metavar="TEXT")
    parser.add_argument("--inner", default="aot_eager", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--only-docs", action="store_true")
    return parser.parse_args()


def run(args: argparse.Namespace, rows: dict[str, Row]) -> None:
    """Measure the chosen models and write the record after each of them."""
    torch.set_num_threads(args.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    names = [name for name in CASES if any(t.lower() in name.lower() for t in args.models)]
    if not names:
        raise SystemExit(f"no model matches {args.models}; there are {', '.join(CASES)}")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("models", total=len(names))
        for name in names:
            progress.update(task, description=name)
            for row in measured(name, args.inner):
                rows[row["name"]] = row
            write_record(args.output, [rows[known] for known in ordered(rows)])
            progress.advance(task)


def measured(name: str, inner: str) -> Iterable[Row]:
    """The row of a model, and a second one where a setting of Dynamo would find more."""
    row = attempt(name, inner)
    yield row
    if row.get("lost") and "Dynamic shape operator" in row["break_reasons"]:
        with torch._dynamo.config.patch({CAPTURE: True}):
            yield attempt(name, inner) | {"name": f"{name}, with {CAPTURE}"}


def attempt(name: str, inner: str) -> Row:
    try:
        return asdict(measure(CASES[name], inner)) | {"inner": inner, "commit": _commit()}
    except (ImportError, UntraceableError) as error:
        return {"name": name, "skipped": str(error)}
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def ordered(rows: dict[str, Row]) -> list[str]:
    """Names in the order of the registry; a variant follows its model."""
    position = {name: index for index, name in enumerate(CASES)}
    return sorted(rows, key=lambda name: position.get(name.partition(f", with {CAPTURE}")[0], 0))


def write_record(path: Path, rows: list[Row]) -> None:
    packages = ("torch", "diffusers", "timm")
    record = {
        "environment": records.environment("python -m benchmarks.support_matrix", *packages),
        "options": OPTIONS,
        "rows": rows,
    }
    records.write(path, record)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def problems(row: Row) -> Iterable[str]:
    """What a row shows that must not be."""
    name = row["name"]
    if "failed" in row:
        yield f"{name}: {row['failed']}"
    elif "skipped" not in row:
        if row["added_graph_breaks"]:
            yield f"{name}: {row['added_graph_breaks']} added graph breaks"
        if row["found"] + sum(row["lost"].values()) != row["eager"]:
            yield f"{name}: {row['found']} sites found, {row['eager']} calls in eager mode"
        if row.get("not_traced", row["lost"]) != row["lost"]:  # missing in older rows
            yield f"{name}: explain reports {row['not_traced']} as not traced, not {row['lost']}"
        if not row["difference"] <= row["tolerance"] * max(1.0, row["scale"]):
            yield f"{name}: output differs by {row['difference']:.1e} at sparsity 0"
        if row["replaced"] and not row["change"] > 10 * row["difference"]:
            yield f"{name}: sparsity does not change the output"


def page(record: dict[str, Any]) -> str:
    about = record["environment"]
    by_name = {row["name"]: row for row in record["rows"]}
    rows = [by_name[name] for name in ordered(by_name)]
    measured_rows = [row for row in rows if "eager" in row]
    reasons = list(dict.fromkeys(reason for row in measured_rows for reason in row["kept"]))
    marks = {reason: index + 1 for index, reason in enumerate(reasons)}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in measured_rows))
    total = {key: sum(row[key] for row in measured_rows) for key in ("eager", "found", "replaced")}
    lines = [
        "# Support matrix",
        "",
        "<!-- Generated by benchmarks/support_matrix.py; do not edit. -->",
        "",
        f"{versions}; Python {about['python']}, {about['date'][:10]}, commit {commits}.",
        "Tiny configurations, every parameter random, float32, a few hundred tokens, "
        "`min_tokens=0`.",
        f"{len(measured_rows)} configurations: {total['eager']} attention calls in eager mode, "
        f"{total['found']} found in traced graphs, {total['replaced']} replaced. "
        + _compared(measured_rows),
        "",
        "*Eager* counts attention calls in one run of the model in eager mode, *found* those that",
        'traced graphs contain, *added breaks* graph breaks against `backend="eager"`,',
        "*difference* is the largest absolute output difference at sparsity 0, to Inductor or,",
        "where marked with an e, to eager mode. Calls of",
        "`F.scaled_dot_product_attention`, `F.multi_head_attention_forward`, `flex_attention` and",
        "softmax between two products all count.",
        "",
        "| Model | Eager | Found | Replaced | Dense (why) | Added breaks | Difference |",
        "|---|--:|--:|--:|---|--:|--:|",
        *(_line(row, marks) for row in rows),
        "",
        "Why a site stays dense:",
        "",
        *(f"{mark}. {reason}" for reason, mark in marks.items()),
    ]
    loose = [row for row in measured_rows if row["tolerance"] > 1e-4 and row["difference"]]
    if loose:
        names = ", ".join(row["name"] for row in loose)
        lines += [
            "",
            f"The model itself runs attention in 16 bits, whence the difference: {names}.",
        ]
    lost = [row for row in measured_rows if row["lost"]]
    if lost:
        lines += ["", "Calls that no traced graph contains:", ""]
        lines += [_lost_line(row) for row in lost]
    return "\n".join(lines) + "\n"


def _line(row: Row, marks: dict[str, int]) -> str:
    if "eager" not in row:
        return f"| {row['name']} | {row.get('failed') or row['skipped']} | | | | | |"
    kept = ", ".join(f"{count} ({marks[reason]})" for reason, count in row["kept"].items())
    cells = (row["eager"], row["found"], row["replaced"], kept, row["added_graph_breaks"])
    mark = "" if row["inner"] == "inductor" else " e"
    return f"| {row['name']} | {' | '.join(map(str, cells))} | {row['difference']:.0e}{mark} |"


def _compared(rows: list[Row]) -> str:
    count = sum(row["inner"] == "inductor" for row in rows)
    largest = max(row["difference"] for row in rows if row["tolerance"] <= 1e-4)
    return (
        f"At sparsity 0 outputs in float32 agree to {largest:.0e} with dense ones; {count} were "
        "compared with Inductor's (`--inner inductor`), the others with eager mode's."
    )


def _lost_line(row: Row) -> str:
    where = ", ".join(f"`{module}`" for module in row["lost"])
    why = "; ".join(row.get("advice", row["break_reasons"])) or "not recognised in the graph"
    return f"- {row['name']}: {sum(row['lost'].values())} in {where}. {why}"


if __name__ == "__main__":
    raise SystemExit(main())
