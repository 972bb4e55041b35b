"""Who wants to see the op's calls as they run, or change them: calibration, delivered density, ...

Nothing is observed by default, and then a call costs a look at two context variables. Observers are
local to a thread. Calls that a CUDA graph replays do not come through Python and are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..kernels.params import AttentionParams


@dataclass(frozen=True)
class OpCall:
    """One call of the op.

    Attributes:
        site: the decision (`passes.Decision`) that put the op there, None for `pisa.attention`
            outside of a compiled graph.
        query, key, value: [B, H, Tq, D], [B, G, Tk, D], [B, G, Tk, E].
        key_mask: boolean [B, Tk] or None.
        params, density, permutation: as the kernels were told.
        out: [B, H, Tq, E].
    """

    site: Any
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    params: AttentionParams
    density: Tensor | None
    permutation: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class Running:
    """A compiled graph that runs: its decisions, and the numbers of those whose op was called."""

    decisions: Sequence[Any]
    numbers: list[int] = field(default_factory=list)


Observer = Callable[[OpCall], None]
DensityOf = Callable[[Any, AttentionParams], Tensor | None]
"""From a site and its settings to the density that a call of it gets, None to leave it alone."""
_densities: ContextVar[DensityOf | None] = ContextVar("pisa_compile_densities", default=None)
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("pisa_compile_observers", default=())
_running: ContextVar[Running | None] = ContextVar("pisa_compile_running", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """OpCall `observer` after every call of the op inside, in this thread."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


@contextmanager
def densities_from(density_of: DensityOf) -> Iterator[None]:
    """Give calls of the op inside the densities that `density_of` says, without compiling again."""
    token = _densities.set(density_of)
    try:
        yield
    finally:
        _densities.reset(token)


def observers_wait() -> bool:
    """Whether anybody wants to see or to change the calls of this thread."""
    return bool(_observers.get()) or _densities.get() is not None


def active() -> bool:
    """Whether a call of the op has to be told."""
    return observers_wait() or _running.get() is not None


@contextmanager
def inside_graph(decisions: Sequence[Any]) -> Iterator[Running]:
    """While a compiled graph runs that the decisions were taken in."""
    running = Running(decisions)
    token = _running.set(running)
    try:
        yield running
    finally:
        _running.reset(token)


def called(site: int | None, calls: Tensor | None) -> Any:
    """The decision that put the op there that is called now, None outside of compiled graphs.

    Args:
        site, calls: as the op was told. A vector `calls` is read on the host.
    """
    running = _running.get()
    if running is None or site is None:
        return None
    number = site if calls is None else int(calls[site])
    running.numbers.append(number)
    return running.decisions[number]


def density_for(site: Any, params: AttentionParams, density: Tensor | None) -> Tensor | None:
    """The density of a call: the one it came with, or what somebody else decided."""
    density_of = _densities.get()
    chosen = None if density_of is None else density_of(site, params)
    return density if chosen is None else chosen


def notify(**call: Any) -> None:
    """Tell the observers of one call of the op."""
    seen = OpCall(**call)
    for observer in _observers.get():
        observer(seen)
