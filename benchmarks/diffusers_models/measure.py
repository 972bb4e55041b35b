"""One row of the support matrix: what a model's attention becomes, and whether it still computes
the same."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import pisa_compile as pisa

from .audit import Coverage, EagerCall, record_eager
from .case import Case, outputs

# Without presets, which keep some layers of known models dense: here all sites are to be found.
OPTIONS = {"min_tokens": 0, "block_size": 16, "preset": None}


class UntraceableError(RuntimeError):
    """No backend compiles this model, the one that does nothing included."""


@dataclass(frozen=True)
class Row:
    """Counts are of calls during one run of the model.

    Attributes:
        eager: attention calls in eager mode, of every kind.
        found: sites in traced graphs.
        replaced: sites that became sparse.
        kept: number of sites that stay dense, by reason.
        lost: calls in eager mode that no site stands for, by module.
        not_traced: what `explain` says of such calls, by module.
        advice: what it says to do about them.
        graph_breaks: of the pisa backend.
        added_graph_breaks: against `backend="eager"`.
        break_reasons: the first line of each break's explanation.
        difference: largest absolute output difference to the reference at sparsity 0.
        tolerance: what the difference may be, for outputs around 1.
        scale: largest absolute output.
        change: the same difference at sparsity 0.9, which shows that the op runs.
    """

    name: str
    eager: int
    found: int
    replaced: int
    kept: dict[str, int]
    lost: dict[str, int]
    not_traced: dict[str, int]
    advice: list[str]
    graph_breaks: int
    added_graph_breaks: int
    break_reasons: list[str]
    difference: float
    tolerance: float
    scale: float
    change: float
    seconds: float


def measure(case: Case, inner: str = "aot_eager", *, change: bool = True) -> Row:
    """Trace, compile and run one case.

    Args:
        case: the model and its inputs.
        inner: what compiles the rewritten graph. With "inductor" the outputs are compared with
            Inductor's, else with those of eager mode.
        change: also measure the output change at sparsity 0.9.

    Raises:
        UntraceableError: Dynamo itself fails on the model.
    """
    start = time.perf_counter()
    model = case.build()
    expected, calls = record_eager(model, case.inputs())
    if inner == "inductor":
        _reset()
        expected = _run(torch.compile(model), case)

    _reset()
    same = _compile(model, sparsity=0.0, inner=inner)
    try:
        report = pisa.explain(same, **case.inputs())
    except Exception:
        _raise_if_untraceable(model, case)
        raise
    breaks, reasons = _graph_breaks()
    difference = _difference(_run(same, case), expected)
    added = 0
    if breaks:
        _reset()
        _run(torch.compile(model, backend="eager"), case)
        added = breaks - _graph_breaks()[0]
    changed = 0.0
    if change and report.replaced:
        _reset()
        changed = _difference(_run(_compile(model, sparsity=0.9, inner="eager"), case), expected)
    _reset()
    return Row(
        name=case.name,
        **_counts(calls, report),
        graph_breaks=breaks,
        added_graph_breaks=added,
        break_reasons=reasons,
        difference=difference,
        tolerance=case.tolerance,
        scale=max(x.abs().max().item() for x in outputs(expected)),
        change=changed,
        seconds=round(time.perf_counter() - start, 1),
    )


def _counts(calls: list[EagerCall], report: pisa.Report) -> dict[str, Any]:
    coverage = Coverage.of(calls, report)
    kept: Counter[str] = Counter()
    for site in report.sites:
        if not site.replaced:
            kept[_without_sizes(site.reason)] += site.calls
    not_traced: Counter[str] = Counter()
    for call in report.not_traced:
        not_traced[call.module] += call.calls
    return {
        "eager": coverage.eager,
        "found": coverage.found,
        "replaced": sum(site.calls for site in report.sites if site.replaced),
        "kept": dict(kept),
        "lost": dict(coverage.lost),
        "not_traced": dict(not_traced),
        "advice": list(dict.fromkeys(call.reason for call in report.not_traced)),
    }


def _without_sizes(reason: str) -> str:
    """The same reason for sites that differ in their sizes alone."""
    stripped = re.sub(r" ?\([^()]*\d[^()]*\)", "", reason)
    return reason if stripped == reason else _without_sizes(stripped)


def _compile(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="pisa", options={**OPTIONS, **options})


def _raise_if_untraceable(model: nn.Module, case: Case) -> None:
    _reset()
    try:
        _run(torch.compile(model, backend="eager"), case)
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise UntraceableError(f"fails with backend='eager' too: {cause}") from error


@torch.no_grad()
def _run(model: nn.Module, case: Case) -> Any:
    return model(**case.inputs())


def _difference(actual: Any, expected: Any) -> float:
    pairs = zip(outputs(actual), outputs(expected), strict=True)
    return max((a - e).abs().max().item() for a, e in pairs)


def _graph_breaks() -> tuple[int, list[str]]:
    breaks = counters["graph_break"]
    return sum(breaks.values()), [text.strip().partition("\n")[0] for text in breaks]


def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()
