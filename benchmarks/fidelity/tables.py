"""The tables of docs/fidelity.md, and what is printed at the end of a run."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from . import metrics, pictures, timing
from .methods import BY_NAME, FINE, OURS, PAPER

Rows = list[list[str]]


def write(record: dict[str, Any], document: Path) -> None:
    """Replace what stands between `<!-- table NAME -->` and `<!-- end -->` in the document."""
    text = document.read_text()
    for name, (header, rows) in _tables(record).items():
        lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        found = list(re.finditer(rf"<!-- table {name} -->\n(.*?)<!-- end -->", text, re.DOTALL))
        if len(found) != 1:
            raise ValueError(f"{document}: expected one place for table {name}, found {len(found)}")
        start, end = found[0].span(1)
        text = f"{text[:start]}{table}\n{text[end:]}"
    document.write_text(text)


def terminal(record: dict[str, Any]) -> Iterator[Table]:
    """The same tables for a terminal."""
    for name, (header, rows) in _tables(record).items():
        table = Table(title=name)
        for index, column in enumerate(header):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        yield table


def _tables(record: dict[str, Any]) -> dict[str, tuple[list[str], Rows]]:
    found: dict[str, tuple[list[str], Rows]] = {}
    if "operator" in record:
        found["errors"] = _errors(record["operator"]["rows"], "captured")
        found["structured"] = _errors(record["operator"]["rows"], "structured")
        found["adversarial"] = _adversarial(record["operator"]["rows"])
    if "pictures" in record:
        found["pictures"] = _pictures(record["pictures"]["rows"])
    if "timing" in record:
        found["time"] = _time(record["timing"])
    return found


def ratios(
    rows: list[dict[str, Any]], name: str, group: str, order: str, density: float, of: str = PAPER
) -> list[float]:
    """Error of a method as a multiple of that of another, head by head."""
    by_name = {
        row["method"]: row["error"]
        for row in rows
        if (row["group"], row["order"], row["density"]) == (group, order, density)
    }
    pairs = zip(by_name.get(name, []), by_name[of], strict=False)
    return [a / b for a, b in pairs if b > 0]


def _errors(rows: list[dict[str, Any]], group: str) -> tuple[list[str], Rows]:
    """Geometric mean of the error as a multiple of the paper's, worst head in brackets."""
    places = sorted({(r["order"], r["density"]) for r in rows if r["group"] == group})
    header = [
        "multiple of PISA hybrid's error",
        *(f"{order} {density:g}" for order, density in places),
    ]
    lines = []
    for name, method in BY_NAME.items():
        line = [f"**{method.label}**" if name in (OURS, FINE) else method.label]
        for order, density in places:
            values = ratios(rows, name, group, order, density)
            cell = f"{metrics.geometric_mean(values):.2f} [{max(values):.2f}]" if values else ""
            line.append(cell)
        lines.append(line)
    for name in (OURS, FINE):
        line = [f"{BY_NAME[name].label}, multiple of block-sparse top-k's"]
        for place in places:
            line.append(f"{metrics.geometric_mean(ratios(rows, name, group, *place, 'topk')):.3f}")
        lines.append(line)
    paper = ["PISA hybrid's error"]
    for place in places:
        errors = next(
            r["error"]
            for r in rows
            if (r["group"], r["order"], r["density"], r["method"]) == (group, *place, PAPER)
        )
        paper.append(f"{metrics.geometric_mean(errors):.4f}")
    return header, [*lines, paper]


def _adversarial(rows: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    chosen = {
        row["method"]: row
        for row in rows
        if (row["group"], row["order"], row["density"]) == ("adversarial", "hilbert", 0.15)
    }
    names = ["topk", "sol", PAPER, OURS, FINE]
    header = [
        "relative L2 at density 0.15",
        *(BY_NAME[n].label for n in names),
        "corrected / paper",
        "keys by 32 / paper",
    ]
    lines = []
    for index, place in enumerate(chosen[PAPER]["head"]):
        errors = [chosen[name]["error"][index] for name in names]
        paper = errors[names.index(PAPER)]
        ratios = [errors[names.index(name)] / paper if paper else 1.0 for name in (OURS, FINE)]
        cells = [*(f"{error:.4f}" for error in errors), *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append([place, *cells])
    return header, lines


def _pictures(rows: list[dict[str, Any]]) -> tuple[list[str], Rows]:
    header = ["", "PSNR, dB", "corrected minus this", "keys by 32 minus this", "SSIM"]
    at = {r["method"]: r for r in rows if r["density"] in (pictures.DENSITY, 1.0)}
    lines = []
    for name in sorted(at, key=lambda name: statistics.fmean(at[name]["psnr_db"])):
        row = at[name]
        label = pictures.FLOORS.get(name) or BY_NAME[name].label
        mean, half = metrics.mean_interval(row["psnr_db"])
        cells = [f"**{label}**" if name in (OURS, FINE) else label, f"{mean:.2f} ± {half:.2f}"]
        for ours in (OURS, FINE):
            if ours in at and name != ours and name in BY_NAME:
                paired = [a - b for a, b in zip(at[ours]["psnr_db"], row["psnr_db"], strict=True)]
                cells.append("{:+.2f} ± {:.2f}".format(*metrics.mean_interval(paired)))
            else:
                cells.append("")
        lines.append([*cells, "{:.4f} ± {:.4f}".format(*metrics.mean_interval(row["ssim"]))])
    return header, lines


def _time(times: dict[str, Any]) -> tuple[list[str], Rows]:
    calls = {(row["method"], row["density"]): row for row in times["calls"]}
    steps = timing.speedups(times["steps"])
    header = ["density 0.15", "CPU ms per call", "p20 to p80", "of hybrid", "step, times faster"]
    lines = []
    for (name, density), row in calls.items():
        if density in (0.15, 1.0):
            label = BY_NAME[name].label if name in BY_NAME else "dense"
            p20, median, p80 = (1e3 * row[q] for q in ("p20", "median", "p80"))
            ratio = f"{row['of_hybrid']:.3f}" if "of_hybrid" in row else ""
            spread = f"{p20:.1f} to {p80:.1f}"
            lines.append([label, f"{median:.1f}", spread, ratio, f"{steps[name, density]:.2f}"])
    for name, what in ((OURS, "corrected"), (FINE, "keys by 32")):
        longer = timing.slowdown(times["calls"], name)
        line = f"{what} longer than hybrid, mean of all densities"
        lines.append([line, "", "", f"{longer:+.1%}", ""])
    return header, lines
