"""Tokens that ranks exchange before attention, so that each sees all of them for some heads.

A rank's share of a joint sequence is a share of the text and a share of the image. After the
exchange these alternate, and a range that counts tokens from the start of the sequence means others
than on a single process. The axes that the exchange merges are ranks and shares, and no picture.
"""

from __future__ import annotations

from torch import fx

from ..graph.calls import call_of
from ..graph.fake import example, is_tensor
from ..graph.operations import ADDITIONS, ALIASES, PERMUTATIONS, RESHAPES
from ..sites.site import AttentionSite
from .origins import TokenOrigins
from .steps import Joined, TokenAxis

_EXCHANGE = "all_to_all"
# What stands around an exchange: the heads that go to one rank are brought together.
_AROUND = RESHAPES | PERMUTATIONS | ADDITIONS | ALIASES | {"wait_tensor", "getitem"}
_MOST = 64  # more operations than any exchange takes


def exchanges_joint_shares(site: AttentionSite) -> bool:
    """Whether ranks exchanged tokens that each of them had joined from several sequences."""
    node = share_of_rank(site)
    return node is not None and _is_joint(node)


def share_of_rank(site: AttentionSite) -> fx.Node | None:
    """The rank's own queries before the exchange; None if there is no exchange."""
    node, exchanged = site.query.node, False
    for _ in range(_MOST):
        call = call_of(node)
        if call is None or not call.args or not is_tensor(call.args[0]):
            break
        if _EXCHANGE in call.name:
            exchanged = True
        elif call.name not in _AROUND:
            break
        node = call.args[0]
    return node if exchanged else None


def _is_joint(node: fx.Node) -> bool:
    """Whether a rank's own tokens, [B, T, H, D] or [B, H, T, D], are joined along T."""
    if not is_tensor(node) or example(node).dim() != 4:
        return False
    origins = TokenOrigins()
    return any(isinstance(origins.of(TokenAxis(node, dim)), Joined) for dim in (1, 2))
