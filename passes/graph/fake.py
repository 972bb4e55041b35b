"""Fake values of nodes: what a node computes, without its numbers."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false


def has_example(node: fx.Node) -> bool:
    return "example_value" in node.meta or "val" in node.meta


def example(node: fx.Node) -> Any:
    """The fake value of a node: Dynamo keeps it as `example_value`, export and make_fx as `val`."""
    return node.meta[example_key(node)]


def example_key(node: fx.Node) -> str:
    return "example_value" if "example_value" in node.meta else "val"


def number(argument: Any) -> float | None:
    """A Python number for a number, a symbolic number or a node that holds one.

    Dynamic shapes turn float arguments into graph inputs. Reading one installs a guard, which is
    right: another value is another graph.
    """
    if isinstance(argument, fx.Node):
        argument = example(argument)
    return None if argument is None else float(argument)


def is_zero(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        argument = example(argument)
    return bool(guard_or_false(argument == 0))


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes for a report. A symbolic size gives the traced value and no guard; unknown is -1."""
    return tuple(
        size if isinstance(size, int) else (size.node.hint if size.node.has_hint() else -1)
        for size in tensor.shape
    )


def four_sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes for a report of a tensor that could not be brought to [B, H, T, D]."""
    given = sizes(tensor)
    leading = given[:-2]
    return ((1,) * (2 - len(leading)) + (math.prod(leading[:-1]), *leading[-1:], *given[-2:]))[-4:]


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a node that computes one tensor."""
    return isinstance(node, fx.Node) and has_example(node) and isinstance(example(node), Tensor)


def is_number(node: fx.Node) -> bool:
    """Whether `node` is a node that computes one number, symbolic or not."""
    kinds = (int, float, torch.SymInt, torch.SymFloat)
    return has_example(node) and isinstance(example(node), kinds)
