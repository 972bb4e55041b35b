"""What may happen to scores before their softmax, which does not see what all keys of a row share.

Each operation is taken only if `softmax(scale * query @ key^T + masks)` still says the same:
factors multiply what was added before them, a fill counts by its distance to the scores at that
place, and what is added to a whole row may not be so large that it rounds the scores away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...graph.axes import CASTS, Axes
from ...graph.calls import Call, call_of
from ...graph.fake import example, is_tensor
from ...graph.product import product_of
from ...graph.writes import UnknownValueError
from ...masks.facts import NEGLIGIBLE
from ..spelling import GraphFacts
from .chain import (
    Chain,
    MismatchError,
    Term,
    aligned,
    checked_call,
    constant,
    drift,
    view,
)
from .path import Link, chosen

BEFORE = "between the product of query and key and its softmax"
# Added to all scores of a row, more would change how they are rounded.
_MOST_SHIFT = 16.0
# Reductions of a row that are no larger than its scores.
_STATISTICS = {"max", "min", "amin", "mean", "median", "logsumexp"}
_KEPT = CASTS | {
    *("clone", "unsqueeze", "expand", "expand_as", "getitem", "reshape", ".values", "negative"),
}


def follow_scores(path: list[Link], chain: Chain, axes: Axes, facts: GraphFacts) -> None:
    """Lead `chain` from the product, the first node of `path`, to the last.

    Raises:
        MismatchError: something on the path is no part of a softmax attention.
    """
    for link in path[1:]:
        if chain.obstacle is None:
            _advance(chain, link, axes, facts)
        else:
            drift(chain, link, axes, BEFORE)
        chain.passed(link.node)


def _advance(chain: Chain, link: Link, axes: Axes, facts: GraphFacts) -> None:
    operand, node = link.operand, link.node
    call = call_of(node)
    assert call is not None
    if call.name == "setitem":
        _assign(chain, call, operand, node, axes, facts)
        return
    if product_of(node) is not None or not is_tensor(operand) or not is_tensor(node):
        drift(chain, link, axes, BEFORE)
        return
    call = checked_call(operand, node, BEFORE)
    if call.name in ("add", "sub", "rsub"):
        _add(chain, call, link, axes, facts)
    elif call.name in ("mul", "div"):
        _scale(chain, call, link, axes, facts)
    elif call.name == "masked_fill":
        mask, fill = call.argument(1, "mask"), call.argument(2, "value")
        _fill(chain, mask, fill, "block", node, axes, facts)
    elif call.name == "where" and (sources := chosen(call)) is not None:
        condition, if_true, if_false = sources
        if operand is if_true:
            _fill(chain, condition, if_false, "allow", node, axes, facts)
        else:
            _fill(chain, condition, if_true, "block", node, axes, facts)
    elif call.name == "negative":
        chain.multiply(-1.0)
    elif not view(chain, call, operand, node, axes):
        drift(chain, link, axes, BEFORE)
    elif example(node).dtype == torch.float16:
        _narrow(chain)
    if example(node).dim() != len(chain.dims):
        raise MismatchError(f"`{call.name}` stands {BEFORE}")


def _narrow(chain: Chain) -> None:
    """After a cast to float16 a fill below its range is -inf."""
    for term in chain.terms:
        if term.fill * term.scale < torch.finfo(torch.float16).min:
            term.fill = -math.inf


def _add(chain: Chain, call: Call, link: Link, axes: Axes, facts: GraphFacts) -> None:
    """`scores + x`, `x + scores`, `scores - x`, `x - scores`, with a factor `alpha`."""
    first, second = call.argument(0, "input", "self"), call.argument(1, "other")
    alpha = constant(call.argument(2, "alpha", default=1), link.node, facts)
    if alpha is None or not math.isfinite(alpha):
        raise MismatchError(f"`{call.name}` stands {BEFORE}")
    signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.name]
    if first is second:
        _multiply(chain, sum(signs), call)
        return
    on_left = first is link.operand
    mine, its = signs if on_left else signs[::-1]
    other = second if on_left else first
    _multiply(chain, mine, call)
    value = constant(other, link.node, facts)
    dims = aligned(chain, other, axes) if is_tensor(other) else None
    if value is not None and (dims is None or math.isfinite(value)):
        _shift(chain, its * value)
    elif dims is not None:
        chain.terms.append(Term("add", other, dims, link.node, 1 if its > 0 else -1, abs(its)))
    else:
        raise MismatchError(f"`{call.name}` stands {BEFORE}")


def _shift(chain: Chain, value: float) -> None:
    chain.shift += value
    if not abs(chain.shift) <= _MOST_SHIFT:
        raise MismatchError(
            f"{value:g} is added to all its scores, which changes nothing but how they are "
            "rounded; leave it out"
        )


def _scale(chain: Chain, call: Call, link: Link, axes: Axes, facts: GraphFacts) -> None:
    """`scores * x`, `x * scores`, `scores / x`."""
    first, second = call.argument(0, "input", "self"), call.argument(1, "other")
    other = second if first is link.operand else first
    divides = call.name == "div"
    if call.argument(2, "rounding_mode") is not None or first is second:
        raise MismatchError(f"`{call.name}` stands {BEFORE}")
    if divides and first is not link.operand:
        raise MismatchError(f"something is divided by its scores {BEFORE}")
    value = None if is_tensor(other) else constant(other, link.node, facts)
    if value is not None:
        if divides and value == 0.0:
            raise MismatchError("its scores are divided by 0")
        _multiply(chain, 1.0 / value if divides else value, call)
        return
    if not is_tensor(other):
        raise MismatchError(f"`{call.name}` stands {BEFORE}")
    chain.terms.append(Term(call.name, other, aligned(chain, other, axes), link.node))
    if chain.shift:
        chain.shift = math.nan


def _multiply(chain: Chain, factor: float, call: Call) -> None:
    if factor == 0.0 or not math.isfinite(factor):
        raise MismatchError(
            f"`{call.name}` stands {BEFORE} and multiplies its scores by {factor:g}"
        )
    if factor != 1.0:
        chain.multiply(factor)


def _assign(
    chain: Chain, call: Call, operand: fx.Node, node: fx.Node, axes: Axes, facts: GraphFacts
) -> None:
    """`scores[mask] = fill`, with a boolean mask of all dimensions."""
    _, mask, fill = call.args
    whole = is_tensor(mask) and is_tensor(operand)
    if not whole or example(mask).dim() != example(operand).dim():
        raise MismatchError(f"`setitem` stands {BEFORE}")
    _fill(chain, mask, fill, "block", node, axes, facts)


def _fill(
    chain: Chain, mask: Any, fill: Any, kind: str, node: fx.Node, axes: Axes, facts: GraphFacts
) -> None:
    """Scores replaced by `fill` where `mask` says so."""
    value = constant(fill, node, facts)
    if is_tensor(fill):
        aligned(chain, fill, axes)
        if value is None:
            raise MismatchError(
                "its scores are masked with a tensor of values; fill with -inf instead"
            )
    if value is None or not is_tensor(mask) or example(mask).dtype != torch.bool:
        name = getattr(call_of(node), "name", node.name)
        raise MismatchError(f"`{name}` stands {BEFORE}")
    dims = aligned(chain, mask, axes)
    chain.terms.append(Term(kind, mask, dims, node, fill=value - chain.shift))


def check_order(chain: Chain, keys: int, axes: Axes, facts: GraphFacts) -> None:
    """What depends on the order of the terms, once it is known which axis the keys are.

    Marks the terms that are added to whole rows.

    Raises:
        MismatchError: a factor, a fill or what is added to rows changes what came before.
    """
    masked = False
    for term in chain.terms:
        present = _varying(term, axes, facts)
        if term.kind in ("mul", "div"):
            if keys in present:
                raise MismatchError(f"`{term.node.name}` scales its scores differently per key")
            if masked:
                raise MismatchError(
                    f"`{term.kind}` stands {BEFORE} and multiplies its mask by a tensor too; scale "
                    "the query instead"
                )
        elif term.kind != "add":
            masked = True
            _check_fill(term, chain)
        elif keys in present:
            masked = True
        elif _is_statistic(term, chain) or _is_small(term, facts):
            term.of_rows = True
        else:
            raise MismatchError(
                f"`{term.node.name}` is added to all scores of a row and is not known to be small, "
                "so it may round them away; leave it out, it changes nothing else"
            )


def _varying(term: Term, axes: Axes, facts: GraphFacts) -> set[int]:
    """The axes along which the elements of a term may differ."""
    groups = axes.resolve(term.dims)
    flags: tuple[bool, ...] = (True,) * len(groups)
    try:
        state = facts.writes.value(term.node, term.reader)
        if is_tensor(state) and term.kind == "add":
            flags = facts.masks.facts.varying(state)
    except UnknownValueError:
        pass
    return {atom for group, flag in zip(groups, flags, strict=True) if flag for atom in group}


def _check_fill(term: Term, chain: Chain) -> None:
    value = term.fill * term.scale
    least = NEGLIGIBLE * max(1.0, abs(chain.scale))
    if not value <= least:
        raise MismatchError(
            f"its scores are filled with {value:g} where masked; only -inf, "
            f"or a number below {least:g}, removes keys"
        )


def _is_small(term: Term, facts: GraphFacts) -> bool:
    value = constant(term.node, term.reader, facts)
    return value is not None and abs(value) * term.scale <= _MOST_SHIFT


def _is_statistic(term: Term, chain: Chain) -> bool:
    """Whether a term is a maximum or the like of the scores that it is added to."""
    found = _reduction(term.node, chain)
    if found is None:
        return False
    source, name = found
    scale = chain.scales.get(term.reader, chain.scale)
    if abs(chain.scales[source]) != abs(scale):
        return False
    # Of scores that are masked, a mean is -inf, or nearly.
    masks = (t.reader for t in chain.terms if t.kind in ("add", "allow", "block") and t is not term)
    return name in ("max", "logsumexp") or not any(reader <= source for reader in masks)


def _reduction(node: fx.Node, chain: Chain) -> tuple[fx.Node, str] | None:
    """The node of the chain that a tensor is a statistic of, and which."""
    name = None
    for _ in range(8):
        if name is not None and node in chain.scales:
            return node, name
        call = call_of(node)
        if call is None or not call.args or not isinstance(call.args[0], fx.Node):
            return None
        if call.name in _STATISTICS and len(node.all_input_nodes) == 1 and name is None:
            name = call.name
        elif call.name == "getitem" and not is_tensor(call.args[0]) and call.args[1] != 0:
            return None  # the place of a maximum
        elif call.name not in _KEPT:
            return None
        node = call.args[0]
    return None
