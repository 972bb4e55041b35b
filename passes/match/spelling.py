"""A rewrite is one class: match a spelling of attention, check it, rewrite it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx

from ...policies.policy import Policy
from ..graph.writes import Writes
from ..judge.eligibility import refusal
from ..masks.padding import MaskAnalysis
from ..replace.substitute import substitute
from ..sites.site import AttentionSite, NearMiss
from ..tokens.plan import TokenPlan, Tokens
from .channels import channel_refusal


@dataclass(frozen=True)
class GraphFacts:
    """What the rewrites of one graph share.

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


class AttentionRewrite(ABC):
    """One spelling of attention. `match` knows the spelling; the rest works on neutral records."""

    @abstractmethod
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        """The attention that is anchored at `node`, or None. Changes nothing."""

    def check(self, site: AttentionSite, policy: Policy, facts: GraphFacts) -> str | None:
        """Why the site must stay dense, in words for a user, or None."""
        channels = channel_refusal(site) if policy.enabled else None
        return channels or refusal(site, policy, facts.masks, facts.gradients)

    def rewrite(self, site: AttentionSite, plan: TokenPlan, facts: GraphFacts) -> None:
        """Substitute piecewise sparse attention for a site that passed the check."""
        substitute(site, plan, facts.masks, facts.tokens)
