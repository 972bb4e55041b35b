"""What can be told of a mask without looking at its values, by walking back through the graph.

Two facts: which numbers its elements can be, and along which of its dimensions it can vary.
"""

from __future__ import annotations

from torch import fx

from ..graph.writes import Writes
from .domain import Values as Values
from .levels import NEGLIGIBLE as NEGLIGIBLE
from .values import ValueFacts
from .varying import VaryingFacts


class MaskFacts:
    """Facts about the masks of one graph."""

    def __init__(self, writes: Writes) -> None:
        self._values = ValueFacts(writes)
        self._varying = VaryingFacts(writes, self._values)

    def values(self, node: fx.Node) -> Values | None:
        """The few numbers that elements of `node` can be, or None if they can be others."""
        return self._values.values(node)

    def varying(self, node: fx.Node) -> tuple[bool, ...]:
        """For each dimension, whether elements may differ along it."""
        return self._varying.varying(node)

    def adopt(self, node: fx.Node, other: MaskFacts, source: fx.Node) -> None:
        """Take what `other` knows of `source`, in another graph, for an input of this one."""
        self._values.adopt(node, other._values.domain(source))
        self._varying.adopt(node, other.varying(source))
