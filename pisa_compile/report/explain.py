"""`explain`: which attention of a model was replaced, and why the rest was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..kernels.params import DEFAULT_BLOCK_SIZE
from ..ops.flops import attention_flops, dense_flops
from ..passes import Decision
from ..policies.policy import Policy
from ..steps.clock import current_step
from .compilation import is_compiled
from .names import ModuleNames
from .recording import Recording, Tally, recording
from .tables import TOP_LEVEL, rich_table, table_text
from .untraced import EagerAttention, NotTraced

_COLUMNS = ("module", "query", "key", "dtype", "calls", "decision", "FLOPs saved", "why, policy")


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    Attributes:
        module: name of the innermost module, as in `model.named_modules()` where it is known.
        replaced: whether piecewise sparse attention runs there.
        reason: why it was replaced or stays dense, in words.
        policy: the policy in force, every field resolved; where it is replaced, `exact` and `grid`
            say what was found.
        notes: what else there is to know of a replaced site, in words.
        query_shape, key_shape, value_shape: [B, H, T, D] as traced.
        dtype: of the output.
        calls: how often it ran during one call of the model.
        flops: FLOPs of its matrix products as it runs now, for all its calls.
        dense_flops: the same for dense attention.
    """

    module: str
    replaced: bool
    reason: str
    policy: Policy
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int
    flops: int
    dense_flops: int
    notes: tuple[str, ...] = ()

    @property
    def flops_saved(self) -> float:
        """Share of the site's attention FLOPs that is saved, 0 for a dense site."""
        return 1.0 - self.flops / self.dense_flops if self.dense_flops else 0.0

    @property
    def why(self) -> str:
        """What matters of the policy of a replaced site, the reason of another."""
        if not self.replaced:
            return self.reason
        return "; ".join((_policy_text(self.policy), *self.notes))


@dataclass(frozen=True)
class Report:
    """What `explain` found. Prints as a table; `sites` and `not_traced` are the same as data.

    Attributes:
        sites: every attention in the compiled graphs.
        graphs: how many graphs ran.
        not_traced: attention that ran outside of them, which nothing can replace; no other number
            here counts it.
        notes: what else there is to know of the call, in words.
    """

    sites: tuple[Site, ...]
    graphs: int
    not_traced: tuple[NotTraced, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> int:
        return sum(site.replaced for site in self.sites)

    @property
    def flops_saved(self) -> float:
        """Share of all attention FLOPs of the model that is saved."""
        dense = sum(site.dense_flops for site in self.sites)
        return 1.0 - sum(site.flops for site in self.sites) / dense if dense else 0.0

    @property
    def summary(self) -> str:
        text = (
            f"{self.replaced} of {len(self.sites)} attention sites replaced in {self.graphs} "
            f"compiled graph{'' if self.graphs == 1 else 's'}; "
            f"{self.flops_saved:.0%} of all attention FLOPs saved"
        )
        missed = sum(call.calls for call in self.not_traced)
        if not missed:
            return text
        calls = "1 attention call" if missed == 1 else f"{missed} attention calls"
        return f"{text} in them; {calls} not traced"

    def __str__(self) -> str:
        return "\n".join([table_text(_COLUMNS, self._rows()), *self.notes, self.summary])

    def __rich__(self) -> Any:
        return rich_table(_COLUMNS, self._rows())

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for site in self.sites:
            yield (
                site.module or TOP_LEVEL,
                "x".join(map(str, site.query_shape)),
                "x".join(map(str, site.key_shape)),
                str(site.dtype).removeprefix("torch."),
                str(site.calls),
                "sparse" if site.replaced else "dense",
                f"{site.flops_saved:.0%}",
                site.why,
            )
        for call in self.not_traced:
            yield (
                call.module or TOP_LEVEL,
                "x".join(map(str, call.query_shape)),
                "x".join(map(str, call.key_shape)),
                "",
                str(call.calls),
                "not traced",
                "",
                f"{call.reason} ({call.kind})",
            )


def explain(model: nn.Module, /, *args: Any, **kwargs: Any) -> Report:
    """Run a model once and report every attention in it, traced or not.

    Args:
        model: a model compiled with `backend="pisa"`, as a whole or in regions, which is reported
            as it runs; or any other module, which is reported as `torch.compile(model,
            backend="pisa")` would treat it. Policies on its modules are followed in both cases.
        *args, **kwargs: what the model is called with. Gradients are off during the call.

    Returns:
        A `Report`. `print(report)` shows it as a table.

    Raises:
        RuntimeError: the model is compiled, but none of it with `backend="pisa"`.
    """
    compiled = is_compiled(model)
    call = model if compiled else torch.compile(model, backend="pisa", options={"inner": "eager"})
    with recording() as active, torch.no_grad(), _watch(model, active) as eager:
        call(*args, **kwargs)
    not_traced = eager.found() if eager is not None else ()
    if active.graphs == 0 and (compiled or not not_traced):
        raise RuntimeError(
            "no graph compiled with backend='pisa' ran; "
            + ("the model is compiled with another backend" if compiled else "nothing was traced")
        )
    return Report(
        sites=sites_of(active.decisions, ModuleNames(model)),
        graphs=active.graphs,
        not_traced=not_traced,
        notes=(*active.notes, *map(_idle, active.idle_patterns)),
    )


def _idle(pattern: str) -> str:
    return f"the policy for {pattern!r} stands around no attention that was traced"


def _watch(model: nn.Module, active: Recording) -> AbstractContextManager[EagerAttention | None]:
    if not hasattr(EagerAttention.__base__, "ignore_compile_internals"):
        return nullcontext()  # with this torch, Dynamo would not compile under a mode
    return EagerAttention(model, watching=lambda: not active.inside)


def report_of(counted: Tally) -> Report:
    """What the graphs of a whole program did; modules are named as they were traced.

    `graphs` counts those that ran, and `calls` their runs.
    """
    sites: list[Site] = []
    for graph in counted.graphs:
        # A part of a graph may run several times within it.
        calls: Counter[int] = Counter()
        for decision, count in graph.counted():
            calls[id(decision)] += count
        unique = {id(decision): decision for decision in graph.decisions}
        sites += [_site(x, calls[key], ModuleNames()) for key, x in unique.items() if calls[key]]
    return Report(sites=tuple(sites), graphs=sum(graph.runs > 0 for graph in counted.graphs))


def sites_of(decisions: list[Decision], names: ModuleNames) -> tuple[Site, ...]:
    """What one call of a model did, from the decisions of the graphs that ran, in order."""
    # A graph that several blocks share makes the same decision (the same object) once per call.
    calls: dict[int, int] = {}
    for decision in decisions:
        calls[id(decision)] = calls.get(id(decision), 0) + 1
    unique = {id(decision): decision for decision in decisions}
    return tuple(_site(decision, calls[key], names) for key, decision in unique.items())


def _site(decision: Decision, calls: int, names: ModuleNames) -> Site:
    shapes = (decision.query_shape, decision.key_shape, decision.value_shape)
    # 3-D attention is [N, T, D]: N batches of one head.
    query, key, value = (s if len(s) == 4 else (s[0], 1, *s[1:]) for s in shapes)
    dense = flops = calls * dense_flops(query, key, value)
    if decision.replaced:
        sparsity = decision.policy.sparsity_at(current_step())
        settings = replace(decision.policy.settings(), sparsity=sparsity)
        flops = calls * attention_flops(query, key, value, settings)
    return Site(
        module=names.of(decision),
        replaced=decision.replaced,
        reason=decision.reason,
        policy=decision.policy,
        query_shape=decision.query_shape,
        key_shape=decision.key_shape,
        value_shape=decision.value_shape,
        dtype=decision.dtype,
        calls=calls,
        flops=flops,
        dense_flops=dense,
        notes=decision.notes,
    )


def _policy_text(policy: Policy) -> str:
    """The fields that matter to a reader: sparsity, and what is not at its default."""
    parts = [f"sparsity {policy.sparsity:g}", f"{policy.routing} + {policy.order}"]
    if policy.varying is not None:
        parts.insert(1, str(policy.varying))
    if policy.key_block_size not in (None, policy.block_size):
        parts.append(f"blocks {policy.block_size} x {policy.key_block_size}")
    elif policy.block_size != DEFAULT_BLOCK_SIZE:
        parts.append(f"block {policy.block_size}")
    if policy.exact != (0, 0):
        parts.append(f"exact {policy.exact}")
    if isinstance(policy.grid, tuple):
        parts.append(f"{'x'.join(map(str, policy.grid))} {policy.curve}")
    if policy.impl is not None:
        parts.append(policy.impl)
    return ", ".join(parts)
