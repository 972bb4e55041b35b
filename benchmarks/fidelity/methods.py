"""Every method of the comparison under one signature, at an equal share of exact blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.kernels.curves import curve
from pisa_compile.kernels.params import AttentionParams

from . import rivals
from .data import GRID

OURS = "corrected"
PAPER = "hybrid"
Run = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, float]]


@dataclass(frozen=True)
class Method:
    """`run(query, key, value, density)`, on [1, H, T, D] in block order, returns the output and
    the density that was delivered: exact pairs, or their equal in cost, as a share of all.

    `kernels` tells methods that run on the package's CPU kernels and so have a meaningful time.
    """

    name: str
    label: str
    run: Run
    kernels: bool = False
    slow: bool = False


def block_count(density: float, blocks: int) -> float:
    """The density that a fixed number of blocks per row delivers."""
    return float(max(1, -int(-(density * blocks - 1e-6) // 1))) / blocks


def _package(routing: str, order: str) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
        out = pisa.attention(query, key, value, sparsity=1 - density, routing=routing, order=order)
        return out, density

    return run


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
    Method("topk", "block-sparse, top-k", _package("topk", "none"), kernels=True),
    Method("topp", "block-sparse, top-p", _rule(rivals.top_p)),
    Method("spargeattn", "SpargeAttn", _rule(rivals.spargeattn)),
    Method("xattention", "XAttention", _rule(rivals.xattention)),
    Method("psa", "PSA", _approximation(rivals.psa)),
    Method("rectified", "Rectified SpaAttn", _approximation(rivals.rectified)),
    Method("sol", "Sol-Attn", _sol, kernels=True),
    Method("zeroth", "PISA zeroth", _package("topk", "zeroth"), kernels=True),
    Method(PAPER, "PISA hybrid", _package("topk", "hybrid"), kernels=True),
    Method("covariance", "PISA hybrid, covariance", _package("topk_covariance", "hybrid")),
    Method("pasa", "PASA", _approximation(rivals.pasa)),
    Method("blockwise", "PISA blockwise (slow)", _package("topk", "blockwise"), slow=True),
    Method(OURS, "corrected (ours)", _package("topk", OURS), kernels=True),
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
