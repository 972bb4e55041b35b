"""What ran: compiled graphs report their decisions to whoever listens.

A report made while compiling would miss graphs that came from a cache and count a graph that three
blocks share once. So the callable that the backend returns tells, when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..ops import observation
from ..passes import Decision


@dataclass
class Recording:
    """The graphs that ran while it was active, and the decisions taken in them, in order.

    `inside` is true while one of them runs; `notes` are what else a user should know, in words.
    """

    graphs: int = 0
    inside: bool = False
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
class Tally:
    """Every graph that was compiled while it was active, and how often it ran, in any thread."""

    graphs: list[list[Decision]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


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


def _tallied(
    compiled: Callable[..., Any], decisions: list[Decision], counted: Tally
) -> Callable[..., Any]:
    place = len(counted.graphs)
    counted.graphs.append(decisions)
    counted.calls.append(0)

    def run(*args: Any) -> Any:
        counted.calls[place] += 1
        return compiled(*args)

    return run


def recorded(compiled: Callable[..., Any], decisions: list[Decision]) -> Callable[..., Any]:
    """`compiled`, which also tells an active recording what it contains."""
    for counted in _tallies:
        compiled = _tallied(compiled, decisions, counted)

    def observed(*args: Any) -> Any:
        if not observation.active():
            return compiled(*args)
        with observation.inside_graph([d for d in decisions if d.replaced]):
            return compiled(*args)

    def run(*args: Any) -> Any:
        active = _active.get()
        if active is None:
            return observed(*args)
        active.graphs += 1
        active.decisions += decisions
        active.inside = True
        try:
            return observed(*args)
        finally:
            active.inside = False

    return run
