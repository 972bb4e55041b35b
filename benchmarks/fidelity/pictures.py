"""Whole sampling trajectories of the photo DiT, every attention call of every step approximated.

No step and no layer stays dense: that would hide what is to be measured. Beside the methods run
two dense variants, which show how much PSNR another dense kernel or another dtype costs already.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.photo_dit.data import NAMES
from examples.photo_dit.sampling import euler_step, noise, time_grid
from examples.photo_dit.weights import load_model

from . import metrics
from .data import Attention, replaced_attention
from .methods import BY_NAME, FINE, METHODS, OURS, PAPER, deliverable, in_order, order_of_tokens

SEEDS = tuple(range(8))
STEPS = 6
DENSITY = 0.15
OTHER_DENSITIES = (0.05, 0.3)  # also, for the paper's method and ours
WITHOUT = ("blockwise", "covariance")  # slow, and close to the hybrid
FLOORS = {"math": "dense, torch's math kernel", "bfloat16": "dense, attention in bfloat16"}
_dense = functional.scaled_dot_product_attention


def settings(quick: bool) -> list[tuple[str, float]]:
    """Method and density of every set of pictures."""
    found = [("dense", 1.0), *((name, 1.0) for name in FLOORS)]
    for method in METHODS:
        if method.name not in WITHOUT:
            found.append((method.name, DENSITY))
        if method.name in (OURS, FINE, PAPER) and not quick:
            found += [(method.name, density) for density in OTHER_DENSITIES]
    return found


def attention(name: str, density: float) -> Attention:
    """The named method as a replacement of `F.scaled_dot_product_attention`."""
    if name == "math":

        def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return _dense(query, key, value)

        return plain
    if name == "bfloat16":
        # Rounded as a bfloat16 kernel would, which multiplies exactly and accumulates in float32.
        return lambda *qkv: _dense(*(x.bfloat16().float() for x in qkv)).bfloat16().float()
    if name == "dense":
        return _dense
    method, order = BY_NAME[name], order_of_tokens("hilbert")
    target = deliverable(method, density)
    return lambda query, key, value: in_order(method, query, key, value, target, order)[0]


@torch.no_grad()
def picture(name: str, density: float, seed: int, steps: int, cache: Path) -> Tensor:
    """One picture [3, S, S] in [-1, 1], from the cache if it is there."""
    file = cache / f"{name}-{density:g}-{seed}-{steps}.pt"
    if file.exists():
        stored: Tensor = torch.load(file)
        return stored
    model = load_model()
    x = noise(seed, model.config.grid * model.config.patch)
    label = torch.tensor([seed % len(NAMES)])
    with replaced_attention(attention(name, density)):
        for start, end in itertools.pairwise(time_grid(steps)):
            x = euler_step(model, x, label, start, end)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(x[0], file)
    return x[0]


def make(name: str, density: float, seed: int, steps: int, cache: Path) -> None:
    """Have the picture in the cache; what a worker runs."""
    picture(name, density, seed, steps, cache)


def record(
    pictures: dict[tuple[str, float], list[Tensor]], seeds: tuple[int, ...]
) -> dict[str, Any]:
    """PSNR and SSIM of every set of pictures against the dense ones, seed by seed."""
    dense = pictures["dense", 1.0]
    rows = []
    for (name, density), made in pictures.items():
        pairs = list(zip(made, dense, strict=True))
        if name != "dense":
            rows.append(
                {
                    "method": name,
                    "density": density,
                    "psnr_db": [round(metrics.psnr_db(a, b), 3) for a, b in pairs],
                    "ssim": [round(metrics.ssim(a, b), 5) for a, b in pairs],
                }
            )
    labels = [NAMES[seed % len(NAMES)] for seed in seeds]
    return {"seeds": list(seeds), "labels": labels, "steps": STEPS, "rows": rows}
