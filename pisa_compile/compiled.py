"""What the backend returns: compiled graphs, and what each call of them looks up.

Nothing here is traced. What changes from call to call becomes tensors, arguments of the graph after
its own: the densities of the denoising step, and the numbers of the calls of shared regions.
They stay on the graph's device, so that what comes again costs no copy and no synchronisation.

Both classes can be saved, which `torch._dynamo.aot_compile` asks of what a backend returns: a saved
object is what torch saves of the compiled graph, and our record of it.
"""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.aot_compile_types import (
    BundledAOTAutogradSerializableCallable,
    SerializableCallable,
)
from torch.autograd import forward_ad

from .caller import tokens_of_caller
from .ops.token_order import called_with
from .passes import Decision, DensityInput
from .policies.schedule import Step, Values
from .report.recording import Recorded, note
from .steps.clock import current_step

log = logging.getLogger("pisa_compile")

_NO_STEP = (
    "a schedule depends on the denoising step and no step is known, so its settings without steps "
    "hold; make the step known with pisa.attach(pipeline), pisa.denoising or pisa.set_step"
)


class Variant(SerializableCallable):
    """One compiled graph.

    Args:
        compiled: takes the graph's own arguments, then those below.
        decisions: that were taken in it.
        numbers: an example of the vector of numbers that it takes, if it does.
        follows_caller: whether an order of tokens in it is that of the model that is being called.
        note: what a report should say of it besides.
        patterns: names of modules that policies of the compile call are for.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        decisions: Sequence[Decision],
        numbers: Tensor | None,
        follows_caller: bool,
        note: str | None = None,
        patterns: Sequence[str] = (),
    ) -> None:
        self._graph = compiled
        self._record = tuple(decisions), note, tuple(patterns)
        self._compiled = Recorded(compiled, *self._record)
        self._numbers = () if numbers is None else (_numbers(len(numbers), numbers.device),)
        self._follows_caller = follows_caller

    def __call__(self, *args: Any) -> Any:
        if not self._follows_caller:
            return self._compiled(*args, *self._numbers)
        with called_with(tokens_of_caller()):
            return self._compiled(*args, *self._numbers)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Variant) -> bytes:
        numbers = fn._numbers[0] if fn._numbers else None
        decisions, note, patterns = fn._record
        arguments = decisions, numbers, fn._follows_caller, note, patterns
        return pickle.dumps((_saved(fn._graph), arguments))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Variant:
        (restore, graph), arguments = pickle.loads(data)
        return cls(restore(graph), *arguments)


class Stepwise(SerializableCallable):
    """A graph whose ops have schedules: the variant of the current step runs.

    Args:
        sparse: with a `density.table`, it takes a table of densities after its own arguments.
        dense: the same graph with dense attention in the place of its scheduled ops, for steps at
            which all of them are dense.
    """

    def __init__(
        self, sparse: Callable[..., Any], dense: Callable[..., Any] | None, density: DensityInput
    ) -> None:
        self._sparse = sparse
        self._dense = dense
        self._density = density
        self._values = functools.lru_cache(maxsize=1024)(self._values_at)

    def __call__(self, *args: Any) -> Any:
        known, values = self._values(current_step())
        if not known:
            _warn_once()
            note(_NO_STEP)
        if self._dense is not None and all(min(row) >= 1.0 for row in values):
            return self._dense(*args)
        width = self._density.width
        if width is None:
            return self._sparse(*args)
        return self._sparse(*args, _table(values, width, self._density.device))

    @classmethod
    def serialize_compile_artifacts(cls, fn: Stepwise) -> bytes:
        variants = [None if x is None else _saved(x) for x in (fn._sparse, fn._dense)]
        return pickle.dumps((variants, fn._density.without_trace()))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Stepwise:
        variants, density = pickle.loads(data)
        sparse, dense = (x and x[0](x[1]) for x in variants)
        return cls(sparse, dense, density)

    def _values_at(self, step: Step | None) -> tuple[bool, tuple[Values, ...]]:
        """Whether all schedules know the step, and the densities of each."""
        rows = self._density.rows
        known = all(row.schedule.knows(step) for row in rows)
        return known, tuple(row.schedule.densities(step, row.sparsity) for row in rows)


class KeepingTangents(SerializableCallable):
    """A compiled graph, but the graph as it was traced where arguments carry forward-mode tangents.

    The op has no derivative, and torch would drop them without a word.
    """

    def __init__(self, run: Callable[..., Any], traced: Callable[..., Any]) -> None:
        self._run = run
        self._traced = traced

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            _tell_of_tangents()
            return self._traced(*args)
        return self._run(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: KeepingTangents) -> bytes:
        return pickle.dumps(_saved(fn._run))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        """The compiled graph alone: what was traced is not saved."""
        restore, graph = pickle.loads(data)
        return restore(graph)


def _saved(compiled: Callable[..., Any]) -> tuple[Callable[[bytes], Any], bytes]:
    """What restores a compiled callable, and from what.

    Raises:
        RuntimeError: torch cannot save it.
    """
    if not isinstance(compiled, SerializableCallable):
        if getattr(compiled, "serialize", None) is None:
            raise RuntimeError(
                f"torch {torch.__version__} cannot save a compiled graph of type "
                f"{type(compiled).__name__}; aot_compile needs inner='inductor' or 'aot_eager' and "
                "torch's compile caches switched on"
            )
        compiled = BundledAOTAutogradSerializableCallable(compiled)
    kind = type(compiled)
    return kind.deserialize_compile_artifacts, kind.serialize_compile_artifacts(compiled)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


@functools.cache
def _tell_of_tangents() -> None:
    log.warning(
        "attention stays dense, and the graph around it is not compiled, where arguments carry "
        "tangents of forward-mode differentiation"
    )


@functools.cache
def _warn_once() -> None:
    log.warning("%s", _NO_STEP)


@functools.lru_cache(maxsize=1024)
def _table(rows: tuple[Values, ...], width: int, device: torch.device) -> Tensor:
    full = [(*row, *row[-1:] * (width - len(row))) for row in rows]
    # Made under inference mode it could not be used outside of it.
    with torch.inference_mode(False):
        return torch.tensor(full, dtype=torch.float32).to(device)


@functools.lru_cache(maxsize=1024)
def _numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device=device)
