"""Attention written out: softmax(query @ key^T * scale + mask) @ value, in any spelling.

The matcher is anchored at the softmax. It walks back to the product that made the scores and
forward to the product with the values, follows every axis on the way, and reads from the axes alone
which operand is query, key or value and how each is laid out.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import CASTS, Axes, Dims, Group
from ..graph.calls import call_of
from ..graph.fake import example, number
from ..graph.product import Product, product_of
from ..graph.writes import UnknownValueError, Writes
from ..sites.site import AttentionSite, Mask, NearMiss, View
from .chain import (
    Chain,
    Link,
    MismatchError,
    Term,
    aligned,
    back_to_product,
    follow,
    forward_to_product,
)
from .interior import check_unchanged, closed_interior
from .softmax import Softmax, softmax_of
from .spelling import GraphFacts, Spelling

_BEFORE = "between the product of query and key and its softmax"
_AFTER = "between its softmax and the product with the values"


class HandWrittenAttention(Spelling):
    def match(self, node: fx.Node, facts: GraphFacts) -> AttentionSite | NearMiss | None:
        softmax = softmax_of(node)
        if softmax is None:
            return None
        forward = forward_to_product(softmax.node)
        if forward is None:
            return None
        try:
            back = back_to_product(softmax.scores, softmax.interior[-1], facts.writes)
        except UnknownValueError as reason:
            return _unreadable(softmax, forward, str(reason))
        if back is None:
            return None
        scores, result = product_of(back[0].node), product_of(forward[-1].node)
        assert scores is not None
        assert result is not None
        division = call_of(softmax.division)
        if division is not None and division.args[0] is not result.node:
            return None  # some other quotient
        try:
            return _Match(softmax, back, forward, scores, result, facts.writes).site()
        except MismatchError as reason:
            value = result.right if result.left is forward[-1].operand else result.left
            return NearMiss(result.node, scores.left, scores.right, value, str(reason))


def _unreadable(softmax: Softmax, forward: list[Link], reason: str) -> NearMiss:
    result = forward[-1].node
    return NearMiss(result, softmax.scores, softmax.scores, softmax.scores, reason)


class _Match:
    """Two products with a softmax between them, on the way to an `AttentionSite`."""

    def __init__(
        self,
        softmax: Softmax,
        back: list[Link],
        forward: list[Link],
        scores: Product,
        result: Product,
        writes: Writes,
    ) -> None:
        self.softmax, self.back, self.forward = softmax, back, forward
        self.scores, self.result, self.writes = scores, result, writes
        self.end = softmax.division or result.node
        self.axes = Axes()

    def site(self) -> AttentionSite:
        sides, out = self._letters(self.scores, {})
        chain = Chain(out, scale=number(self.scores.factor) or 0.0)
        if (addend := self.scores.addend) is not None:
            dims = aligned(chain, addend, self.axes)
            chain.terms.append(Term("add", addend, dims, self.scores.node))
        follow(self.back, chain, self.axes, _BEFORE)
        softmax_dims = self.axes.resolve(chain.dims)
        key_axis = self._only_atom(softmax_dims[self.softmax.dim])
        weights = Chain(softmax_dims)
        follow(self.forward[:-1], weights, self.axes, _AFTER)
        if weights.terms or weights.scale != 1.0:
            raise MismatchError(f"its attention weights are scaled or masked {_AFTER}")
        value_dims, result_dims, value = self._value(weights)
        if self.softmax.division is not None:
            self._check_division(softmax_dims, key_axis, value_dims, result_dims)
        return self._assembled(sides, chain, key_axis, value, value_dims, result_dims)

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
        own = {a for group in resolve(value_dims) for a in group}
        own -= {a for group in resolve(weights) for a in group}
        pairs = list(zip(reversed(total), reversed(resolve(result_dims)), strict=False))
        aligned = all(mine == its or (not mine and set(its) <= own) for mine, its in pairs)
        if not aligned or len(total) != len(result_dims):
            raise MismatchError("the sum that its product is divided by has another layout")
        if example(self.end).dtype != example(self.result.node).dtype:
            raise MismatchError("its product with the values is cast before it is normalised")

    def _only_atom(self, group: Group) -> int:
        if len(group) != 1:
            raise MismatchError("its softmax runs over several axes, or over an axis of size 1")
        return group[0]

    def _assembled(
        self,
        sides: list[Dims],
        chain: Chain,
        key_axis: int,
        value: fx.Node,
        value_dims: Dims,
        result_dims: Dims,
    ) -> AttentionSite:
        axes = self.axes
        sides = [axes.resolve(dims) for dims in sides]
        value_dims, result_dims = axes.resolve(value_dims), axes.resolve(result_dims)
        left, right = (frozenset(atom for group in dims for atom in group) for dims in sides)
        out = frozenset(atom for group in axes.resolve(chain.dims) for atom in group)
        if key_axis in left & right or key_axis not in left | right:
            raise MismatchError("its softmax does not run over the keys but over a batch dimension")
        if key_axis in left:
            sides, left, right = sides[::-1], right, left
            query, key = self.scores.right, self.scores.left
        else:
            query, key = self.scores.left, self.scores.right
        value_axes = frozenset(atom for group in value_dims for atom in group)
        result_axes = frozenset(atom for group in result_dims for atom in group)
        if key_axis not in value_axes or key_axis in result_axes:
            raise MismatchError(
                "its softmax does not run over the dimension that the product with the values sums"
            )
        summed, own = (left & right) - out, value_axes - out
        rows = self._row_axis(left - right - summed, key_axis, result_axes - value_axes)
        if len(summed) != 1 or len(own) != 1:
            raise MismatchError("query and key, or weights and value, share unusual dimensions")
        batch = self._batch(chain, rows, key_axis)
        if (right | value_axes) - summed - own - set(batch) - {key_axis}:
            raise MismatchError("key or value have a dimension that the query lacks")
        return self._build(
            chain,
            batch,
            (query, key, value),
            (sides[0], sides[1], value_dims),
            (rows, key_axis, min(summed), min(own)),
            result_dims,
        )

    def _row_axis(self, candidates: frozenset[int], keys: int, own: frozenset[int]) -> int:
        """The query's tokens: an axis of query and result alone, of the keys' size if possible."""
        found = sorted(candidates & own)
        if not found:
            raise MismatchError("its query has no token dimension of its own")
        sizes = self.axes.sizes
        same = [atom for atom in found if statically_known_true(sizes[atom] == sizes[keys])]
        return (same or found)[-1]

    def _batch(self, chain: Chain, rows: int, keys: int) -> tuple[int, ...]:
        """The other axes, in the order of the scores unless only the second of two has a mask."""
        dims = self.axes.resolve(chain.dims)
        batch = tuple(atom for group in dims for atom in group if atom not in (rows, keys))
        terms = [{a for g in self.axes.resolve(t.dims) for a in g} for t in chain.terms]
        masked = {atom for term in terms for atom in term if keys in term}
        if len(batch) == 2 and batch[1] in masked and batch[0] not in masked:
            return batch[::-1]
        return batch

    def _build(
        self,
        chain: Chain,
        batch: tuple[int, ...],
        nodes: tuple[fx.Node, fx.Node, fx.Node],
        dims: tuple[Dims, Dims, Dims],
        atoms: tuple[int, int, int, int],
        result_dims: Dims,
    ) -> AttentionSite:
        rows, keys, width, value_width = atoms
        check_unchanged(nodes[:2], chain, self.scores.node, self.end, self.writes)
        if self.writes.between(nodes[2], self.result.node, self.end):
            raise MismatchError(f"`{nodes[2].name}` changes in place in the middle of it")
        nodes = (*self._without_upcasts(nodes[0], nodes[1]), nodes[2])
        groups, shared = self._groups(batch, dims[1], dims[2])
        wanted = (
            (*groups, (rows,), (width,)),
            (*shared, (keys,), (width,)),
            (*shared, (keys,), (value_width,)),
        )
        query, key, value = (
            self._view(node, given, want)
            for node, given, want in zip(nodes, dims, wanted, strict=True)
        )
        result = self.axes.steps((*groups, (rows,), (value_width,)), result_dims)
        if result is None:
            raise MismatchError("the layout of its result cannot be made from [B, H, T, D]")
        masks, factors = self._terms(chain, groups, rows, keys)
        weights = {*self.softmax.interior, *(link.node for link in self.forward[:-1])}
        if self.end is not self.result.node:
            weights.add(self.result.node)
        interior = closed_interior(chain, self.scores.node, weights, self.end)
        gqa = groups != shared or self._one_shared_head(query, key, value)
        return AttentionSite(
            node=self.end,
            query=query,
            key=key if gqa else self._spread(key, query),
            value=value if gqa else self._spread(value, query),
            dtype=self._dtype(nodes),
            masks=masks,
            scale=chain.scale,
            enable_gqa=gqa,
            factors=factors,
            result=result,
            interior=interior,
        )

    def _groups(self, batch: tuple[int, ...], key: Dims, value: Dims) -> tuple[Dims, Dims]:
        """Batch and head dimension of the query, and of key and value, as groups of axes.

        [N, T, D] is N batches of one head: masks differ between batches, never between heads. More
        than two axes are merged into the batch. The last of them is one of query heads that share a
        key and a value head, if these lack it.
        """
        if len(batch) < 2:
            groups: Dims = (batch, ())
            return groups, groups
        present = {atom for group in (*key, *value) for atom in group}
        if len(batch) > 2 and batch[-1] not in present:
            return (batch[:-2], batch[-2:]), (batch[:-2], batch[-2:-1])
        groups = (batch[:-1], batch[-1:])
        return groups, groups

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
                or self.writes.between(source, node, self.end)
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

    def _view(self, node: fx.Node, given: Dims, wanted: Dims) -> View:
        steps = self.axes.steps(given, wanted)
        if steps is None:
            raise MismatchError(f"the layout of `{node.name}` cannot be brought to [B, H, T, D]")
        return View(node, steps)

    def _terms(
        self, chain: Chain, groups: Dims, rows: int, keys: int
    ) -> tuple[tuple[Mask, ...], tuple[tuple[str, View], ...]]:
        masks, factors = [], []
        for term in chain.terms:
            present = {atom for group in self.axes.resolve(term.dims) for atom in group}
            if term.kind in ("mul", "div"):
                if keys in present:
                    raise MismatchError(f"`{term.node.name}` scales its scores differently per key")
                wanted: Dims = (*groups, (rows,), ())
                factors.append((term.kind, self._view(term.node, term.dims, wanted)))
            elif term.kind != "add" or keys in present:
                view = self._view(term.node, term.dims, (*groups, (rows,), (keys,)))
                masks.append(
                    Mask(
                        term.kind,  # type: ignore[arg-type]
                        view,
                        term.sign,
                        term.scale,
                        fill=term.fill * term.scale,
                        dtype=example(term.reader).dtype if term.kind == "add" else None,
                    )
                )
            # What is added to all scores of a row, such as minus their maximum, changes nothing.
        return tuple(masks), tuple(factors)

    def _one_shared_head(self, query: View, key: View, value: View) -> bool:
        """One key and value head for all query heads: [B, 1, T, D]."""
        heads = [view.example().shape[1] for view in (query, key, value)]
        one = [statically_known_true(count == 1) for count in heads]
        return one == [False, True, True]

    def _spread(self, view: View, query: View) -> View:
        """Broadcast batch and head dimensions of key or value to the query's."""
        sizes = []
        for mine, its in zip(view.example().shape[:2], query.example().shape[:2], strict=True):
            same = statically_known_true(mine == its)
            if not same and not isinstance(its, int):
                raise MismatchError("key or value broadcast over a dimension of unknown size")
            sizes.append(-1 if same else its)
        return view if sizes == [-1, -1] else view.then(("expand", (*sizes, -1, -1)))
