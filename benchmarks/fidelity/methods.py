"""Every method of the comparison under one signature, at an equal share of exact blocks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.kernels.curves import curve
from pisa_compile.kernels.params import AttentionParams

from . import rivals
from .data import GRID

OURS = "corrected"
FINE = "fine"  # the same with smaller key blocks
PAPER = "hybrid"
Run = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, float]]


@dataclass(frozen=True)
class Method:
    """`run(query, key, value, density)`, on [1, H, T, D] in block order, returns the output and
    the density that was delivered: exact pairs, or their equal in cost, as a share of all.

    `settings` of `pisa.attention` are given for methods that run on the package's CPU kernels and
    so have a meaningful time.
    """

    name: str
    label: str
    run: Run
    settings: dict[str, Any] | None = None
    slow: bool = False


def block_count(density: float, blocks: int) -> float:
    """The density that a fixed number of blocks per row delivers."""
    return float(max(1, -int(-(density * blocks - 1e-6) // 1))) / blocks


def _key_block(settings: dict[str, Any] | None) -> int:
    return int((settings or {}).get("key_block_size", rivals.BLOCK))


def _more_means(key_block: int) -> float:
    """Means of key blocks beyond one for every 64 keys, as a share of the keys.

    A mean costs every query what a key does, so they count as exact keys: half the size takes
    1/64 from the density.
    """
    return 1 / key_block - 1 / rivals.BLOCK


def sparsity(density: float, settings: dict[str, Any]) -> float:
    """The sparsity of exact keys at which exact keys and additional means are `density`."""
    return 1 - (density - _more_means(_key_block(settings)))


def deliverable(method: Method, density: float) -> float:
    """The least density from `density` on that whole blocks of the grid's tokens deliver."""
    key_block = _key_block(method.settings)
    means = _more_means(key_block)
    return block_count(density - means, math.prod(GRID) // key_block) + means


def _package(name: str, label: str, *, kernels: bool = True, **settings: Any) -> Method:
    def run(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
        share = sparsity(density, settings)
        return pisa.attention(query, key, value, sparsity=share, **settings), density

    slow = settings["order"] == "blockwise"
    return Method(name, label, run, settings if kernels else None, slow)


def _sol(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
    """Threshold routing, its threshold set so that the density comes out as asked."""
    mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    stats = reference.block_statistics(key, value, mask, rivals.BLOCK)

    def share(sparsity: float) -> float:
        params = AttentionParams(
            scale=rivals.scale_of(query), sparsity=sparsity, routing="threshold", order="zeroth"
        )
        return float(reference.route(query, stats, key.shape[2], params).float().mean())

    low, high = 1e-4, 1 - 1e-4  # sparsity; the share falls as it grows
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > density else (low, middle)
    sparsity = (low + high) / 2
    out = pisa.attention(query, key, value, sparsity=sparsity, routing="threshold", order="zeroth")
    return out, share(sparsity)


def _rule(rule: rivals.Rule) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
        selected = rule(query[0], key[0], density)
        out = rivals.attend(query[0], key[0], value[0], selected)
        return out[None], float(selected.float().mean())

    return run


def _approximation(function: Callable[..., tuple[Tensor, float]]) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
        out, delivered = function(query[0], key[0], value[0], density)
        return out[None], delivered

    return run


METHODS = (
    _package("topk", "block-sparse, top-k", order="none"),
    Method("topp", "block-sparse, top-p", _rule(rivals.top_p)),
    Method("spargeattn", "SpargeAttn", _rule(rivals.spargeattn)),
    Method("xattention", "XAttention", _rule(rivals.xattention)),
    Method("psa", "PSA", _approximation(rivals.psa)),
    Method("rectified", "Rectified SpaAttn", _approximation(rivals.rectified)),
    Method("sol", "Sol-Attn", _sol, {"routing": "threshold", "order": "zeroth"}),
    _package("zeroth", "PISA zeroth", order="zeroth"),
    _package(PAPER, "PISA hybrid", order="hybrid"),
    _package(
        "covariance",
        "PISA hybrid, covariance",
        routing="topk_covariance",
        order="hybrid",
        kernels=False,
    ),
    Method("pasa", "PASA", _approximation(rivals.pasa)),
    _package("blockwise", "PISA blockwise (slow)", order="blockwise", kernels=False),
    _package(OURS, "corrected (ours)", order="corrected"),
    _package(FINE, "corrected, keys by 32 (ours)", order="corrected", key_block_size=32),
)
BY_NAME = {method.name: method for method in METHODS}


def order_of_tokens(name: str) -> Tensor:
    """Token at each place of "raster" or "hilbert" order of the grid, int64 [T]."""
    return curve(GRID, name).long()


def in_order(
    method: Method, query: Tensor, key: Tensor, value: Tensor, density: float, order: Tensor
) -> tuple[Tensor, float]:
    """Run a method on blocks cut along `order`; the output is in raster order again."""
    out, delivered = method.run(query[:, :, order], key[:, :, order], value[:, :, order], density)
    raster = torch.empty_like(out)
    raster[:, :, order] = out
    return raster, delivered
