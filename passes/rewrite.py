"""A rewrite is one class: match a spelling of attention, check it, rewrite it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import fx

from ..policy import Policy
from .eligibility import refusal
from .site import AttentionSite
from .substitute import substitute


class AttentionRewrite(ABC):
    """One spelling of attention. `match` knows the spelling; the rest works on neutral records."""

    @abstractmethod
    def match(self, node: fx.Node) -> AttentionSite | None:
        """The attention whose result `node` computes, or None. Changes nothing."""

    def check(self, site: AttentionSite, policy: Policy) -> str | None:
        """Why the site must stay dense, in words for a user, or None."""
        return refusal(site, policy)

    def rewrite(self, site: AttentionSite, policy: Policy) -> None:
        """Substitute piecewise sparse attention for the site."""
        substitute(site, policy)
