"""Follow the axes of a tensor through views, as letters do in an einsum.

Every axis is an *atom*, a small integer with a size. A dimension is a tuple of atoms: `(b, h)` is a
batch and a head axis merged by a reshape, `()` is a dimension of size 1 that broadcasts. A reshape
that splits a dimension splits its atom, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls import Call
from .operations import ADDITIONS, RESHAPES
from .operations import CASTS as CASTS
from .operations import SAME as SAME

Group = tuple[int, ...]
Dims = tuple[Group, ...]
Step = tuple[str, tuple[Any, ...]]

_LAST_TWO = {".mT", ".mH", "adjoint"}
_REVERSED = {".T", ".H", "t", "numpy_T"}  # all dimensions, of whatever rank


class Axes:
    """The atoms of one match."""

    def __init__(self) -> None:
        self.sizes: list[Any] = []
        self.repeats: set[int] = set()  # atoms along which a tensor holds copies
        self._parts: dict[int, Group] = {}

    def new(self, size: Any) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def fresh(self, shape: Sequence[Any]) -> Dims:
        return tuple((self.new(size),) for size in shape)

    def resolve(self, dims: Dims) -> Dims:
        """`dims` with every atom that was split replaced by its parts."""
        return tuple(tuple(part for atom in group for part in self._leaves(atom)) for group in dims)

    def _leaves(self, atom: int) -> Group:
        if atom not in self._parts:
            return (atom,)
        return tuple(leaf for part in self._parts[atom] for leaf in self._leaves(part))

    def through(self, call: Call, dims: Dims, before: Any, after: Any) -> Dims | None:
        """The dims of the result of a view-like call on a tensor with `dims`, or None.

        Args:
            before: fake value of the tensor.
            after: fake value of the result.
        """
        dims, rank = self.resolve(dims), len(dims)
        if before.is_complex() != after.is_complex():
            return None
        if call.name in SAME:
            return dims
        if call.name == "transpose":
            order = list(range(rank))
            first, second = (call.argument(i, f"dim{i - 1}", f"axis{i - 1}") for i in (1, 2))
            if not isinstance(first, int) or not isinstance(second, int):
                return None
            order[first], order[second] = order[second], order[first]
            return tuple(dims[i] for i in order)
        if call.name in _REVERSED:
            return dims[::-1]
        if call.name in _LAST_TWO:
            return (*dims[:-2], dims[-1], dims[-2]) if rank >= 2 else None
        if call.name == "permute":
            return tuple(dims[i] for i in call.rest(1, "dims"))
        if call.name == "movedim":
            return _moved(call, dims)
        if call.name == "unsqueeze":
            at = call.argument(1, "dim") % (rank + 1)
            return (*dims[:at], (), *dims[at:])
        if call.name == "getitem":
            return added_dims(call.args[1], dims)
        if call.name in ("expand", "expand_as"):
            return self._expanded(dims, after.shape)
        if call.name == "repeat_interleave":
            return self._repeated(call, dims)
        if call.name in RESHAPES | ADDITIONS:
            if isinstance(call.argument(1, "dtype"), torch.dtype):
                return None  # `view` that reinterprets memory
            return self._reshaped(dims, after.shape)
        return None

    def size_of(self, group: Group) -> Any:
        return math.prod(self.sizes[atom] for atom in group)

    def _expanded(self, dims: Dims, shape: Sequence[Any]) -> Dims | None:
        dims = ((),) * (len(shape) - len(dims)) + dims
        result = []
        for group, size in zip(dims, shape, strict=True):
            if statically_known_true(self.size_of(group) == size):
                result.append(group)
            elif statically_known_true(self.size_of(group) == 1):
                result.append((self._repeat(size),))
            else:
                return None
        return tuple(result)

    def _repeated(self, call: Call, dims: Dims) -> Dims | None:
        count, dim = call.argument(1, "repeats"), call.argument(2, "dim")
        if not isinstance(count, int) or not isinstance(dim, int):
            return None
        dim %= len(dims)
        return (*dims[:dim], (*dims[dim], self._repeat(count)), *dims[dim + 1 :])

    def _repeat(self, size: Any) -> int:
        atom = self.new(size)
        self.repeats.add(atom)
        return atom

    def _reshaped(self, dims: Dims, shape: Sequence[Any]) -> Dims | None:
        """Group the atoms by `shape`, splitting where it needs; None if they do not fit."""
        if any(not _has_hint(size) for size in (*shape, *map(self.size_of, dims))):
            same = len(shape) == len(dims) and all(
                statically_known_true(size == self.size_of(group))
                for size, group in zip(shape, dims, strict=True)
            )
            return dims if same else None
        atoms = [atom for group in dims for atom in group]
        result = []
        for size in shape:
            group: list[int] = []
            while atoms and _hint(self.size_of(tuple(group))) < _hint(size):
                atom = atoms.pop(0)
                missing = _hint(size) // _hint(self.size_of(tuple(group)))
                if _hint(self.sizes[atom]) > missing:
                    if group or _hint(self.sizes[atom]) % _hint(size):
                        return None
                    first, second = self._split(atom, size)
                    atoms.insert(0, second)
                    atom = first
                group.append(atom)
            if not group and atoms and _hint(self.sizes[atoms[0]]) == 1:
                group.append(atoms.pop(0))
            if not statically_known_true(self.size_of(tuple(group)) == size):
                return None
            result.append(tuple(group))
        if result and all(_hint(self.sizes[atom]) == 1 for atom in atoms):
            result[-1] = (*result[-1], *atoms)
            atoms = []
        return None if atoms else tuple(result)

    def _split(self, atom: int, size: Any) -> Group:
        parts = self.new(size), self.new(self.sizes[atom] // size)
        self._parts[atom] = parts
        return parts

    def steps(self, given: Dims, wanted: Dims) -> tuple[Step, ...] | None:
        """Method calls that turn a tensor with dims `given` into one with dims `wanted`.

        A wanted group that the tensor lacks becomes a dimension of size 1.
        """
        given, wanted = self.resolve(given), self.resolve(wanted)
        # An axis of size 1 that only one side has is no axis at all.
        common = {a for group in given for a in group} & {a for group in wanted for a in group}
        given, wanted = self._without_ones(given, common), self._without_ones(wanted, common)
        steps: list[Step] = []
        for dim in reversed(range(len(given))):
            group = given[dim]
            if len(group) > 1:
                sizes = self._static_sizes(group)
                if sizes is None:
                    return None
                steps.append(("unflatten", (dim, sizes)))
            elif not group:
                steps.append(("squeeze", (dim,)))
        order = [atom for group in given for atom in group]
        present = [group if set(group) & set(order) else () for group in wanted]
        target = [atom for group in present for atom in group]
        if sorted(order) != sorted(target):
            return None
        if order != target:
            steps.append(("permute", (tuple(order.index(atom) for atom in target),)))
        for dim, group in enumerate(present):
            if not group:
                steps.append(("unsqueeze", (dim,)))
            elif len(group) > 1:
                steps.append(("flatten", (dim, dim + len(group) - 1)))
        return tuple(steps)

    def _without_ones(self, dims: Dims, keep: set[int]) -> Dims:
        def counts(atom: int) -> bool:
            size = self.sizes[atom]
            return atom in keep or not isinstance(size, int) or size != 1

        return tuple(tuple(filter(counts, group)) for group in dims)

    def _static_sizes(self, group: Group) -> tuple[int, ...] | None:
        """Sizes for `unflatten`: at most one may be symbolic, and is left to it as -1."""
        sizes = tuple(s if isinstance(s, int) else -1 for s in map(self.sizes.__getitem__, group))
        return sizes if sizes.count(-1) <= 1 else None


def _moved(call: Call, dims: Dims) -> Dims | None:
    """`movedim(x, source, destination)`, numbers or sequences of them."""
    rank = len(dims)
    sources, targets = call.argument(1, "source"), call.argument(2, "destination")
    if isinstance(sources, int) and isinstance(targets, int):
        sources, targets = (sources,), (targets,)
    if not isinstance(sources, (tuple, list)) or not isinstance(targets, (tuple, list)):
        return None
    placed = {to % rank: at % rank for at, to in zip(sources, targets, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in placed.values())
    return tuple(dims[placed[dim] if dim in placed else next(rest)] for dim in range(rank))


def added_dims(index: Any, dims: Dims) -> Dims | None:
    """Indexing that only adds dimensions: `x[:, None]`, `x[..., None, :]`."""
    items = list(index) if isinstance(index, tuple) else [index]
    full = slice(None)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(dims) - sum(item is not None for item in items) + 1
        items[at : at + 1] = [full] * missing
    rest, result = list(dims), list[Group]()
    for item in items:
        if item is None:
            result.append(())
        elif isinstance(item, slice) and item == full and rest:
            result.append(rest.pop(0))
        else:
            return None
    return (*result, *rest)


def _has_hint(size: Any) -> bool:
    return isinstance(size, int) or size.node.has_hint()


def _hint(size: Any) -> int:
    """The size that was traced, to choose by; what is chosen is then proven."""
    return size if isinstance(size, int) else int(size.node.hint)
