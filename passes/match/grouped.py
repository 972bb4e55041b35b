"""Grouped queries: keys and values that were copied for every query head before the attention.

The op reads shared heads itself, so the copies (`repeat_interleave`, or `expand` and `reshape`) are
passed over and the small tensors read.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..graph.axes import Axes, Dims
from ..graph.calls import call_of
from ..graph.fake import example, is_tensor
from ..graph.operations import ALIASES, REARRANGEMENTS
from ..graph.writes import Writes
from ..sites.site import AttentionSite, View

_COPIES = {"expand", "repeat_interleave"}
_MOVES = REARRANGEMENTS | ALIASES | {"getitem"}
_LENGTH = 8  # operations from the small tensor to the attention


def without_copies(site: AttentionSite, writes: Writes) -> AttentionSite:
    """The site with shared key and value heads, or the same site if they are not copies."""
    if site.enable_gqa:
        return site
    key, value = (_uncopied(view, site.node, writes) for view in (site.key, site.value))
    if key is None or value is None or key.example().shape[1] != value.example().shape[1]:
        return site
    skipped = [*_chain(site.key.node), *_chain(site.value.node)]
    return replace(site, key=key, value=value, enable_gqa=True, interior=(*site.interior, *skipped))


def _chain(node: fx.Node) -> list[fx.Node]:
    """The views and copies that end in `node`, first one first, from just before a copy on."""
    chain: list[fx.Node] = []
    while len(chain) < _LENGTH:
        call = call_of(node)
        if call is None or call.name not in _MOVES or call.in_place or not is_tensor(call.args[0]):
            break
        chain.insert(0, node)
        node = call.args[0]
    copies = [i for i, link in enumerate(chain) if _name(link) in _COPIES]
    if not copies:
        return []
    # `expand` needs the new dimension that the call before it made.
    return chain[max(copies[0] - (_name(chain[copies[0]]) == "expand"), 0) :]


def _name(node: fx.Node) -> str:
    call = call_of(node)
    return "" if call is None else call.name


def _uncopied(view: View, node: fx.Node, writes: Writes) -> View | None:
    """The view of the tensor before its heads were copied, [B, G, T, D], or None."""
    chain = _chain(view.node)
    if not chain:
        return None
    source = chain[0].args[0]
    if not is_tensor(source) or writes.between(source, source, node):
        return None
    axes = Axes()
    given = axes.fresh(example(source).shape)
    dims: Dims | None = given
    for link in chain:
        call = call_of(link)
        assert call is not None
        if dims is not None:
            dims = axes.through(call, dims, example(call.args[0]), example(link))
    dims = None if dims is None else view.through(axes, dims)
    if dims is None:
        return None
    heads = axes.resolve(dims)[1]
    copied = {atom for group in axes.resolve(dims) for atom in group} & axes.repeats
    # Neighbouring heads share: the copies must be the innermost axis of the heads.
    if len(copied) != 1 or not heads or heads[-1] not in copied:
        return None
    wanted = tuple(tuple(a for a in group if a not in copied) for group in axes.resolve(dims))
    steps = axes.steps(given, wanted)
    return None if steps is None else View(source, steps)
