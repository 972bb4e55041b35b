"""Joint attention with fewer queries than keys: image tokens attend themselves and the text.

By its lengths it looks like cross-attention. What tells the two apart is where the tokens come
from: either the keys are a concatenation and the queries come from what one of its parts comes
from, or the queries are a slice of what the keys come from. A few queries that read many more
tokens are pooling instead, in which nothing is to be gained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.calls import call_of
from ..graph.fake import example, is_tensor, sizes
from ..graph.operations import ARITHMETIC, JOINS, SLICES, SPLITS
from ..graph.product import product_of
from ..sites.site import AttentionSite

# Followed through the largest operand, or several of one size: what is broadcast against the
# tokens, such as a table of rotary embeddings, is not what they come from.
_POINTWISE = ARITHMETIC | {"where", "addcmul", "lerp"}
# Attention mixes tokens; `new_zeros`, `ones_like` and so on make new ones.
_MIXED_OR_MADE = ("attention", "multi_head", "encoder_layer", "new_", "_like")
_MOST = 96  # tensors that are looked at: dozens of operations back on both sides
_POOLING = 8  # times as many keys as queries


def is_joint(site: AttentionSite) -> bool:
    """Whether the keys of `site` contain the tokens of its queries, among others."""
    query, key = site.query.example(), site.key.example()
    count, total = query.shape[-2], key.shape[-2]
    if not 0 < sizes(query)[-2] < sizes(key)[-2] <= _POOLING * sizes(query)[-2]:
        return False
    queries, keys = _origins(site.query.node, count), _origins(site.key.node, total)
    for node in keys:
        for part in _parts(node, count, total):
            if queries & _origins(part, count):
                return True
    return any(
        keys & _origins(whole, total) for node in queries for whole in _wholes(node, count, total)
    )


def _origins(node: fx.Node, length: Any) -> set[fx.Node]:
    """`node` and what its tokens come from one by one, as far as the sequence keeps `length`."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting and len(found) < _MOST:
        node = waiting.pop(0)
        if node not in found and _has(node, length):
            found.add(node)
            waiting += _sources(node)
    return found


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    call = call_of(node)
    if call is None or not call.args or any(word in call.name for word in _MIXED_OR_MADE):
        return
    if call.name in JOINS:
        yield from filter(is_tensor, call.joined())
    elif call.name in _POINTWISE:
        counts = {x: math.prod(sizes(example(x))) for x in call.args if is_tensor(x)}
        yield from (operand for operand, count in counts.items() if count == max(counts.values()))
    elif (product := product_of(node)) is not None:
        if example(product.right).dim() == 2:  # a linear layer
            yield product.left
    elif is_tensor(call.args[0]):
        yield call.args[0]
    else:  # one of the results of `chunk`, `split` or `unbind`
        whole = call_of(call.args[0])
        if whole is not None and whole.args and is_tensor(whole.args[0]):
            yield whole.args[0]


def _parts(node: fx.Node, count: Any, total: Any) -> Iterator[fx.Node]:
    """The parts with `count` tokens of a concatenation to `total` tokens."""
    call = call_of(node)
    if call is None or call.name != "cat":
        return
    dim = call.argument(1, "dim", default=0)
    if isinstance(dim, int) and statically_known_true(example(node).shape[dim] == total):
        for part in filter(is_tensor, call.joined()):
            if statically_known_true(example(part).shape[dim] == count):
                yield part


def _wholes(node: fx.Node, count: Any, total: Any) -> Iterator[fx.Node]:
    """The tensor with `total` tokens of which `node` is a slice of `count` tokens."""
    call = call_of(node)
    if call is None or call.name not in SLICES | SPLITS:
        return
    for whole in _sources(node):
        shapes = zip(example(whole).shape, example(node).shape, strict=False)
        for before, after in shapes:
            if statically_known_true(before == total) and statically_known_true(after == count):
                yield whole


def _has(node: fx.Node, length: Any) -> bool:
    return is_tensor(node) and any(
        statically_known_true(size == length) for size in example(node).shape
    )
