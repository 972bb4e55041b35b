"""The pipeline matrix: pipelines of diffusers, compiled, with what people switch on beside it.

    python -m benchmarks.pipelines                   all combinations, about 20 minutes
    python -m benchmarks.pipelines --pipelines Wan --features LoRA    where a name contains these
    python -m benchmarks.pipelines --missing         what the record does not have yet
    python -m benchmarks.pipelines --only-docs       write the page from the record

Cells of a partial run replace the same cells of the record. The matrix in docs/diffusers.md is
generated from the record; the slow tests measure every cell again and compare.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import records
from examples.pipelines.tiny import TINY

from .features import FEATURES, STEPS
from .measure import (
    BLOCKS,
    OPTIONS,
    STYLES,
    TOLERANCE,
    WHOLE,
    NotOfferedError,
    measure,
)

ROOT = records.ROOT
RECORD = ROOT / "benchmarks" / "results" / "pipelines.json"
PAGE = ROOT / "docs" / "diffusers.md"
BEGIN, END = "<!-- matrix: python -m benchmarks.pipelines -->", "<!-- end -->"
BEGIN_ROWS = "<!-- rows: python -m benchmarks.pipelines -->"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchao")
PLAIN = "nothing else"
# Inductor's own arithmetic, where the rest runs the rewritten graph as it is: it takes longest.
INDUCTOR = "nothing else, with Inductor"
WITH_INDUCTOR = {
    ("FluxPipeline", WHOLE),
    ("WanPipeline", BLOCKS),
    ("HunyuanVideoPipeline", BLOCKS),
}

Cell = dict[str, Any]
Key = tuple[str, str, str]


def main() -> int:
    args = parse_arguments()
    cells = {key(cell): cell for cell in load()["cells"]} if RECORD.exists() else {}
    if not args.only_docs:
        run(args, cells)
    PAGE.write_text(page(load(), PAGE.read_text()))
    wrong = [f"{key(cell)}: {text}" for cell in cells.values() for text in cell["problems"]]
    for text in wrong:
        print(text)
    return 1 if wrong else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipelines", nargs="*", default=[""], metavar="TEXT")
    parser.add_argument("--features", nargs="*", default=[""], metavar="TEXT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--only-docs", action="store_true")
    return parser.parse_args()


def run(args: argparse.Namespace, cells: dict[Key, Cell]) -> None:
    """Measure the chosen combinations and write the record after each of them."""
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    chosen = [
        names
        for names in combinations()
        if any(text.lower() in names[0].lower() for text in args.pipelines)
        and any(text.lower() in names[2].lower() for text in args.features)
        and not (args.missing and names in cells)
    ]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(chosen))
        for names in chosen:
            progress.update(task, description=f"{names[0]}, {names[2]}")
            cells[names] = measured(*names)
            write(cells)
            progress.advance(task)


def combinations() -> Iterator[Key]:
    """Pipeline, style and feature of every cell, in the order of the record."""
    for pipeline in TINY:
        for feature in FEATURES:
            for style in STYLES:
                yield pipeline, style, feature
    for pipeline, style in sorted(WITH_INDUCTOR):
        yield pipeline, style, INDUCTOR


def measured(pipeline: str, style: str, feature: str) -> Cell:
    names = {"pipeline": pipeline, "style": style, "feature": feature}
    inner = "inductor" if feature == INDUCTOR else "eager"
    what = FEATURES[PLAIN if feature == INDUCTOR else feature]
    try:
        cell = measure(TINY[pipeline], style, what, inner, change=feature == PLAIN)
    except NotOfferedError as error:
        return names | {"not_offered": str(error), "problems": []}
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return names | {"problems": [text]}
    return asdict(cell) | names | {"problems": cell.problems}


def key(cell: Cell) -> Key:
    return cell["pipeline"], cell["style"], cell["feature"]


def load() -> dict[str, Any]:
    return records.read(RECORD)


def write(cells: dict[Key, Cell]) -> None:
    record = {
        "environment": records.environment("python -m benchmarks.pipelines", *PACKAGES),
        "options": OPTIONS,
        "steps": STEPS,
        "cells": [cells[names] for names in combinations() if names in cells],
    }
    records.write(RECORD, record)


def page(record: dict[str, Any], old: str) -> str:
    """The page with the matrix of this record, and what its rows mean."""
    notes = [f"- {feature.name}: {feature.note}" for feature in FEATURES.values() if feature.note]
    text = _replaced(old, BEGIN, matrix(record))
    return _replaced(text, BEGIN_ROWS, "\n".join(notes))


def _replaced(page: str, begin: str, text: str) -> str:
    """The page with `text` between the line `begin` and the end mark after it."""
    pattern = re.escape(begin) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda match: f"{begin}\n{text}\n{END}", page, flags=re.DOTALL)


def matrix(record: dict[str, Any]) -> str:
    about = record["environment"]
    cells = {key(cell): cell for cell in record["cells"]}
    good = [cell for cell in cells.values() if "replaced" in cell and not cell["problems"]]
    missing = [cell for cell in cells.values() if "not_offered" in cell]
    wrong = [cell for cell in cells.values() if cell["problems"]]
    worst = max((cell["difference"] for cell in good), default=0.0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    notes: dict[str, str] = {}
    lines = [
        f"{versions}; Python {about['python']}, {about['date'][:10]}, commit {about['commit']}; "
        f"{record['steps']} denoising steps in float32 on a CPU.",
        f"{len(good)} combinations run, replace every self-attention over latents, and give the "
        f"latents of the dense pipeline at sparsity 0: the largest relative distance is "
        f"{worst:.0e}, {TOLERANCE:.0e} is allowed. {len(missing)} are not offered by diffusers, "
        f"{len(wrong)} fail.",
    ]
    for style in STYLES:
        head = [name.removesuffix("Pipeline") for name in TINY]
        lines += [
            "",
            f"`{style}`:",
            "",
            f"| | {' | '.join(head)} |",
            "|---" * (len(head) + 1) + "|",
        ]
        for feature in [*FEATURES, INDUCTOR]:
            row = [_cell((name, style, feature), cells, notes) for name in TINY]
            lines.append(f"| {feature} | {' | '.join(row)} |")
    lines += ["", "Replaced calls of all self-attention calls over the steps.", ""]
    lines += [f"{mark}. {text}" for text, mark in notes.items()]
    return "\n".join(lines)


def _cell(names: Key, cells: dict[Key, Cell], notes: dict[str, str]) -> str:
    cell = cells.get(names)
    if cell is None:
        wanted = names[2] != INDUCTOR or names[:2] in WITH_INDUCTOR
        return "not measured" if wanted else ""
    if "not_offered" in cell:
        return "none" + _mark(f"Fails without us as well: {cell['not_offered']}.", notes)
    if cell["problems"]:
        return "**fails**" + _mark("; ".join(cell["problems"]), notes)
    text = f"{cell['replaced']} of {cell['attention']}"
    if cell["used"] != cell["style"]:
        reason = cell["remark"].partition(": ")[2] or cell["remark"]
        text += _mark(f"By `{cell['used']}`, because with any backend: {reason}.", notes)
    return text


def _mark(text: str, notes: dict[str, str]) -> str:
    return f" ({notes.setdefault(text, str(len(notes) + 1))})"


if __name__ == "__main__":
    raise SystemExit(main())
