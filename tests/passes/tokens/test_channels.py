"""Attention between channels, told from attention between tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..tracing import Rewritten, rewrite

B, T, C, H = 2, 16, 32, 2  # as many tokens as channels of a head


class XCiT(nn.Module):
    """Cross-covariance attention, as in XCiT and EdgeNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.temperature = nn.Parameter(torch.ones(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(B, T, 3, H, C // H).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(B, T, C))


class DaViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(C, 3 * C), fused

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(k.mT, v.mT, q.mT, scale=0.25).mT
        else:
            weights = ((k * 0.25).mT @ v).softmax(dim=-1)
            out = (weights @ q.mT).mT
        return out.transpose(1, 2).reshape(B, T, C)


class Convolutions(nn.Module):
    """Transposed attention of image restoration, on [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(C, 3 * C, 1)
        self.depthwise = nn.Conv2d(3 * C, 3 * C, 3, padding=1, groups=3 * C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.depthwise(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (y.unflatten(1, (H, C // H)).flatten(3) for y in (q, k, v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
        return (weights @ v).view(B, C, 4, 4)


class Matrices(nn.Module):
    """Projections by matrices, without layers."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.randn(3, C, T)), channels

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.weight[i] for i in range(3))
        if self.channels:
            q, k, v = q.mT, k.mT, v.mT
        out = torch.softmax(q @ k.mT / 4, -1) @ v
        return out.mT if self.channels else out


class Tokens(nn.Module):
    """Attention between the tokens of a picture, on [B, C, H, W] as in an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, C), nn.Conv2d(C, 3 * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.mT @ k).softmax(-1)
        return (v @ weights.mT).view_as(x)


class TokensOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat([-y[..., 8:], y[..., :8]], -1) + y for y in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class LinearOverTokens(nn.Module):
    """Keys and values made from fewer tokens by a layer along them (Linformer), here as many."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fewer = nn.Linear(C, 3 * C), nn.Linear(T, T)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = self.fewer(k.mT).mT, self.fewer(v.mT).mT
        return (q @ k.mT).softmax(-1) @ v


def rewritten(model: nn.Module, *shape: int) -> Rewritten:
    torch.manual_seed(0)
    return rewrite(model.eval(), torch.randn(shape))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (XCiT(), (B, T, C)),
        (DaViT(fused=True), (B, T, C)),
        (DaViT(fused=False), (B, T, C)),
        (Convolutions(), (B, C, 4, 4)),
        (Matrices(channels=True), (B, T, C)),
    ],
    ids=["xcit", "davit-fused", "davit", "convolutions", "matrices"],
)
def test_channels_stay_dense(model: nn.Module, shape: tuple[int, ...]) -> None:
    result = rewritten(model, *shape)
    assert result.ops == []
    assert len(result.reasons) == 1
    assert "it attends channels, not tokens" in result.reasons[0]
    assert result.decisions[0].expected  # nobody would have it sparse


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Tokens(), (B, C, 4, 4)),
        (TokensOfLayers(), (B, T, C)),
        (Matrices(channels=False), (B, T, C)),
        (LinearOverTokens(), (B, T, C)),
    ],
    ids=["autoencoder", "layers", "matrices", "layer along tokens"],
)
def test_tokens_are_replaced(model: nn.Module, shape: tuple[int, ...]) -> None:
    result = rewritten(model, *shape)
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.error < 1e-5
