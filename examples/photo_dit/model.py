"""A small diffusion transformer over RGB patches, with ordinary dense attention.

Shapes: B batch, T tokens (row by row over the patch grid), W width, H heads, D head dimension,
P patch side in pixels, h and w the patch grid.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the shapes of the weights."""

    classes: int
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_width: int = 768
    patch: int = 4
    channels: int = 3
    grid: int = 64
    """Patches along one side of a full picture; the unit of the rotary positions."""
    sigma_data: float = 0.5
    """Standard deviation of the pixels, which sets the preconditioning."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def patch_centres(view: Tensor, height: int, width: int) -> Tensor:
    """Where each patch lies in the whole picture, as fractions of its sides.

    view: [B, 4] top, left, bottom, right. Returns [B, T, 2] (row, column), T = height * width.
    """
    rows = (torch.arange(height, device=view.device, dtype=view.dtype) + 0.5) / height
    cols = (torch.arange(width, device=view.device, dtype=view.dtype) + 0.5) / width
    top, left, bottom, right = (edge[:, None] for edge in view.unbind(-1))
    y = (top + (bottom - top) * rows)[:, :, None].expand(-1, height, width)
    x = (left + (right - left) * cols)[:, None, :].expand(-1, height, width)
    return torch.stack((y, x), dim=-1).flatten(1, 2)


def fourier(x: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of `x [..., N]` at `frequencies [F]`: [..., N * 2 * F]."""
    angles = x[..., None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x [B, H, T, D], cos and sin [B, 1, T, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys and a rotary position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, W]; cos, sin: [B, 1, T, D / 2]. Returns [B, T, W]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, D]
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return joined


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        hidden = nn.functional.gelu(self.expand(x), approximate="tanh")
        out: Tensor = self.reduce(hidden)
        return out


class Block(nn.Module):
    """Attention and feed-forward, both modulated by the condition (adaLN-single).

    The modulation is computed once for the whole model; a block only adds its own table, which
    keeps a third of the weights of a plain DiT out of the file.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(6, config.width))
        self.attn_norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(config.width, config.mlp_width)

    def forward(self, x: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, W]; shared: [B, 6, W]. Returns [B, T, W]."""
        modulation = (shared + self.modulation)[:, :, None]  # [B, 6, 1, W]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        x = x + gate_a * self.attn(self.attn_norm(x) * (1 + scale_a) + shift_a, cos, sin)
        out: Tensor = x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m)
        return out


class Condition(nn.Module):
    """Noise level, class and patch size to one vector."""

    frequencies: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", torch.logspace(0, math.log10(64.0), 32), persistent=False
        )
        self.label = nn.Embedding(config.classes, config.width)
        self.hidden = nn.Linear(128, config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, time: Tensor, label: Tensor, log_patch: Tensor) -> Tensor:
        """time [B], label [B] (int), log_patch [B] (0 at full resolution). Returns [B, W]."""
        scalars = torch.stack((math.pi * time, log_patch), dim=-1)  # [B, 2]
        features = self.hidden(fourier(scalars, self.frequencies))
        condition: Tensor = self.out(nn.functional.silu(features)) + self.label(label)
        return condition


class PhotoDiT(nn.Module):
    """Predicts the flow from noise (time 0) to a photograph (time 1).

    The picture may have any size that is a multiple of the patch; `view` says which part of the
    photograph it shows, so one set of weights serves small pictures, full ones and windows.
    """

    place_frequencies: Tensor
    rotary_frequencies: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch**2
        head_dim = config.width // config.heads
        # From half a wave per picture to one wave in two patches.
        place = math.pi * torch.logspace(0, math.log10(config.grid), config.width // 4)
        self.register_buffer("place_frequencies", place, persistent=False)
        rotary = torch.logspace(0, -2, head_dim // 4)
        self.register_buffer("rotary_frequencies", rotary, persistent=False)

        self.condition = Condition(config)
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.patch_in = nn.Linear(pixels, config.width)
        self.place_in = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(config.width, 2 * config.width)
        self.patch_out = nn.Linear(config.width, pixels)
        for layer in (self.modulation, self.modulation_out, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, noisy: Tensor, time: Tensor, label: Tensor, view: Tensor | None = None
    ) -> Tensor:
        """Velocity at `noisy`.

        noisy: [B, C, h * P, w * P]; time: [B] in [0, 1]; label: [B] int64; view: [B, 4] part of
        the photograph (top, left, bottom, right; None is all of it). Returns the shape of `noisy`.
        """
        cfg = self.config
        batch = noisy.shape[0]
        rows, cols = noisy.shape[-2] // cfg.patch, noisy.shape[-1] // cfg.patch
        if view is None:
            view = noisy.new_tensor((0.0, 0.0, 1.0, 1.0)).expand(batch, 4)

        # Preconditioning: at every noise level the network sees and predicts unit variance.
        t = time[:, None, None, None]
        variance = (1 - t) ** 2 + (t * cfg.sigma_data) ** 2

        centres = patch_centres(view, rows, cols)  # [B, T, 2]
        x = self.patch_in(self._to_patches(noisy * variance.rsqrt()))
        x = x + self.place_in(fourier(centres, self.place_frequencies))
        angles = (centres * cfg.grid)[..., None] * self.rotary_frequencies  # [B, T, 2, D / 4]
        angles = angles.flatten(-2)[:, None]
        cos, sin = angles.cos(), angles.sin()

        log_patch = torch.log2((view[:, 2] - view[:, 0]) * (cfg.grid / rows))
        condition = nn.functional.silu(self.condition(time, label, log_patch))
        shared = self.modulation(condition).reshape(batch, 6, cfg.width)
        for block in self.blocks:
            x = block(x, shared, cos, sin)

        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        x = self.patch_out(self.norm_out(x) * (1 + scale) + shift)
        network = self._to_pixels(x, rows, cols).to(noisy.dtype)
        skip = (t * cfg.sigma_data**2 - (1 - t)) * noisy
        return (skip + cfg.sigma_data * variance.sqrt() * network) / variance

    def _to_patches(self, pixels: Tensor) -> Tensor:
        """[B, C, h * P, w * P] -> [B, T, C * P * P]."""
        batch, channels, height, width = pixels.shape
        p = self.config.patch
        split = pixels.reshape(batch, channels, height // p, p, width // p, p)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)

    def _to_pixels(self, patches: Tensor, rows: int, cols: int) -> Tensor:
        """[B, T, C * P * P] -> [B, C, h * P, w * P]."""
        p, channels = self.config.patch, self.config.channels
        split = patches.reshape(-1, rows, cols, channels, p, p)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * p, cols * p)
