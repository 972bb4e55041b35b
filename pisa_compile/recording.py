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

from .passes import Decision


@dataclass
class Recording:
    """The graphs that ran while it was active, and the decisions taken in them, in order."""

    graphs: int = 0
    decisions: list[Decision] = field(default_factory=list)


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


def recorded(compiled: Callable[..., Any], decisions: list[Decision]) -> Callable[..., Any]:
    """`compiled`, which also tells an active recording what it contains."""

    def run(*args: Any) -> Any:
        active = _active.get()
        if active is not None:
            active.graphs += 1
            active.decisions += decisions
        return compiled(*args)

    return run
