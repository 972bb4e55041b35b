"""Densities that change from call to call: one more input of a rewritten graph.

Ops whose schedule varies are marked when they are emitted. Once the walk is over, their densities
become the rows of one table, a graph input after all others, and every marked op reads its row.
So a step that changes costs a tensor, and neither a compilation nor a look from the host at the
device. An attribute of the graph would not do: copies of a model share compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...policies.schedule import Schedule
from ..graph.emit import emit
from ..graph.fake import example
from .threading import Threading, empty_like_on, nodes_of

MARK = "pisa_scheduled"
# Rows start at multiples of 16 bytes: Triton compiles again for a pointer that does not.
_ROW_MULTIPLE = 4


@dataclass(frozen=True)
class Scheduled:
    """The schedule of one op, and the sparsity where it leaves that open."""

    schedule: Schedule
    sparsity: float


@dataclass(frozen=True)
class DensityInput:
    """What a rewritten graph is told at every call.

    Attributes:
        rows: the schedules of its ops.
        table: a fake example [rows, width] of the graph's last argument, in which each op has a
            row of densities; None if the graph takes none, because its ops differ from step to
            step in nothing but all being dense.
        device: where the graph reads it.
    """

    rows: tuple[Scheduled, ...]
    table: Tensor | None
    device: torch.device

    @property
    def has_dense_steps(self) -> bool:
        return any(row.schedule.has_dense_steps for row in self.rows)

    @property
    def width(self) -> int | None:
        """Numbers in a row of the table."""
        return None if self.table is None else self.table.shape[1]

    def without_trace(self) -> DensityInput:
        """The same with an example that belongs to no trace, so that it can be pickled."""
        if self.table is None:
            return self
        example = torch.empty(self.table.shape, dtype=self.table.dtype, device="meta")
        return replace(self, table=example)


def add_density_input(gm: fx.GraphModule) -> DensityInput | None:
    """Give `gm` the input that its scheduled ops need. None if it has no such ops."""
    ops = [node for node in nodes_of(gm) if MARK in node.meta]
    if not ops:
        return None
    first = example(ops[0])
    rows = tuple(node.meta[MARK] for node in ops)
    if len(set(rows)) == 1 and rows[0].schedule.constant_when_sparse(rows[0].sparsity):
        for node in ops:
            del node.meta[MARK]
        return DensityInput(rows, None, first.device)
    widest = max(scheduled.schedule.heads or 1 for scheduled in rows)
    width = -(-widest // _ROW_MULTIPLE) * _ROW_MULTIPLE
    table = empty_like_on(ops[0], len(rows), width, dtype=torch.float32)
    _Densities({node: row for row, node in enumerate(ops)}, table).lead(gm, table)
    return DensityInput(rows, table, first.device)


class _Densities(Threading):
    name = "pisa_density"

    def __init__(self, rows: dict[fx.Node, int], table: Tensor) -> None:
        super().__init__()
        self._rows = rows
        self._table = table

    def reads(self, node: fx.Node) -> bool:
        return node in self._rows

    def read(self, node: fx.Node, given: fx.Node) -> None:
        scheduled, device = node.meta.pop(MARK), example(node).device
        with node.graph.inserting_before(node):
            density = emit(given, torch.select, (given, 0, self._rows[node]), {})
            if scheduled.schedule.heads is None:
                density = emit(given, torch.select, (density, 0, 0), {})
            else:
                density = emit(given, torch.narrow, (density, 0, 0, scheduled.schedule.heads), {})
            if device != self._table.device:
                density = emit(given, "to", (density, device), {})
        node.kwargs = {**node.kwargs, "density": density}
