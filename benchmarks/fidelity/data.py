"""Attention inputs: captured from the photo DiT, made with structure, and made to hurt.

All have 4,096 tokens on a 64 x 64 grid, in raster order, and head dimension 64.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.photo_dit.sampling import euler_step, noise, time_grid

GRID = (64, 64)
TOKENS = 64 * 64
HEAD_DIM = 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# (seed, photograph, step of 24): early, middle and late, as the noise gives way to the picture.
TRAJECTORIES = ((0, 3, 2), (5, 7, 10), (11, 1, 18))


@dataclass(frozen=True)
class Sample:
    """One attention call. Tensors are [1, H, T, D]; `place` says where it comes from."""

    group: str
    place: str
    query: Tensor
    key: Tensor
    value: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # By value: between processes torch would share the memory through file descriptors, for
        # which the sender has to stay reachable.
        arrays = (x.detach().numpy() for x in (self.query, self.key, self.value))
        return _unpickled, (self.group, self.place, *arrays)


def _unpickled(group: str, place: str, *arrays: Any) -> Sample:
    query, key, value = map(torch.from_numpy, arrays)
    return Sample(group, place, query, key, value)


@contextmanager
def replaced_attention(attention: Attention) -> Iterator[None]:
    """Every `F.scaled_dot_product_attention` inside calls `attention`."""
    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


@torch.no_grad()
def captured(model: nn.Module, quick: bool = False) -> Iterator[Sample]:
    """Query, key and value of every layer, at one step of each of three sampling trajectories."""
    dense = functional.scaled_dot_product_attention
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((query, key, value))
        return dense(query, key, value)

    for seed, label, last in TRAJECTORIES[:1] if quick else TRAJECTORIES:
        x = noise(seed, 4 * GRID[0])
        times = itertools.pairwise(time_grid(24))
        for step, (start, end) in enumerate(itertools.islice(times, last + 1)):
            calls.clear()
            with replaced_attention(record if step == last else dense):
                x = euler_step(model, x, torch.tensor([label]), start, end)
        for layer, (query, key, value) in enumerate(calls):
            place = f"seed {seed}, step {last}, layer {layer}"
            yield Sample("captured", place, query, key, value)


def structured(quick: bool = False) -> Iterator[Sample]:
    """Smooth random fields with rotary positions: four kinds of head at three temperatures."""
    for kind in ("local", "semantic", "mixed", "diffuse")[: 1 if quick else None]:
        for temperature in (1.0,) if quick else (0.5, 1.0, 2.0):
            q, k, v = (x[None, None] for x in _structured_head(kind, temperature, seed=7))
            yield Sample("structured", f"{kind}, temperature {temperature:g}", q, k, v)


def adversarial(quick: bool = False) -> Iterator[Sample]:
    """What breaks expansions around a mean: outliers, sinks, several modes, hot channels."""
    for name, tensors in itertools.islice(_adversarial_heads(), 2 if quick else None):
        q, k, v = (x[None, None] for x in tensors)
        yield Sample("adversarial", name, q, k, v)


def _field(scale: float, generator: torch.Generator) -> Tensor:
    """[T, D] that varies over about `scale` tokens of the grid."""
    side = max(2, round(GRID[0] / scale))
    coarse = torch.randn(1, HEAD_DIM, side, side, generator=generator)
    fine = functional.interpolate(coarse, GRID, mode="bicubic", align_corners=True)
    return fine[0].flatten(1).T


_WEIGHTS = {  # of the length scales 2, 6, 16, 48
    "local": (1.0, 0.5, 0.2, 0.1),
    "semantic": (0.1, 0.3, 1.0, 1.0),
    "mixed": (0.5, 0.5, 0.5, 0.5),
    "diffuse": (0.2, 0.2, 0.2, 0.3),
}
_HEAT = {"local": 1.5, "semantic": 1.0, "mixed": 1.2, "diffuse": 0.5}


def _structured_head(kind: str, temperature: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def features() -> Tensor:
        scales = zip(_WEIGHTS[kind], (2, 6, 16, 48), strict=True)
        fields = sum(w * _field(scale, generator) for w, scale in scales)
        return fields + 0.3 * normal(TOKENS, HEAD_DIM)

    shared = features()
    mix, own = normal(HEAD_DIM, HEAD_DIM) / 8, normal(HEAD_DIM, HEAD_DIM) / 16
    query, key = (shared @ mix + features() @ own for _ in range(2))
    gain = 1 + 0.5 * normal(HEAD_DIM).abs()
    query, key = (x / x.square().mean(-1, keepdim=True).sqrt() * gain for x in (query, key))
    if kind in ("local", "mixed"):
        query, key = _rotate(query), _rotate(key)
    return query * temperature * _HEAT[kind], key, features()


def _rotate(x: Tensor) -> Tensor:
    """Two-dimensional rotary positions on half of the channels of [T, D]."""
    rows, columns = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    place = torch.stack((rows, columns), -1).reshape(-1, 2, 1).float()
    angle = (place * torch.logspace(0, -2, HEAD_DIM // 8)).flatten(1)
    a, b, rest = x.split((HEAD_DIM // 4, HEAD_DIM // 4, HEAD_DIM // 2), dim=1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=1)


def _adversarial_heads() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (x.double() for x in _structured_head("mixed", 1.0, seed=1))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def with_entries(x: Tensor, value: float, count: int = 40) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        places = torch.randint(x.numel(), (count,), generator=generator)
        x.view(-1)[places] = value
        return x

    def scaled(x: Tensor, rows: slice | Tensor, columns: slice | int, factor: float) -> Tensor:
        x = x.clone()
        x[rows, columns] *= factor
        return x

    every = slice(None)
    some = torch.randint(TOKENS, (120,), generator=generator)
    direction = q.mean(0) / q.mean(0).norm()
    sinks = k.clone()
    sinks[:4] = 30 * direction
    yield "entries of 1e3 in the keys", (q, with_entries(k, 1e3), v)
    yield "entries of 1e3 in the queries", (with_entries(q, 1e3), k, v)
    yield "entries of 1e3 in the values", (q, k, with_entries(v, 1e3))
    yield "one hot key channel", (q, scaled(k, every, 5, 30), v)
    yield "one hot channel in both", (scaled(q, every, 5, 5), scaled(k, every, 5, 5), v)
    yield "all keys share an offset of 1e3", (q, k + 1e3 * direction, v)
    yield "attention sinks", (q + 2 * direction, sinks, v)
    yield "3 % outlier keys", (q, scaled(k, some, every, 6), v)
    yield "one hot query block", (scaled(q, slice(64), every, 30), k, v)
    modes = normal(TOKENS, 1).sign() * direction
    yield "bimodal keys", (q, k + 8 * modes, v)
    coarse = torch.arange(TOKENS) // 64
    means = torch.stack([k[coarse == block].mean(0) for block in range(64)])[coarse]
    yield "keys identical up to noise", (q, means + 0.1 * normal(TOKENS, HEAD_DIM), v)
    amplitude = torch.linspace(0, 3, TOKENS, dtype=torch.float64)[:, None]
    yield "noise that varies over the picture", (q, k + amplitude * normal(TOKENS, HEAD_DIM), v)
    yield "no structure at all", (normal(TOKENS, 64), normal(TOKENS, 64), normal(TOKENS, 64))
    heavy = normal(TOKENS, HEAD_DIM) / normal(TOKENS, HEAD_DIM).abs().clamp_min(0.05)
    yield "heavy-tailed keys", (q, k + heavy, v)
    yield "sharp attention", (8 * q, k, v)
