"""Which denoising step is running: said by the user's loop or by a pipeline's scheduler.

The step is kept in a context variable, so that threads and asyncio tasks do not see each other's.
Compiled code never reads it: the callable that the backend returned does, before it runs a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import TracebackType

from ..ops import validation
from ..policies.schedule import Step

log = logging.getLogger("pisa_compile")


class Generation:
    """One run from noise to sample, and the one that it interrupts."""

    def __init__(self, source: object, count: int | None, noise: Sequence[float] | None) -> None:
        self.source = source
        self.count = count
        self.noise = noise
        self.outer: Generation | None = None
        self.step: Step | None = None
        self.go_to(0)

    def go_to(self, index: int) -> None:
        noise = None
        if self.noise is not None and index < len(self.noise):
            noise = self.noise[index]
        over = self.count is not None and index >= self.count
        self.step = None if over else Step(index, self.count, noise)


_current: ContextVar[Generation | None] = ContextVar("pisa_compile_generation", default=None)


def current_step() -> Step | None:
    """The step that the running generation is at, or None if none is known."""
    generation = _current.get()
    return None if generation is None else generation.step


def running(source: object) -> Generation | None:
    """The generation that `source` began and has not ended, also one that is interrupted."""
    generation = _current.get()
    while generation is not None and generation.source != source:
        generation = generation.outer
    return generation


def begin(
    source: object, count: int | None, noise: Sequence[float] | None = None, index: int = 0
) -> Generation:
    """Start a generation at step `index`. What else runs in this context is interrupted by it."""
    end(source)  # an earlier one that was given up
    generation = Generation(source, count, noise)
    generation.go_to(index)
    generation.outer = _current.get()
    _current.set(generation)
    return generation


def advance(source: object, index: int | None = None) -> None:
    """Go to step `index`, or to the next one; past the last one the generation ends."""
    generation = running(source)
    if generation is None or generation.step is None:
        return
    generation.go_to(generation.step.index + 1 if index is None else index)
    _current.set(generation if generation.step is not None else generation.outer)


def end(source: object) -> None:
    """Forget the generation that `source` began; the one that it interrupted goes on."""
    generation = running(source)
    if generation is not None:
        _current.set(generation.outer)


def set_step(
    index: int | None, num_steps: int | None = None, *, noise: float | None = None
) -> None:
    """Say which denoising step the following model calls belong to, in this thread.

        for index, t in enumerate(timesteps):
            pisa.set_step(index, len(timesteps))
            latents = step(model(latents, t), latents)
        pisa.set_step(None)

    Args:
        index: steps that are done, from 0; None forgets the step.
        num_steps: steps of the whole generation. Schedules that count fractions or from the end
            need it.
        noise: noise level in [0, 1] before the step, for schedules that depend on it.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
    """
    step = None if index is None else Step(index, num_steps, noise)
    end(set_step)
    if step is not None:
        begin(set_step, num_steps).step = step


class denoising:  # noqa: N801  (used like a function)
    """The steps of one generation, for loops of one's own. The model may run often in each.

        with pisa.denoising(50) as steps:
            for i in steps:
                latents = ...                   # step i

        with pisa.denoising(50) as steps:       # where the loop is somebody else's
            sample(model, on_step_end=steps.step)

    Args:
        num_steps: how many steps there are.
        noise: noise level in [0, 1] before each step, for schedules that depend on it.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
        RuntimeError: more steps are taken than there are, or outside of `with`.
    """

    def __init__(self, num_steps: int, *, noise: Sequence[float] | None = None) -> None:
        validation.check_count("num_steps", num_steps)
        if noise is not None:
            noise = [float(level) for level in noise]
            if len(noise) != num_steps:
                raise ValueError(f"{num_steps} steps, but {len(noise)} noise levels")
            for level in noise:
                validation.check_fraction("a noise level", level)
        self.num_steps = num_steps
        self._noise = noise
        self._done = 0

    def __enter__(self) -> denoising:
        self._done = 0
        begin(self, self.num_steps, self._noise)
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end(self)
        if error is None and self._done == 0 and self.num_steps > 1:
            log.warning(
                "pisa.denoising(%d) ended at its first step: iterate over what it gives, or call "
                "its step() after each step",
                self.num_steps,
            )

    def __iter__(self) -> Iterator[int]:
        # Not by itself: a loop that an exception leaves would keep its step for later calls.
        while self._done < self.num_steps:
            yield self._done
            self.step()

    def step(self) -> None:
        """The current step is done."""
        if self._done >= self.num_steps:
            raise RuntimeError(f"all {self.num_steps} steps of pisa.denoising are done")
        if running(self) is None:
            raise RuntimeError("the steps are taken inside of `with pisa.denoising(...) as steps:`")
        self._done += 1
        advance(self)
