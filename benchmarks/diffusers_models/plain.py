"""Models outside diffusers: DiT as facebookresearch published it, and the attention of timm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn, randn

from .case import Inputs, case

WIDTH, HEADS, SIDE = 32, 2, 16


class PlainAttention(nn.Module):
    """What timm's `Attention` was when DiT was published, with and without the fused kernel."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """adaLN-Zero."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU("tanh"), nn.Linear(64, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    def __init__(self, attention: str = "fused") -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock(_attention(attention)) for _ in range(2))
        self.final = nn.Linear(WIDTH, 2 * 2 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        b, n, _ = x.shape
        side = int(n**0.5)
        x = self.final(x).reshape(b, side, side, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(b, 8, 2 * side, 2 * side)


def _attention(kind: str) -> nn.Module:
    library, _, variant = kind.rpartition(" ")
    if library == "timm":
        attention: nn.Module = _timm_attention()(WIDTH, HEADS, qkv_bias=True)
        attention.fused_attn = variant == "fused"  # type: ignore[assignment]
        return attention
    return PlainAttention(WIDTH, HEADS, fused=variant == "fused")


def _timm_attention() -> type[nn.Module]:
    try:
        module = importlib.import_module("timm.layers")
    except ImportError:
        # Without torchvision the package does not import; the file with the attention does.
        module = _module_of_package("timm", "layers.attention")
    attention: type[nn.Module] = module.Attention
    return attention


def _module_of_package(package: str, name: str) -> ModuleType:
    """A module of a package whose `__init__` files are left out."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    folder = found.submodule_search_locations[0]
    shells: dict[str, Any] = {}
    for part in name.split(".")[:-1]:
        shells[package] = ModuleType(package)
        shells[package].__path__ = [folder]
        package, folder = f"{package}.{part}", f"{folder}/{part}"
    shells[package] = ModuleType(package)
    shells[package].__path__ = [folder]
    with mock.patch.dict(sys.modules, shells):
        return importlib.import_module(f"{package}.{name.rpartition('.')[2]}")


def _dit() -> Inputs:
    return {
        "x": randn(1, 4, 2 * SIDE, 2 * SIDE),
        "t": torch.tensor([0.7]),
        "y": torch.tensor([3]),
    }


case("facebookresearch/DiT", lambda: DiT)(_dit)
case("facebookresearch/DiT, attention by hand", lambda: DiT, attention="by hand")(_dit)
case("timm Attention", lambda: DiT, attention="timm fused")(_dit)
case("timm Attention, not fused", lambda: DiT, attention="timm plain")(_dit)
