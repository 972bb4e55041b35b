"""The matcher of attention that is written out, anchored at the softmax.

It walks back to the product that made the scores and forward to the product with the values,
follows every axis on the way, and reads from the axes alone which operand is query, key or value
and how each is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...graph.axes import CASTS, Axes, Dims, Group
from ...graph.calls import call_of
from ...graph.fake import example, number
from ...graph.product import Product, product_of
from ...sites.site import AttentionSite, NearMiss
from ..spelling import GraphFacts, Spelling
from ..transforms import transform_of
from .chain import Chain, MismatchError, MixedHeadsError, NoAttentionError, Term, aligned
from .interior import check_unchanged, closed_interior
from .layout import Layout, RolesError, atoms, roles_of
from .path import Link, back_to_products, forward_to_products
from .scores import check_order, follow_scores
from .softmax import Softmax, softmax_of
from .weights import follow_weights

# Which of several reasons is the one to tell: the first of these that there is.
_TELLING = (MismatchError, MixedHeadsError, RolesError)
_Way = tuple[list[Link], list[Link]]


class HandWrittenAttention(Spelling):
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        softmax = softmax_of(node, facts.writes)
        if softmax is None:
            return None
        missed: list[tuple[int, NearMiss]] = []
        for anything in (False, True):
            for back, forward in _ways(softmax, facts, through_anything=anything):
                found = _attempt(softmax, back, forward, facts, through_anything=anything)
                if isinstance(found, AttentionSite):
                    return found
                missed += found
            if missed and min(missed, key=_rank)[0] == 0:
                break
        return min(missed, key=_rank)[1] if missed else None


def _rank(missed: tuple[int, NearMiss]) -> int:
    return missed[0]


def _ways(softmax: Softmax, facts: GraphFacts, *, through_anything: bool) -> Iterator[_Way]:
    """Pairs of a path from a product to the softmax and one from there to a product."""
    writes, anything = facts.writes, through_anything
    backs: list[list[Link]] | None = None
    for forward in forward_to_products(softmax.node, writes, through_anything=anything):
        if backs is None:
            reader = softmax.interior[-1]
            backs = back_to_products(softmax.scores, reader, writes, through_anything=anything)
        for back in backs:
            yield back, forward


def _attempt(
    softmax: Softmax,
    back: list[Link],
    forward: list[Link],
    facts: GraphFacts,
    *,
    through_anything: bool,
) -> AttentionSite | list[tuple[int, NearMiss]]:
    """The attention along two paths, or why it is none, with the rank of that reason."""
    try:
        return _Match(softmax, back, forward, facts).site()
    except NoAttentionError:
        return []
    except MismatchError as reason:
        rank = len(_TELLING) if through_anything else 0
        if type(reason) is not MismatchError:
            rank = _TELLING.index(type(reason))
        return [(rank, _near_miss(back, forward, str(reason)))]


def _near_miss(back: list[Link], forward: list[Link], reason: str) -> NearMiss:
    scores, result = product_of(back[0].node), product_of(forward[-1].node)
    assert scores is not None
    assert result is not None
    value = result.right if result.left is forward[-1].operand else result.left
    return NearMiss(result.node, scores.left, scores.right, value, reason)


def _comes_from(node: Any, source: fx.Node) -> bool:
    """Whether `node` is made from `source` alone, in a few steps."""
    for _ in range(4):
        call = call_of(node)
        if node is source or call is None or not call.args:
            break
        node = call.args[0]
    return node is source


class _Match:
    """Two products with a softmax between them, on the way to an `AttentionSite`."""

    def __init__(
        self, softmax: Softmax, back: list[Link], forward: list[Link], facts: GraphFacts
    ) -> None:
        scores, result = product_of(back[0].node), product_of(forward[-1].node)
        assert scores is not None
        assert result is not None
        self.softmax, self.back, self.forward, self.facts = softmax, back, forward, facts
        self.scores, self.result = scores, result
        self.end = softmax.division or result.node
        self.axes = Axes()
        self.unread = next((link.changed for link in (*back, *forward) if link.changed), None)

    def site(self) -> AttentionSite:
        """The attention.

        Raises:
            MismatchError: it is not quite one; the text says why.
            NoAttentionError: it is none at all.
        """
        division = call_of(self.softmax.division)
        if division is not None and division.args[0] is not self.result.node:
            if not _comes_from(division.args[0], self.result.node):
                raise NoAttentionError  # some other quotient
            raise MismatchError("its product with the values is changed before it is normalised")
        if self.unread is not None:
            raise MismatchError(self.unread)
        sides, chain = self._chain()
        follow_scores(self.back, chain, self.axes, self.facts)
        if self.softmax.obstacle is not None:
            raise MismatchError(self.softmax.obstacle)
        key_axis = self._key_axis(chain, sides)
        if self.softmax.factor != 1.0:
            chain.multiply(self.softmax.factor)
        weights = Chain(self.axes.resolve(chain.dims))
        follow_weights(self.forward[:-1], weights, self.axes, self.softmax, self.facts)
        if weights.obstacle is not None:
            self._report(weights, {key_axis})
        check_order(chain, key_axis, self.axes, self.facts)
        value_dims, result_dims, value = self._value(weights)
        if self.softmax.division is not None:
            self._check_division(chain.dims, key_axis, value_dims, result_dims)
        query, key = self.scores.left, self.scores.right
        left, right = (atoms(dims, self.axes) for dims in sides)
        if key_axis in left & right or key_axis not in left | right:
            raise RolesError("its softmax does not run over the keys but over a batch dimension")
        if key_axis in left:
            sides, query, key = sides[::-1], key, query
        roles = roles_of(chain, key_axis, sides[0], sides[1], value_dims, result_dims, self.axes)
        layout = Layout.of(roles, sides[1], value_dims, self.axes)
        dims = (*sides, value_dims, result_dims)
        return self._assembled(chain, weights, layout, (query, key, value), dims)

    def _chain(self) -> tuple[list[Dims], Chain]:
        """The axes of both factors of the scores, and their product."""
        sides, out = self._letters(self.scores, {})
        factor = number(self.scores.factor)
        if not factor:
            raise MismatchError("its product of query and key is multiplied by 0")
        chain = Chain(out, scale=factor)
        chain.passed(self.scores.node)
        if (addend := self.scores.addend) is not None:
            dims = aligned(chain, addend, self.axes)
            scale = number(self.scores.addend_factor) or 0.0
            sign = 1 if scale >= 0 else -1
            chain.terms.append(Term("add", addend, dims, self.scores.node, sign, abs(scale)))
        return sides, chain

    def _key_axis(self, chain: Chain, sides: list[Dims]) -> int:
        """The axis that the softmax runs over.

        Raises:
            MismatchError: it is several, or something on the way is no part of an attention.
        """
        group = self.axes.resolve(chain.dims)[self.softmax.dim]
        left, right = (atoms(dims, self.axes) for dims in sides)
        if chain.obstacle is not None:
            present = atoms(chain.dims, self.axes)
            tokens = set(group) & (left ^ right)
            others = (right - left if tokens & left else left - right) & present
            # Scores of all pairs of tokens are no attention's once one of the two is summed away.
            if not tokens or not others or self._is_projection():
                raise NoAttentionError
            self._report(chain, left ^ right)
        if len(group) != 1:
            raise MismatchError("its softmax runs over several axes, or over an axis of size 1")
        return group[0]

    def _is_projection(self) -> bool:
        """Whether the scores are a linear layer's output, [B, T, D] @ [D, N]."""
        left, right = (len(letters) for _, letters in self.scores.sides)
        return left > right == 2

    def _report(self, chain: Chain, tokens: set[int] | frozenset[int]) -> None:
        assert chain.obstacle is not None
        if chain.mixed:
            if {part for atom in chain.mixed for part in atoms(((atom,),), self.axes)} & tokens:
                raise NoAttentionError
            raise MixedHeadsError(chain.obstacle)
        raise MismatchError(chain.obstacle)

    def _letters(self, product: Product, known: dict[str, Group]) -> tuple[list[Dims], Dims]:
        """Axes for the letters of a product, those in `known` as they are."""
        groups = dict(known)
        for node, letters in product.sides:
            for letter, size in zip(letters, example(node).shape, strict=True):
                if letter != "." and letter not in groups:
                    groups[letter] = (self.axes.new(size),)
        groups["."] = ()
        sides = [tuple(groups[x] for x in letters) for _, letters in product.sides]
        return sides, tuple(groups[x] for x in product.out_letters)

    def _value(self, weights: Chain) -> tuple[Dims, Dims, fx.Node]:
        """Axes of the value and of the result, and the value."""
        (left, left_letters), (right, right_letters) = self.result.sides
        if left is right:
            raise MismatchError("its weights are multiplied with themselves")
        if self.result.addend is not None or (number(self.result.factor) or 0.0) != 1.0:
            raise MismatchError("its product with the values is scaled or added to something")
        is_left = left is self.forward[-1].operand
        letters = left_letters if is_left else right_letters
        dims = self.axes.resolve(weights.dims)
        sides, out = self._letters(self.result, dict(zip(letters, dims, strict=True)))
        return sides[is_left], out, right if is_left else left

    def _check_division(
        self, weights: Dims, key_axis: int, value_dims: Dims, result_dims: Dims
    ) -> None:
        """The sum over the keys must broadcast against the result row by row."""
        resolve = self.axes.resolve
        total = [tuple(a for a in group if a != key_axis) for group in resolve(weights)]
        own = atoms(value_dims, self.axes) - atoms(weights, self.axes)
        pairs = list(zip(reversed(total), reversed(resolve(result_dims)), strict=False))
        aligned = all(mine == its or (not mine and set(its) <= own) for mine, its in pairs)
        if not aligned or len(total) != len(result_dims):
            raise MismatchError("the sum that its product is divided by has another layout")
        if example(self.end).dtype != example(self.result.node).dtype:
            raise MismatchError("its product with the values is cast before it is normalised")

    def _assembled(
        self,
        chain: Chain,
        weights: Chain,
        layout: Layout,
        nodes: tuple[fx.Node, fx.Node, fx.Node],
        dims: tuple[Dims, ...],
    ) -> AttentionSite:
        writes = self.facts.writes
        check_unchanged(nodes[:2], chain, self.scores.node, self.end, writes)
        if writes.between(nodes[2], self.result.node, self.end):
            raise MismatchError(f"`{nodes[2].name}` changes in place in the middle of it")
        inner = {*self.softmax.interior, *weights.nodes}
        if self.end is not self.result.node:
            inner.add(self.result.node)
        interior = closed_interior(chain, self.scores.node, inner, self.end, nodes[:2])
        transform = transform_of((*nodes, *(term.node for term in chain.terms), self.end))
        if transform is not None:
            raise MismatchError(transform)
        nodes = (*self._without_upcasts(nodes[0], nodes[1]), nodes[2])
        query = layout.query(nodes[0], dims[0])
        key, value = layout.key(nodes[1], dims[1]), layout.value(nodes[2], dims[2])
        gqa = layout.groups != layout.shared or layout.has_one_shared_head(query, key, value)
        return AttentionSite(
            node=self.end,
            query=layout.spread(query),
            key=key if gqa else layout.spread(key),
            value=value if gqa else layout.spread(value),
            dtype=self._dtype(nodes),
            masks=layout.masks(chain.terms),
            scale=chain.scale,
            enable_gqa=gqa,
            factors=layout.factors(chain.terms),
            result=layout.result(dims[3]),
            interior=interior,
        )

    def _without_upcasts(self, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Query and key before a cast to float32, in which the op computes the scores anyway."""
        sources = []
        for node in (query, key):
            call = call_of(node)
            source = call.args[0] if call is not None and call.name in CASTS else None
            if (
                not isinstance(source, fx.Node)
                or example(source).dtype != example(self.end).dtype
                or example(node).dtype != torch.float32
                or self.facts.writes.between(source, node, self.end)
            ):
                return query, key
            sources.append(source)
        return sources[0], sources[1]

    def _dtype(self, nodes: tuple[fx.Node, fx.Node, fx.Node]) -> torch.dtype:
        """The wider of the two products' dtypes, which autocast may have lowered."""
        result: torch.dtype = example(self.end).dtype
        if nodes[0] is not self.scores.left and nodes[0] is not self.scores.right:
            return result
        return torch.promote_types(example(self.scores.node).dtype, result)
