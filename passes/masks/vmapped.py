"""Code under `torch.vmap`, which Dynamo inlines: which of the mapped axes a value varies over.

Inside, a tensor lacks the mapped axes; `_add_batch_dim` hides one under a level and
`_remove_batch_dim` shows it again. Masks of `flex_attention` are made that way, from functions of
single indices.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..graph.calls import call_of
from ..graph.fake import example, is_tensor

HIDE, SHOW = "add_batch_dim", "remove_batch_dim"
_PICKS = {"getitem", "index"}
Varying = Callable[[fx.Node], tuple[bool, ...]]
Found = tuple[tuple[bool, ...], frozenset[int]]
"""Which dimensions a tensor varies along, and which levels of hidden ones."""


def shown(
    node: fx.Node, pointwise: set[str], constant: Callable[[fx.Node], bool], varying: Varying
) -> tuple[bool, ...] | None:
    """For each dimension of a result of `vmap`, whether it varies along it; None if unknown.

    Args:
        pointwise: names of calls whose elements depend on the same elements of their arguments.
        constant: tells of a node whether all its elements are the same number.
        varying: tells the same of what is not mapped.
    """
    known: dict[fx.Node, Found | None] = {}

    def followed(node: fx.Node) -> Found | None:
        if node not in known:
            known[node] = derived(node)
        return known[node]

    def derived(node: fx.Node) -> Found | None:
        call = call_of(node)
        if not is_tensor(node):
            return None
        if call is None:
            return varying(node), frozenset()
        if call.name == HIDE:
            source, dim, level = call.args
            flags = varying(source)
            return flags[:dim] + flags[dim + 1 :], frozenset((level,) if flags[dim] else ())
        if call.name == SHOW:
            source, level, _, dim = call.args
            found = followed(source)
            if found is None:
                return None
            flags, levels = found
            return (*flags[:dim], level in levels, *flags[dim:]), levels - {level}
        rank = example(node).dim()
        if constant(node):
            return (False,) * rank, frozenset()
        levels = frozenset[int]()
        for operand in filter(is_tensor, node.all_input_nodes):
            found = followed(operand)
            if found is None:
                return None
            levels |= found[1]
        if not levels:
            return varying(node), levels
        # Single elements, also picked by indices: all they vary over is in the operands.
        single = rank == 0 and not call.in_place
        return ((), levels) if single and call.name in {*pointwise, *_PICKS} else None

    found = followed(node)
    return None if found is None or found[1] else found[0]
