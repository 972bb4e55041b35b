"""Calibrating a diffusers pipeline: its transformer is the model, a call of it is a generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...steps.scheduler import attach
from ..stand_ins import Generate

_MODELS = ("transformer", "unet")


def of_pipeline(pipeline: Any) -> tuple[nn.Module, Generate]:
    """The denoising model of a pipeline and a function that generates with a stand-in for it.

    Inputs are dicts of the pipeline's arguments. They must fix the noise, by `generator` or
    `latents`. Latents are compared unless `output_type` says otherwise.

    Raises:
        TypeError: the pipeline has no denoising model.
    """
    name = next((n for n in _MODELS if isinstance(getattr(pipeline, n, None), nn.Module)), None)
    if name is None:
        raise TypeError(
            "calibrate() takes an nn.Module or a pipeline with a transformer, got "
            f"{type(pipeline).__name__}"
        )

    def generate(model: nn.Module, arguments: Any) -> Any:
        if not isinstance(arguments, Mapping):
            raise TypeError(f"an input of a pipeline is a dict of its arguments, got {arguments!r}")
        if arguments.get("generator") is None and arguments.get("latents") is None:
            raise ValueError(
                "calibration compares generations from the same noise: give every input a "
                "generator=torch.Generator().manual_seed(...) or latents"
            )
        settings = {"output_type": "latent", "return_dict": False, **arguments}
        if (generator := settings.get("generator")) is not None:
            settings["generator"] = _copies(generator)
        original = getattr(pipeline, name)
        setattr(pipeline, name, model)
        try:
            with attach(pipeline):
                return pipeline(**settings)
        finally:
            setattr(pipeline, name, original)

    return getattr(pipeline, name), generate


def _copies(generator: Any) -> Any:
    """Generators in the same state, so that those of the user stay where they are."""
    if isinstance(generator, (list, tuple)):
        return [_copies(one) for one in generator]
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
