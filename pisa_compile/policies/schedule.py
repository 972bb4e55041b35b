"""Schedules: sparsity that depends on the denoising step and the head.

A schedule says what a site does at each step of a generation. It travels inside a policy as text,
and is evaluated on the host once per step, never while compiling: what it gives is data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ops import validation

Values = tuple[float, ...]
"""One number for all heads, or one for each."""


@dataclass(frozen=True)
class Step:
    """Where a generation stands.

    Attributes:
        index: steps that are done, from 0.
        count: steps of the whole generation, if known.
        noise: noise level before the step, 1 for pure noise and 0 for a clean sample, if known.
    """

    index: int
    count: int | None = None
    noise: float | None = None

    def __post_init__(self) -> None:
        validation.check_count("the step", self.index)
        if self.count is not None:
            validation.check_count("the number of steps", self.count)
            if self.index >= self.count:
                raise ValueError(f"step {self.index} of {self.count}: steps count from 0")
        if self.noise is not None:
            validation.check_fraction("the noise level", self.noise)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How sparse a site is at each denoising step.

        pisa.Policy(sparsity=0.875, schedule=pisa.Schedule(dense_first=0.2))
        pisa.Policy(schedule=pisa.Schedule(steps=[0.5, 0.7, 0.9]))

    Steps are dense where `dense_first`, `dense_last` or `dense_above` says so, the union of the
    three. Elsewhere the sparsity is that of `steps` or `ramp`, or else that of the policy.

    Attributes:
        dense_first, dense_last: steps at the start and end that are dense: a count, or a fraction
            of all steps as a float, rounded up.
        dense_above: steps whose noise level is this or more are dense. 1 is pure noise; with flow
            matching the level is sigma.
        steps: sparsity per step, each in [0, 1), one number or a list with one number per head.
            Stretched to the number of steps where that is another one.
        ramp: `(first, last)`: sparsity of the first and the last step that `dense_first` and
            `dense_last` leave, linear in between.
        without_steps: sparsity where no step is known. By default the mean over the steps of
            `steps` or `ramp`, or else the policy's sparsity.

    Raises:
        TypeError, ValueError: a field is not what is described above.
    """

    dense_first: int | float = 0
    dense_last: int | float = 0
    dense_above: float | None = None
    steps: tuple[float | Values, ...] | None = None
    ramp: tuple[float, float] | None = None
    without_steps: float | None = None

    def __post_init__(self) -> None:
        _check_extent("dense_first", self.dense_first)
        _check_extent("dense_last", self.dense_last)
        if self.dense_above is not None:
            validation.check_fraction("dense_above", self.dense_above)
        if self.without_steps is not None:
            validation.check_sparsity(self.without_steps)
        if self.steps is not None and self.ramp is not None:
            raise ValueError("a schedule has either steps or a ramp, not both")
        if self.steps is not None:
            object.__setattr__(self, "steps", _checked_steps(self.steps))
        if self.ramp is not None:
            object.__setattr__(self, "ramp", _checked_ramp(self.ramp))

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """A schedule from itself or from what `fields` gave.

        Raises:
            TypeError, ValueError: it is neither.
        """
        if isinstance(value, Schedule):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"schedule must be a pisa.Schedule, got {type(value).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(value) - names):
            raise ValueError(f"a schedule has no {unknown}; its fields are {sorted(names)}")
        return cls(**value)

    def fields(self) -> dict[str, Any]:
        """The fields that are set, as JSON can hold them."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @property
    def has_dense_steps(self) -> bool:
        """Whether some steps are dense for all heads."""
        if self.dense_first or self.dense_last or self.dense_above is not None:
            return True
        return any(max(_values(entry)) == 0.0 for entry in self.steps or ())

    @property
    def heads(self) -> int | None:
        """Number of heads, where `steps` lists them."""
        counts = {len(_values(entry)) for entry in self.steps or ()} - {1}
        return max(counts, default=None)

    @property
    def dense_steps_alone(self) -> Schedule:
        """The same dense steps, the sparsity of the others left to the policy."""
        return dataclasses.replace(self, steps=None, ramp=None, without_steps=None)

    def varies(self, sparsity: float) -> bool:
        """Whether it is anything but one number for all steps and heads."""
        given = {_values(entry) for entry in self.steps or self.ramp or (sparsity,)}
        if self.without_steps is not None:
            given.add((self.without_steps,))
        return self.has_dense_steps or len(given) > 1 or self.heads is not None

    def constant_when_sparse(self, sparsity: float) -> bool:
        """Whether the policy's `sparsity` holds at every step that is not dense."""
        given = {_values(entry) for entry in self.steps or self.ramp or (sparsity,)}
        return given == {(sparsity,)} and self.without_steps in (None, sparsity)

    def knows(self, step: Step | None) -> bool:
        """Whether a step says all that the schedule asks for."""
        if step is None:
            return False
        fractions = isinstance(self.dense_first, float) or self.dense_last != 0
        if step.count is None and (fractions or self.ramp is not None):
            return False
        return step.noise is not None or self.dense_above is None

    def densities(self, step: Step | None, sparsity: float) -> Values:
        """The density, 1 for dense attention, at a step: for all heads, or for each.

        Args:
            step: None, or one that does not say what the schedule asks for, gives the densities
                without a known step.
            sparsity: the policy's.
        """
        if step is None or not self.knows(step):
            return self._without_steps(sparsity)
        first, last = self._sparse_steps(step.count)
        noisy = self.dense_above is not None and (step.noise or 0.0) >= self.dense_above
        if noisy or not first <= step.index < last:
            return (1.0,)
        if self.ramp is not None:
            start, end = self.ramp
            place = (step.index - first) / max(last - 1 - first, 1)
            return (1.0 - (start + (end - start) * place),)
        if self.steps is None:
            return (1.0 - sparsity,)
        place = step.index
        if step.count is not None:
            place = step.index * len(self.steps) // step.count
        return _densities(self.steps[min(place, len(self.steps) - 1)])

    def _without_steps(self, sparsity: float) -> Values:
        if self.without_steps is not None:
            return (1.0 - self.without_steps,)
        entries = [_densities(entry) for entry in self.steps or self.ramp or (sparsity,)]
        width = max(map(len, entries))
        wide = [entry * width if len(entry) == 1 else entry for entry in entries]
        return tuple(math.fsum(column) / len(wide) for column in zip(*wide, strict=True))

    def _sparse_steps(self, count: int | None) -> tuple[int, float]:
        """Range `[first, last)` of the steps that `dense_first` and `dense_last` leave."""
        first = _extent(self.dense_first, count)
        return first, math.inf if count is None else count - _extent(self.dense_last, count)

    def __str__(self) -> str:
        words = [
            f"first {_extent_text(self.dense_first)} dense" if self.dense_first else "",
            f"last {_extent_text(self.dense_last)} dense" if self.dense_last else "",
            "" if self.dense_above is None else f"dense above noise {self.dense_above:g}",
            "" if self.steps is None else f"sparsity listed for {len(self.steps)} steps",
            "" if self.ramp is None else f"sparsity from {self.ramp[0]:g} to {self.ramp[1]:g}",
            "" if self.heads is None else f"{self.heads} heads",
            "" if self.without_steps is None else f"{self.without_steps:g} without steps",
        ]
        return "; ".join(word for word in words if word) or "constant"


def _values(entry: float | Values) -> Values:
    return entry if isinstance(entry, tuple) else (entry,)


@functools.lru_cache(maxsize=4096)
def _densities(entry: float | Values) -> Values:
    return tuple(1.0 - sparsity for sparsity in _values(entry))


def _extent(extent: int | float, count: int | None) -> int:
    if isinstance(extent, int):
        return extent
    return math.ceil(extent * (count or 0) - 1e-6)


def _extent_text(extent: int | float) -> str:
    if isinstance(extent, float):
        return f"{extent:.0%} of the steps"
    return f"{extent} step{'' if extent == 1 else 's'}"


def _check_extent(name: str, extent: Any) -> None:
    if isinstance(extent, float):
        validation.check_fraction(name, extent)
    else:
        validation.check_count(name, extent)


def _checked_steps(steps: Any) -> tuple[float | Values, ...]:
    expected = "steps must list a sparsity in [0, 1) per step, or a list of them, one per head"
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise TypeError(f"{expected}; got {steps!r}")
    checked: list[float | Values] = []
    for entry in steps:
        if isinstance(entry, Sequence) and not isinstance(entry, str) and entry:
            checked.append(tuple(map(_sparsity, entry)))
        else:
            checked.append(_sparsity(entry))
    counts = {len(entry) for entry in checked if isinstance(entry, tuple)}
    if len(counts) > 1:
        raise ValueError(f"steps list different numbers of heads: {sorted(counts)}")
    return tuple(checked)


def _checked_ramp(ramp: Any) -> tuple[float, float]:
    if isinstance(ramp, str) or not isinstance(ramp, Sequence) or len(ramp) != 2:
        raise TypeError(f"ramp must be two sparsities, of the first and last step; got {ramp!r}")
    return _sparsity(ramp[0]), _sparsity(ramp[1])


def _sparsity(value: Any) -> float:
    validation.check_sparsity(value)
    return float(value)
