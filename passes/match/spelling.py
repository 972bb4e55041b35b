"""A spelling is one class: it finds attention that is written in its way. The rest is the same for
all, and works on neutral records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from ..graph.writes import Writes
from ..masks.analysis import MaskAnalysis
from ..sites.site import AttentionSite, NearMiss
from ..tokens.plan import Tokens


@dataclass(frozen=True)
class GraphFacts:
    """What is known of one graph.

    Attributes:
        gradients: whether any will be asked for; None if the tensors' `requires_grad` tells.
    """

    writes: Writes
    masks: MaskAnalysis
    tokens: Tokens
    gradients: bool | None

    @classmethod
    def of(cls, graph: fx.Graph, gradients: bool | None) -> GraphFacts:
        writes = Writes(graph)
        return cls(writes, MaskAnalysis(writes), Tokens(), gradients)

    def hand_down(
        self, source: fx.Node, reader: fx.Node, inner: GraphFacts, given: fx.Node
    ) -> None:
        """Tell the facts of an inner graph what is known of one of its inputs.

        Args:
            source: the tensor that `reader`, which runs the inner graph, passes in.
            given: the input that stands for it there.
        """
        self.masks.hand_down(source, reader, inner.masks, given)
        inner.tokens.origins.hand_down(source, given)


class Spelling(ABC):
    @abstractmethod
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        """The attention that is anchored at `node`, or None. Changes nothing."""
