"""Whether the nodes of a hand-written attention can go: nothing else may read or change them."""

from __future__ import annotations

from torch import fx

from ...graph.shape_readers import reads_shape, stand_in_sizes
from ...graph.writes import Writes
from .chain import Chain, MismatchError


def closed_interior(
    chain: Chain,
    product: fx.Node,
    weights: set[fx.Node],
    result: fx.Node,
    sources: tuple[fx.Node, ...],
) -> tuple[fx.Node, ...]:
    """All nodes of the spelling but the last, in order.

    Args:
        chain: from the product of query and key to the softmax.
        weights: the nodes of the softmax and those between it and the product with the values.
        sources: tensors that stay, from whose sizes those of the scores can be read.

    Raises:
        MismatchError: another node reads one of them.
    """
    scores = {product, *chain.nodes}
    for term in chain.terms:
        scores |= _row_statistics(term.node, scores)
    inside = scores | weights
    for node in inside:
        for user in node.users:
            if user in inside or user is result or _can_do_without(user, node, sources):
                continue
            what = "attention weights are" if node in weights else "scores are"
            raise MismatchError(
                f"its {what} also returned or used by `{user.name}`; ask for the output alone "
                "(need_weights=False, output_attentions=False)"
            )
    return tuple(sorted(inside))


def _can_do_without(user: fx.Node, node: fx.Node, sources: tuple[fx.Node, ...]) -> bool:
    return reads_shape(user, node) and stand_in_sizes(node, sources) is not None


def check_unchanged(
    operands: tuple[fx.Node, ...], chain: Chain, product: fx.Node, result: fx.Node, writes: Writes
) -> None:
    """No input may change in place between its first use and the op, which reads it last.

    Raises:
        MismatchError: one does.
    """
    read = [(node, product) for node in operands]
    read += [(term.node, term.reader) for term in chain.terms]
    for node, reader in read:
        for write in writes.between(node, reader, result):
            raise MismatchError(
                f"`{write.name}` changes `{node.name}` in place in the middle of it"
            )


def _row_statistics(node: fx.Node, scores: set[fx.Node]) -> set[fx.Node]:
    """The nodes between the scores and a maximum (or the like) of them, both ends excluded."""
    passed: set[fx.Node] = set()
    for _ in range(4):
        if node in scores:
            return passed
        passed.add(node)
        sources = [x for x in node.all_input_nodes if not reads_shape(node, x)]
        if len(sources) != 1:
            break
        node = sources[0]
    return set()
