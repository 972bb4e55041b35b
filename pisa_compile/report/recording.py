"""What ran: compiled graphs report their decisions to whoever listens.

A report made while compiling would miss graphs that came from a cache and count a graph that three
blocks share once. So the callable that the backend returns tells, when it is called.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..ops import observation
from ..passes import Decision


@dataclass
class Recording:
    """The graphs that ran while it was active, and the decisions taken in them, in order.

    `inside` is true while one of them runs; `notes` are what else a user should know, in words;
    `patterns` are the names of modules that policies of the compile calls are for.
    """

    graphs: int = 0
    inside: bool = False
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    patterns: dict[str, None] = field(default_factory=dict)

    @property
    def idle_patterns(self) -> list[str]:
        """Those that stand around no attention in the graphs that ran."""
        paths = {path for decision in self.decisions for _, path in decision.modules}
        return [name for name in self.patterns if not fnmatch.filter(paths, name)]

    def add(self, runs: GraphRuns) -> None:
        self.graphs += runs.runs
        for decision, count in runs.counted():
            self.decisions += [decision] * count


_active: ContextVar[Recording | None] = ContextVar("pisa_compile_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Collect the decisions of every graph of ours that runs inside, in this thread."""
    token = _active.set(Recording())
    try:
        active = _active.get()
        assert active is not None
        yield active
    finally:
        _active.reset(token)


def note(text: str) -> None:
    """Tell an active recording something, once."""
    active = _active.get()
    if active is not None and text not in active.notes:
        active.notes.append(text)


@dataclass
class GraphRuns:
    """How often a compiled graph ran, and the calls of its ops by the number of their decision."""

    decisions: Sequence[Decision]
    runs: int = 0
    calls: Counter[int] = field(default_factory=Counter)

    def counted(self) -> list[tuple[Decision, int]]:
        """Every decision with how often the attention ran.

        Ops that run whenever their graph does are not counted one by one: a CUDA graph replays them
        without a word. In control flow only the calls tell; of attention that stays dense there
        nobody knows, and it counts as run.
        """
        return [
            (decision, self.calls[number] if counts_by_call(decision) else self.runs)
            for number, decision in enumerate(self.decisions)
        ]


def counts_by_call(decision: Decision) -> bool:
    return decision.replaced and decision.conditional


@dataclass
class Tally:
    """Every graph that was compiled while it was active, in any thread."""

    graphs: list[GraphRuns] = field(default_factory=list)


_tallies: list[Tally] = []


@contextmanager
def tally() -> Iterator[Tally]:
    """Count for a whole program what `recording` lists for one call."""
    counted = Tally()
    _tallies.append(counted)
    try:
        yield counted
    finally:
        _tallies.remove(counted)


class Recorded:
    """A compiled graph that tells whoever listens what it contains when it is called."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        decisions: Sequence[Decision],
        note: str | None = None,
        patterns: Sequence[str] = (),
    ) -> None:
        self._compiled = compiled
        self._decisions = decisions
        self._note = note
        self._patterns = patterns
        self._tallied = [GraphRuns(decisions) for _ in _tallies]
        for counted, runs in zip(_tallies, self._tallied, strict=True):
            counted.graphs.append(runs)

    def __call__(self, *args: Any) -> Any:
        active = _active.get()
        if active is None and not self._tallied and not observation.observers_wait():
            return self._compiled(*args)
        with observation.inside_graph(self._decisions) as running:
            if active is not None:
                active.inside = True
                active.patterns |= dict.fromkeys(self._patterns)
                if self._note is not None:
                    note(self._note)
            try:
                return self._compiled(*args)
            finally:
                own = GraphRuns(self._decisions, 1, Counter(running.numbers))
                for runs in self._tallied:
                    runs.runs += 1
                    runs.calls += own.calls
                if active is not None:
                    active.inside = False
                    active.add(own)
