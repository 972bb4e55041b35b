"""Stand-ins for tensors that go with an attention, for those who ask for their shape alone.

A stand-in is one element, expanded: no memory for all pairs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph.emit import emit
from ..graph.fake import example, is_tensor
from ..graph.shape_readers import is_check, reads_shape, stand_in_sizes
from ..sites.site import AttentionSite


def give_stand_ins(site: AttentionSite) -> list[fx.Node]:
    """Let those who read the shapes of nodes that are about to go read stand-ins.

    Returns:
        The readers.
    """
    inside = {*site.interior, site.node}
    sources = (site.query.node, site.key.node)
    readers = []
    for node in site.interior:
        sizes = stand_in_sizes(node, sources) if is_tensor(node) else None
        for reader in [user for user in node.users if user not in inside]:
            if sizes is None or not reads_shape(reader, node):
                continue
            if is_check(reader):
                reader.graph.erase_node(reader)
                continue
            with reader.graph.inserting_before(reader):
                reader.replace_input_with(node, _stand_in(node, sizes, sources[0], reader))
            readers.append(reader)
    return readers


def _stand_in(node: fx.Node, sizes: list[Any], source: fx.Node, reader: fx.Node) -> fx.Node:
    like = reader if is_tensor(reader) else source
    model: Tensor = example(node)
    given = [emit(like, "size", size, {}) if isinstance(size, tuple) else size for size in sizes]
    options = {"dtype": model.dtype, "device": model.device}
    element = emit(like, torch.ops.aten.empty.memory_format, ([],), options)
    return emit(like, "expand", (element, *given), {})


def erase_unread(readers: list[fx.Node]) -> None:
    """Erase readers of stand-ins whose results only the attention read, and what follows them."""
    following = list(dict.fromkeys(readers))
    for node in following:
        following += [user for user in node.users if user not in following]
    for node in sorted(following, reverse=True):
        if not node.users and not node.is_impure() and node.op != "output":
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            _erase_stand_ins(sources)


def _erase_stand_ins(nodes: list[fx.Node]) -> None:
    for node in nodes:
        if not node.users and node.target in ("expand", torch.ops.aten.expand.default):
            (element, *_) = node.all_input_nodes
            if element.target is torch.ops.aten.empty.memory_format:
                node.graph.erase_node(node)
                if not element.users:
                    element.graph.erase_node(element)
