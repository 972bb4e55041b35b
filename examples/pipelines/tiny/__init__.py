"""Pipelines of diffusers with tiny random weights, for trying things without a download.

They are the real classes, with real schedulers and autoencoders; only sizes and weights are not
those of a published model. Prompts are given as random embeddings, so there is no text encoder.
Pictures come out as noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import image, video
from .parts import TEXT_TOKENS as TEXT_TOKENS


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline and what it is called with.

    Attributes:
        name: of the pipeline's class.
        make: builds the pipeline.
        make_arguments: prompt embeddings and guidance for a call; the argument is True for
            guidance by a second, negative prompt.
        sizes: two sizes that the pipeline accepts, as keyword arguments of a call. The second
            gives more tokens.
    """

    name: str
    make: Callable[[], Any]
    make_arguments: Callable[[bool], dict[str, Any]]
    sizes: tuple[dict[str, int], dict[str, int]]

    def build(self) -> Any:
        """The pipeline, in evaluation mode, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.make()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipe

    def arguments(self, guided: bool = False) -> dict[str, Any]:
        """Prompt embeddings and guidance, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make_arguments(guided)


def _image(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _video(side: int, frames: int) -> dict[str, int]:
    return _image(side) | {"num_frames": frames}


TINY = {
    "FluxPipeline": TinyPipeline(
        "FluxPipeline", image.flux, image.flux_arguments, (_image(64), _image(72))
    ),
    "WanPipeline": TinyPipeline(
        "WanPipeline", video.wan, video.video_arguments, (_video(128, 9), _video(160, 9))
    ),
    "HunyuanVideoPipeline": TinyPipeline(
        "HunyuanVideoPipeline",
        video.hunyuan_video,
        video.hunyuan_video_arguments,
        (_video(128, 9), _video(160, 9)),
    ),
    "CogVideoXPipeline": TinyPipeline(
        "CogVideoXPipeline",
        video.cogvideox,
        video.video_arguments,
        (_video(128, 9), _video(160, 9)),
    ),
    "StableDiffusion3Pipeline": TinyPipeline(
        "StableDiffusion3Pipeline", image.sd3, image.sd3_arguments, (_image(64), _image(48))
    ),
    "LTXPipeline": TinyPipeline(
        "LTXPipeline", video.ltx, video.ltx_arguments, (_video(64, 9), _video(96, 9))
    ),
}
"""The tiny pipelines by class name."""
