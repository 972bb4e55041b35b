"""Products of two tensors, all written as one einsum of two operands."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls import Call, call_of
from .fake import example, is_tensor

_LETTERS = string.ascii_letters


@dataclass(frozen=True)
class Product:
    """`factor * einsum("left,right->out", left, right) + addend_factor * addend`.

    Letters stand for dimensions; "." is a dimension of size 1 that broadcasts.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    out_letters: str
    factor: Any = 1.0
    addend: fx.Node | None = None
    addend_factor: Any = 1.0

    @property
    def sides(self) -> tuple[tuple[fx.Node, str], tuple[fx.Node, str]]:
        return (self.left, self.left_letters), (self.right, self.right_letters)


def product_of(node: Any) -> Product | None:
    """The product that `node` computes, or None."""
    call = call_of(node)
    if call is None or call.in_place or "out" in call.kwargs:
        return None
    if call.name in ("matmul", "bmm", "mm"):
        names = ("mat2", "other", "tensor2")
        return _matmul(node, call.argument(0, "input"), call.argument(1, *names))
    if call.name in ("baddbmm", "addmm"):
        return _with_addend(node, call)
    if call.name == "einsum":
        return _einsum(node, call)
    return None


def _matmul(node: fx.Node, left: Any, right: Any) -> Product | None:
    if not (is_tensor(left) and is_tensor(right) and is_tensor(node)):
        return None
    left_rank, right_rank = example(left).dim(), example(right).dim()
    if left_rank < 2 or right_rank < 2:
        return None
    batch = _LETTERS[3 : 3 + max(left_rank, right_rank) - 2]
    left_batch = batch[len(batch) - (left_rank - 2) :]
    right_batch = batch[len(batch) - (right_rank - 2) :]
    return _checked(node, left, right, left_batch + "ac", right_batch + "cb", batch + "ab")


def _with_addend(node: fx.Node, call: Call) -> Product | None:
    names = (("input",), ("batch1", "mat1"), ("batch2", "mat2"))
    addend, left, right = (call.argument(i, *name) for i, name in enumerate(names))
    product = _matmul(node, left, right)
    if product is None:
        return None
    beta = call.argument(3, "beta", default=1)
    given = {"factor": call.argument(4, "alpha", default=1), "addend_factor": beta}
    given["addend"] = None if isinstance(beta, (int, float)) and beta == 0 else addend
    return Product(**(vars(product) | given))


def _einsum(node: fx.Node, call: Call) -> Product | None:
    equation, operands = call.args[0], call.rest(1, "operands", "tensors")
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    if not all(map(is_tensor, (node, *operands))):
        return None
    given, _, out = equation.replace(" ", "").partition("->")
    sides = given.split(",")
    if len(sides) != 2:
        return None
    unused = [letter for letter in _LETTERS if letter not in equation]
    ranks = [example(operand).dim() for operand in operands]
    hidden = [rank - len(side.replace("...", "")) for side, rank in zip(sides, ranks, strict=True)]
    ellipsis = "".join(unused[: max(hidden)])
    if "->" not in equation:
        once = [x for x in sorted(set("".join(sides)) - {".", ","}) if given.count(x) == 1]
        out = ("..." if "..." in given else "") + "".join(once)
    left, right = (
        side.replace("...", ellipsis[len(ellipsis) - count :])
        for side, count in zip(sides, hidden, strict=True)
    )
    return _checked(node, *operands, left, right, out.replace("...", ellipsis))


def _checked(
    node: fx.Node, left: fx.Node, right: fx.Node, left_letters: str, right_letters: str, out: str
) -> Product | None:
    """The product with broadcast dimensions marked, if it is a plain one."""
    sizes: dict[str, Any] = {}
    for operand, letters in ((left, left_letters), (right, right_letters)):
        if len(set(letters)) != len(letters) or len(letters) != example(operand).dim():
            return None
        for letter, size in zip(letters, example(operand).shape, strict=True):
            if letter not in sizes or not statically_known_true(size == 1):
                sizes[letter] = size
    if len(set(out)) != len(out):
        return None
    marked = []
    for operand, letters in ((left, left_letters), (right, right_letters)):
        shape = example(operand).shape
        broadcast = [
            statically_known_true(size == 1) and not statically_known_true(sizes[letter] == 1)
            for letter, size in zip(letters, shape, strict=True)
        ]
        marked.append("".join("." if b else x for x, b in zip(letters, broadcast, strict=True)))
    summed = (set(marked[0]) ^ set(marked[1])) - set(out) - {"."}
    if summed or set(out) - set(left_letters) - set(right_letters):
        return None  # a sum over an axis of one operand alone
    return Product(node, left, right, marked[0], marked[1], out)
