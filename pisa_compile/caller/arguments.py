"""What the arguments of a model say about the grid of its tokens.

The names are those of diffusers. Whoever takes a grid checks that it has as many cells as there are
tokens, so what is read here may be a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.token_order import CallerTokens, Grid

_LATENTS = ("hidden_states", "sample", "x")
_SIZES = ("num_frames", "height", "width")


def tokens_of_call(module: nn.Module, given: Mapping[str, Any]) -> CallerTokens:
    """What a model that is called with the arguments `given` says about its tokens.

    Packed tokens: the position of each (`img_ids`: FLUX and its family, which put those with
    `txt_ids` first), their sizes (`img_shapes`: Qwen-Image; `num_frames`, `height` and `width`:
    LTX). Otherwise the latents, [B, C, H, W] or of rank 5, and the patch size in the model's
    configuration.
    """
    grids = (
        *_from_ids(given.get("img_ids")),
        *_from_shapes(given.get("img_shapes")),
        *_from_sizes([given.get(name) for name in _SIZES]),
        *_from_latents(module, given),
    )
    text = given.get("txt_ids")
    prefix = text.shape[-2] if isinstance(text, Tensor) and text.dim() >= 2 else 0
    return CallerTokens(tuple(dict.fromkeys(grids)), prefix)


_read: MutableMapping[Tensor, tuple[int | None, Grid | None]] = WeakIdKeyDictionary()


def _from_ids(ids: Any) -> Iterator[Grid]:
    """Position ids [T, axes] or [B, T, axes] that count row by row.

    A pipeline passes one tensor to all steps. It is read once: on a GPU, that waits for the device.
    """
    if not isinstance(ids, Tensor) or ids.dim() not in (2, 3) or isinstance(ids, FakeTensor):
        return
    version = None if ids.is_inference() else ids._version
    known = _read.get(ids)
    if known is None or known[0] != version:
        if ids.is_meta or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        known = version, _grid_of_ids(ids.detach().reshape(-1, *ids.shape[-2:])[0].cpu())
        _read[ids] = known
    if known[1] is not None:
        yield known[1]


def _grid_of_ids(ids: Tensor) -> Grid | None:
    """The grid whose cells have, row by row, the positions `ids` [T, axes], or None."""
    coordinates = [torch.unique(column, return_inverse=True) for column in ids.unbind(1)]
    varying = [(len(values), place) for values, place in coordinates if len(values) > 1]
    if not 2 <= len(varying) <= 3:
        return None
    rank = torch.zeros(len(ids), dtype=torch.long)
    for size, place in varying:
        rank = rank * size + place
    grid = tuple(size for size, _ in varying)
    return grid if torch.equal(rank, torch.arange(len(ids))) else None


def _from_shapes(shapes: Any) -> Iterator[Grid]:
    """`[(t, h, w)]`, or a list of such lists, one for each sample."""
    while isinstance(shapes, (list, tuple)) and shapes and isinstance(shapes[0], (list, tuple)):
        if len(shapes) > 1 and isinstance(shapes[0][0], int):
            return  # several pictures in one sequence
        shapes = shapes[0]
    if isinstance(shapes, (list, tuple)):
        yield from _from_sizes(shapes)


def _from_sizes(sizes: Sequence[Any]) -> Iterator[Grid]:
    if len(sizes) in (2, 3) and all(isinstance(size, int) and size > 0 for size in sizes):
        grid = tuple(size for size in sizes if size > 1)
        if len(grid) > 1:
            yield grid


def _from_latents(module: nn.Module, given: Mapping[str, Any]) -> Iterator[Grid]:
    patch, frames = (_setting(module, name) for name in ("patch_size", "patch_size_t"))
    latents = next((given[name] for name in _LATENTS if given.get(name) is not None), None)
    if isinstance(latents, list) and latents:
        latents = latents[0]  # one [C, T, H, W] for each sample
        latents = latents[None] if isinstance(latents, Tensor) else latents
    if not isinstance(latents, Tensor) or latents.dim() not in (4, 5):
        return
    steps = _steps(patch, frames)
    if steps is None:
        return
    if latents.dim() == 4:
        yield from _from_sizes(_patches(latents.shape[2:], steps[1:]))
        return
    # [B, C, T, H, W], [B, T, C, H, W], [B, T, H, W, C]
    for axes in ((2, 3, 4), (1, 3, 4), (1, 2, 3)):
        yield from _from_sizes(_patches([latents.shape[at] for at in axes], steps))


def _patches(sizes: Sequence[int], steps: Sequence[int]) -> list[int]:
    return [size // step for size, step in zip(sizes, steps, strict=True)]


def _steps(patch: Any, frames: Any) -> tuple[int, int, int] | None:
    """Patch sides in (t, h, w)."""
    if isinstance(patch, int):
        patch = (patch, patch)
    if not isinstance(patch, (list, tuple)) or not all(isinstance(side, int) for side in patch):
        return None
    sides = (frames if isinstance(frames, int) else 1, *patch) if len(patch) == 2 else tuple(patch)
    return sides if len(sides) == 3 and min(sides) > 0 else None


def _setting(module: nn.Module, name: str) -> Any:
    config = getattr(module, "config", None)
    if isinstance(config, Mapping) and name in config:
        return config[name]
    return getattr(config, name, getattr(module, name, None))
