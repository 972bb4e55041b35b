"""Spellings of attention that must be recognised, and look-alikes that must not.

Every function takes q, k, v as [B, H, T, D] and spells the same kind of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ...tracing import Rewritten, check_metadata, rewrite

B, H, T, D = 2, 3, 20, 8
Function = Callable[[Tensor, Tensor, Tensor], Any]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator).transpose(1, 2) for _ in range(3))
    return q, k, v


def keys() -> Tensor:
    """Boolean [B, T]; only the first tokens take part, more of them in later batches."""
    return torch.arange(T) < torch.arange(T - B + 1, T + 1)[:, None] - 5


def wide(v: Tensor) -> Tensor:
    """As many channels as tokens."""
    return torch.cat([v, v, v], -1)[..., :T]


@dataclass(frozen=True)
class Spelling:
    """A way to write attention, and the scale that the op must be given."""

    function: Function
    scale: float = 1.0


@dataclass(frozen=True)
class NearMiss:
    """What is not quite attention, and what its reason says."""

    function: Function
    reason: str


@dataclass
class Cases:
    spellings: list[Spelling] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)

    def spelling(self, scale: float = 1.0) -> Callable[[Function], Function]:
        def listed(function: Function) -> Function:
            self.spellings.append(Spelling(function, scale))
            return function

        return listed

    def near_miss(self, reason: str) -> Callable[[Function], Function]:
        def listed(function: Function) -> Function:
            self.near_misses.append(NearMiss(function, reason))
            return function

        return listed


def name_of(case: Any) -> str:
    return str(case.function.__name__) if isinstance(case, (Spelling, NearMiss)) else str(case)


def check_found(case: Spelling, *, dynamic: bool = False) -> Rewritten:
    """It is replaced, once, with its scale, and nothing of it is left."""
    function = case.function
    if dynamic:
        # One input, so that the lengths are one symbol; the functions name B, H and D.
        qkv = torch.stack(inputs())
        result = rewrite(lambda qkv: function(*qkv.unbind()), qkv, dynamic_dims=(3,))
    else:
        result = rewrite(function, *inputs())
        names = [node.name for node in result.graphs[0].graph.find_nodes(op="placeholder")]
        by_name = dict(zip(("l_q_", "l_k_", "l_v_"), inputs(), strict=True))
        check_metadata(result.graphs[0], *(by_name[name] for name in names))
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.ops[0].kwargs["scale"] == pytest.approx(case.scale)
    outputs = [result.output] if isinstance(result.output, Tensor) else result.output
    low_precision = outputs[0].dtype not in (torch.float32, torch.float64)
    assert result.error < (2e-2 if low_precision else 1e-5)
    assert left_over(result.graphs[0]) == []
    return result


def check_dense(case: NearMiss) -> Rewritten:
    """It is found, stays as it was and says why."""
    torch.manual_seed(0)
    result = rewrite(case.function, *inputs())
    assert result.ops == []
    assert len(result.decisions) == 1
    assert case.reason in result.decisions[0].reason
    if "eval()" not in case.reason:
        assert result.error == 0.0
    return result


def left_over(gm: torch.fx.GraphModule) -> list[str]:
    """What is left of a softmax and its products."""
    names = (str(node.target) for node in gm.graph.nodes)
    return [name for name in names if "softmax" in name or name in ("exp", "matmul", "bmm")]
