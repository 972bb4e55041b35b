"""A progress bar from rich, or nothing where rich is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

_Item = TypeVar("_Item")


class Progress:
    """Counts items; this one shows nothing."""

    def track(self, items: Sequence[_Item], description: str) -> Iterator[_Item]:
        yield from items


class _Bar(Progress):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def track(self, items: Sequence[_Item], description: str) -> Iterator[_Item]:
        yield from self._bar.track(items, description=description)


@contextmanager
def progress(show: bool) -> Iterator[Progress]:
    try:
        from rich.progress import Progress as RichProgress
    except ImportError:
        show = False
    if not show:
        yield Progress()
        return
    with RichProgress() as bar:
        yield _Bar(bar)
