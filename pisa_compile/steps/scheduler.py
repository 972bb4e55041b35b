"""`attach`: learn the denoising step from the scheduler of a diffusers pipeline.

The scheduler is what every pipeline tells about its steps: `set_timesteps` starts a generation,
`step` ends a step, however often and with however many models the pipeline computed it. Both are
wrapped on the instance, outside of everything that is compiled.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from . import clock as steps

_METHODS = ("set_timesteps", "set_begin_index", "step")


class Attachment:
    """What `attach` returns. `detach()`, or leaving a `with` block, undoes it."""

    def __init__(self, schedulers: list[Any]) -> None:
        self._schedulers = schedulers

    def detach(self) -> None:
        """Stop following. The schedulers are as they were before."""
        for scheduler in self._schedulers:
            for name in _METHODS:
                wrapper = vars(scheduler).get(name)
                if _is_ours(wrapper):
                    _, _, outer = wrapper.args
                    delattr(scheduler, name)
                    if outer is not None:
                        setattr(scheduler, name, outer)
            steps.end(_source(scheduler))
        self._schedulers = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(pipeline: Any) -> Attachment:
    """Let schedules follow the denoising steps of a diffusers pipeline.

        pipe = WanPipeline.from_pretrained(...)
        pipe.transformer = torch.compile(pipe.transformer, backend="pisa")
        pisa.attach(pipe)
        pipe(prompt)

    Works with every pipeline whose scheduler has `set_timesteps` and `step`. Each generation starts
    anew; a step lasts until the scheduler's `step` is called, so guidance that runs the model twice
    and pipelines with two models (Wan 2.2) need nothing else. Threads do not mix. A pipeline that
    is given another scheduler later has to be attached again.

    Args:
        pipeline: the pipeline, or a scheduler.

    Raises:
        TypeError: there is no scheduler in it.
    """
    parts = [pipeline, *getattr(pipeline, "__dict__", {}).values()]
    schedulers = [part for part in parts if _is_scheduler(part)]
    if not schedulers:
        raise TypeError(
            "attach() takes a pipeline with a scheduler that has set_timesteps() and step(), got "
            f"{type(pipeline).__name__}; pisa.denoising and pisa.set_step serve other loops"
        )
    for scheduler in schedulers:
        for name in _METHODS:
            if hasattr(scheduler, name) and not _is_ours(vars(scheduler).get(name)):
                _wrap(scheduler, name)
    return Attachment(schedulers)


def _is_scheduler(part: Any) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("set_timesteps", "step"))


def _wrap(scheduler: Any, name: str) -> None:
    # A partial and not a closure: a copy of the scheduler gets one that is bound to the copy. The
    # identity tells the two apart, for only the original is followed.
    outer = vars(scheduler).get(name)
    signature = inspect.signature(getattr(scheduler, name))
    wrapper = functools.partial(_FOLLOWERS[name], scheduler, id(scheduler), outer)
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # pipelines look at it
    setattr(scheduler, name, wrapper)


def _is_ours(attribute: Any) -> bool:
    return isinstance(attribute, functools.partial) and attribute.func in _FOLLOWERS.values()


def _set_timesteps(scheduler: Any, identity: int, outer: Any, *args: Any, **kwargs: Any) -> Any:
    result = _original(scheduler, "set_timesteps", outer)(*args, **kwargs)
    if id(scheduler) == identity:
        steps.begin(_source(scheduler), len(scheduler.timesteps), noise_levels(scheduler))
    return result


def _set_begin_index(scheduler: Any, identity: int, outer: Any, *args: Any, **kwargs: Any) -> Any:
    result = _original(scheduler, "set_begin_index", outer)(*args, **kwargs)
    if id(scheduler) == identity and scheduler.begin_index is not None:
        steps.advance(_source(scheduler), scheduler.begin_index)
    return result


def _step(scheduler: Any, identity: int, outer: Any, *args: Any, **kwargs: Any) -> Any:
    result = _original(scheduler, "step", outer)(*args, **kwargs)
    if id(scheduler) == identity:
        # Counted by the scheduler itself where it can: image-to-image starts in the middle.
        index = getattr(scheduler, "step_index", None)
        steps.advance(_source(scheduler), index if isinstance(index, int) else None)
    return result


_FOLLOWERS: dict[str, Callable[..., Any]] = {
    "set_timesteps": _set_timesteps,
    "set_begin_index": _set_begin_index,
    "step": _step,
}


def _original(scheduler: Any, name: str, outer: Any) -> Callable[..., Any]:
    inherited = getattr(type(scheduler), name)
    function: Callable[..., Any] = outer or functools.partial(inherited, scheduler)
    return function


def _source(scheduler: Any) -> tuple[str, int]:
    """What stands for a scheduler's generations. Schedulers may compare equal, these do not."""
    return ("scheduler", id(scheduler))


def noise_levels(scheduler: Any) -> list[float] | None:
    """The noise level before each of the scheduler's timesteps, or None if it does not tell.

    A level t means samples `(1 - t) * clean + t * noise` up to their scale. Flow matching
    has it as sigma; elsewhere sigma is the ratio of noise to signal, and t = sigma / (1 + sigma).
    """
    config = getattr(scheduler, "config", {})
    count = len(scheduler.timesteps)
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= count:
        ratios = sigmas.tolist()[:count]
        if config.get("invert_sigmas"):
            ratios = [1.0 - sigma for sigma in ratios]
        flow = (
            type(scheduler).__name__.startswith("FlowMatch")
            or config.get("use_flow_sigmas")
            or config.get("prediction_type") == "flow_prediction"
        )
        levels = ratios if flow else [sigma / (1.0 + sigma) for sigma in ratios]
    elif isinstance(alphas, Tensor):
        kept = alphas.to("cpu")[scheduler.timesteps.to("cpu").long()].tolist()
        levels = [1.0 / (1.0 + math.sqrt(alpha / (1.0 - alpha))) for alpha in kept]
    else:
        return None
    return [min(max(level, 0.0), 1.0) for level in levels]
