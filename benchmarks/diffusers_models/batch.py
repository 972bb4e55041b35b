"""The masked cases with a batch of two, whose masks differ: what guidance makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .case import CASES, Case, Inputs

MASKED = (
    "ChromaTransformer2DModel/mask",
    "Krea2Transformer2DModel",
    "ErnieImageTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "BriaFibo2Transformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "Kandinsky6Transformer3DModel",
    "JoyImageEditPlusTransformer3DModel",
    "LongCatAudioDiTTransformer",
    "AllegroTransformer3DModel",
    "LuminaNextDiT2DModel",
)
_PER_SAMPLE = ("shape_list",)  # lists with an entry for each sample
VALID = 12  # tokens in the masks of the second sample


def doubled(inputs: Inputs) -> Inputs:
    """Inputs for a batch of two, made from those for one."""
    result: Inputs = pytree.tree_map_with_path(_doubled, inputs)
    for name, value in inputs.items():
        if name in _PER_SAMPLE:
            result[name] = value * 2
    return result


def _doubled(path: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 1:
        return value
    name = str(path[0])
    second = value.roll(1, dims=-1).clone()
    if "text_lens" in name:
        second[:] = VALID
    elif "mask" in name:
        second = value.clone()
        second[..., VALID:] = 0
    return torch.cat([value, second])


def register_batches() -> None:
    """Add the cases; those they are made from must be there."""
    for name in MASKED:
        one = CASES[name]
        two = replace(one, name=f"{name}, batch of 2", make_inputs=partial(_inputs_of_two, one))
        CASES[two.name] = two


def _inputs_of_two(one: Case) -> Inputs:
    return doubled(one.make_inputs())
