"""Densities that change from call to call: one more input of a rewritten graph.

Ops whose schedule varies are marked when they are emitted. Once the walk is over, their densities
become the rows of one table, a graph input after all others, and every marked op reads its row.
So a step that changes costs a tensor, and neither a compilation nor a look from the host at the
device. An attribute of the graph would not do: copies of a model share compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...policies.schedule import Schedule
from ..graph.emit import emit
from ..graph.fake import example
from .regions import OPEN_CALLS

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
    def width(self) -> int | None:
        """Numbers in a row of the table."""
        return None if self.table is None else self.table.shape[1]


def add_density_input(gm: fx.GraphModule) -> DensityInput | None:
    """Give `gm` the input that its scheduled ops need. None if it has no such ops."""
    ops = list(_marked(gm))
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
    with first.fake_mode:
        table = torch.empty(len(rows), width, dtype=torch.float32, device=first.device)
    _Threading({node: row for row, node in enumerate(ops)}, table).graph(gm)
    return DensityInput(rows, table, first.device)


def _marked(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if MARK in node.meta)


class _Threading:
    """Leads the table from the input of the outermost graph to every op."""

    def __init__(self, rows: dict[fx.Node, int], table: Tensor) -> None:
        self.rows = rows
        self.table = table
        self.done: set[fx.GraphModule] = set()

    def graph(self, gm: fx.GraphModule) -> None:
        table = self.input(gm)
        for node in list(gm.graph.nodes):
            if node in self.rows:
                self.op(node, table)
            elif child := self.child(gm, node):
                node.args = (*node.args, table)
                if child not in self.done:
                    self.done.add(child)
                    self.graph(child)
        gm.recompile()

    def child(self, gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
        """The graph that `node` calls, if it needs the table."""
        if node.target not in OPEN_CALLS:
            return None
        body = node.args[0]
        assert isinstance(body, fx.Node)
        child = gm.get_submodule(str(body.target))
        assert isinstance(child, fx.GraphModule)
        return child if child in self.done or any(True for _ in _marked(child)) else None

    def input(self, gm: fx.GraphModule) -> fx.Node:
        inputs = gm.graph.find_nodes(op="placeholder")
        first = next(iter(gm.graph.nodes))
        place = gm.graph.inserting_after(inputs[-1]) if inputs else gm.graph.inserting_before(first)
        with place:
            node = gm.graph.placeholder("pisa_density")
        node.meta["example_value"] = self.table
        # AOTAutograd asks where in the user's frame an input comes from: from nowhere.
        node._dynamo_source = None
        return node

    def op(self, node: fx.Node, table: fx.Node) -> None:
        scheduled, device = node.meta.pop(MARK), example(node).device
        with node.graph.inserting_before(node):
            density = emit(table, torch.select, (table, 0, self.rows[node]), {})
            if scheduled.schedule.heads is None:
                density = emit(table, torch.select, (density, 0, 0), {})
            else:
                density = emit(table, torch.narrow, (density, 0, 0, scheduled.schedule.heads), {})
            if device != self.table.device:
                density = emit(table, "to", (density, device), {})
        node.kwargs = {**node.kwargs, "density": density}
