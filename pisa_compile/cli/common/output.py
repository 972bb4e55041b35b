"""Reports on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from ...report.explain import Report, Site
from ...report.tables import TOP_LEVEL, rich_table


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def report_as_data(report: Report) -> dict[str, Any]:
    """A report in types that JSON knows."""
    return {
        "summary": report.summary,
        "graphs": report.graphs,
        "replaced": report.replaced,
        "flops_saved": report.flops_saved,
        "sites": [_site(site) for site in report.sites],
        "not_traced": [dataclasses.asdict(call) for call in report.not_traced],
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "module": site.module,
        "replaced": site.replaced,
        "reason": site.reason,
        "notes": list(site.notes),
        "policy": str(site.policy),
        "query_shape": list(site.query_shape),
        "key_shape": list(site.key_shape),
        "value_shape": list(site.value_shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "calls": site.calls,
        "flops": site.flops,
        "dense_flops": site.dense_flops,
    }


def print_report(report: Report, console: Console, *, every_site: bool = False) -> None:
    """The report as a table; sites that differ in their number alone share a line."""
    if every_site:
        console.print(report.__rich__())
    elif report.sites or report.not_traced:
        console.print(_grouped(report))
    console.print(report.summary, highlight=False)


def _grouped(report: Report) -> Table:
    rows: dict[tuple[str, ...], list[Site]] = {}
    for site in report.sites:
        shape = "x".join(map(str, site.query_shape))
        decision = "sparse" if site.replaced else "dense"
        key = (_pattern(site.module), shape, decision, site.why)
        rows.setdefault(key, []).append(site)
    lines = []
    for (module, shape, decision, why), sites in rows.items():
        calls = sum(site.calls for site in sites)
        lines.append((module, str(len(sites)), shape, str(calls), decision, why))
    for call in report.not_traced:
        shape = "x".join(map(str, call.query_shape))
        name = call.module or TOP_LEVEL
        lines.append((name, "", shape, str(call.calls), "not traced", call.reason))
    return rich_table(("module", "sites", "query", "calls", "decision", "why, policy"), lines)


def _pattern(module: str) -> str:
    """`blocks.17.attn` as `blocks.*.attn`, the spelling of `pisa.set_policy`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", module) or TOP_LEVEL


def table_of(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    return table
