"""Who wants to see the op's calls as they run, or change them: calibration, delivered density, ...

Nothing is observed by default, and then a call costs a look at two context variables. Observers are
local to a thread. Calls that a CUDA graph replays do not come through Python and are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels.params import AttentionParams


@dataclass(frozen=True)
class Call:
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


Observer = Callable[[Call], None]
DensityOf = Callable[[Any, AttentionParams], Tensor | None]
"""From a site and its settings to the density that a call of it gets, None to leave it alone."""
_densities: ContextVar[DensityOf | None] = ContextVar("pisa_compile_densities", default=None)
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("pisa_compile_observers", default=())
_sites: ContextVar[Iterator[Any] | None] = ContextVar("pisa_compile_sites", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer` after every call of the op inside, in this thread."""
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


def active() -> bool:
    return bool(_observers.get()) or _densities.get() is not None


@contextmanager
def inside_graph(sites: Sequence[Any]) -> Iterator[None]:
    """While a compiled graph runs: the sites whose ops it calls, in the order of the graph."""
    token = _sites.set(iter(sites))
    try:
        yield
    finally:
        _sites.reset(token)


def next_site() -> Any:
    """The site of the op that is called now; to be asked once per call."""
    sites = _sites.get()
    return None if sites is None else next(sites, None)


def density_for(site: Any, params: AttentionParams, density: Tensor | None) -> Tensor | None:
    """The density of a call: the one it came with, or what somebody else decided."""
    density_of = _densities.get()
    chosen = None if density_of is None else density_of(site, params)
    return density if chosen is None else chosen


def notify(**call: Any) -> None:
    """Tell the observers of one call of the op."""
    seen = Call(**call)
    for observer in _observers.get():
        observer(seen)
