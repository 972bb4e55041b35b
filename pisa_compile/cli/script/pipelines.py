"""Pipelines of diffusers tell `pisa run` their denoising steps, as `pisa.attach` has them do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ...steps.scheduler import attach
from .after_import import after_import

_HOME = "diffusers.pipelines.pipeline_utils"


@contextmanager
def followed_steps() -> Iterator[None]:
    """Attach to every scheduler that a pipeline gets inside, when it is made or later."""
    patched: list[tuple[Any, Any]] = []

    def patch(module: ModuleType) -> None:
        pipeline: Any = vars(module)["DiffusionPipeline"]
        original = pipeline.__setattr__
        patched.append((pipeline, original))

        def set_and_follow(self: Any, name: str, value: Any) -> None:
            original(self, name, value)
            if callable(getattr(value, "set_timesteps", None)) and callable(
                getattr(value, "step", None)
            ):
                attach(value)

        pipeline.__setattr__ = set_and_follow

    with after_import(_HOME, patch):
        try:
            yield
        finally:
            for pipeline, original in patched:
                pipeline.__setattr__ = original
