"""What a compiled graph with a schedule is called through: it gets the densities of the step.

Nothing here is traced. The step is looked up when the graph is called, and becomes a tensor on the
graph's device, which is kept: a step that comes again costs no copy and no synchronisation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .passes import Scheduled
from .policies.schedule import Step, Values
from .report.recording import note
from .steps.clock import current_step

log = logging.getLogger("pisa_compile")

_NO_STEP = (
    "a schedule depends on the denoising step and no step is known, so its settings without steps "
    "hold; make the step known with pisa.attach(pipeline), pisa.denoising or pisa.set_step"
)


def stepwise(
    sparse: Callable[..., Any],
    dense: Callable[..., Any] | None,
    rows: Sequence[Scheduled],
    width: int | None,
    device: torch.device,
) -> Callable[..., Any]:
    """A callable that runs the variant of the current step.

    Args:
        sparse: the compiled graph. With a `width`, it takes a table of densities [rows, width] on
            `device` after its other arguments.
        dense: the same graph with dense attention in the place of its scheduled ops, for steps at
            which all of them are dense.
        rows: the schedules of those ops.
    """

    @functools.lru_cache(maxsize=1024)
    def densities(step: Step | None) -> tuple[Values, ...]:
        return tuple(row.schedule.densities(step, row.sparsity) for row in rows)

    @functools.lru_cache(maxsize=1024)
    def known(step: Step | None) -> bool:
        return all(row.schedule.knows(step) for row in rows)

    def run(*args: Any) -> Any:
        step = current_step()
        if not known(step):
            _warn_once()
            note(_NO_STEP)
        values = densities(step)
        if dense is not None and all(min(row) >= 1.0 for row in values):
            return dense(*args)
        if width is None:
            return sparse(*args)
        return sparse(*args, _table(values, width, device))

    return run


@functools.cache
def _warn_once() -> None:
    log.warning("%s", _NO_STEP)


@functools.lru_cache(maxsize=1024)
def _table(rows: tuple[Values, ...], width: int, device: torch.device) -> Tensor:
    full = [(*row, *row[-1:] * (width - len(row))) for row in rows]
    # Made under inference mode it could not be used outside of it.
    with torch.inference_mode(False):
        return torch.tensor(full, dtype=torch.float32).to(device)
