"""Joint attention whose queries are the image tokens alone, told apart from cross-attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa

from ..tracing import SPARSITY_ZERO, rewrite

B, IMAGE, TEXT, HEADS, C = 2, 24, 10, 3, 48


class Projections(nn.Module):
    """Query, key and value as [B, T, H, D], normalised and rotated as in published models."""

    def __init__(self, *, rotary: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(C, 3 * C), nn.Linear(C, 2 * C)
        self.norm = nn.RMSNorm(C // HEADS)
        self.rotary = rotary

    def heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, HEADS, -1)).unbind(2)

    def rotated(self, x: Tensor) -> Tensor:
        if not self.rotary:
            return x
        angles = torch.outer(torch.arange(x.shape[1]), torch.arange(C // HEADS)).float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.heads(self.image(image), 3)
        text_k, text_v = self.heads(self.text(text), 2)
        return self.rotated(self.norm(q)), self.rotated(self.norm(k)), v, self.norm(text_k), text_v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ImageQueries(Projections):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, k, v, text_k, text_v = Projections.forward(self, image, text)
        return attend(q, torch.cat([text_k, k], 1), torch.cat([text_v, v], 1))


class ImageFirst(Projections):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, k, v, text_k, text_v = super().forward(image, text)
        return attend(q, torch.cat([k, text_k], 1), torch.cat([v, text_v], 1))


class ByHand(Projections):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, k, v, text_k, text_v = super().forward(image, text)
        k, v = torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)
        weights = torch.einsum("bqhc,bkhc->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhc->bqhc", weights, v).flatten(2)


class JoinedBeforeProjection(Projections):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.heads(self.image(image), 3)
        k, v = self.heads(self.text(torch.cat([text, image], 1)), 2)
        return attend(q, self.norm(k), v)


class QueriesSliced(Projections):
    """All tokens in one sequence, of which only the last are queries."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.heads(self.image(torch.cat([text, image], 1)), 3)
        return attend(self.norm(q)[:, TEXT:], self.norm(k), v)


class TwoBlocks(ImageQueries):
    """The second one gets a residual stream that has seen the text."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = image + super().forward(image, text)
        return super().forward(image, text)


JOINT = [ImageQueries, ImageFirst, ByHand, JoinedBeforeProjection, QueriesSliced]


class TwoContexts(Projections):
    """Cross-attention on two contexts, one of which is as long as the image."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.heads(self.image(image), 3)
        other = self.heads(self.text(image.new_ones(B, IMAGE, C) * 0.5), 2)
        k, v = (
            torch.cat(pair, 1) for pair in zip(self.heads(self.text(text), 2), other, strict=True)
        )
        return attend(self.rotated(q), self.rotated(k), v)


class SameTableOfAngles(Projections):
    """The same, with one rotary table for queries and that context."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.heads(self.image(image), 3)
        other_k, other_v = self.heads(self.text(image.new_ones(B, IMAGE, C) * 0.5), 2)
        text_k, text_v = self.heads(self.text(text), 2)
        k = torch.cat([text_k, self.rotated(other_k)], 1)
        return attend(self.rotated(q), k, torch.cat([text_v, other_v], 1))


class Plain(Projections):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        q, _, _ = self.heads(self.image(image), 3)
        return attend(q, *self.heads(self.text(torch.cat([text] * 3, 1)), 2))


class Pooling(Projections):
    """One query that reads itself and all other tokens."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        mean = image.mean(1, keepdim=True)
        q, _, _ = self.heads(self.image(mean), 3)
        return attend(q, *self.heads(self.text(torch.cat([mean, image], 1)), 2))


CROSS = [TwoContexts, SameTableOfAngles, Plain, Pooling]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(B, count, C, generator=generator) for count in (IMAGE, TEXT))
    return image, text


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("make", JOINT)
def test_keys_of_image_and_text(make: Callable[..., nn.Module], rotary: bool) -> None:
    result = rewrite(make(rotary=rotary), *inputs())
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.error < 1e-5


def test_with_dynamic_lengths() -> None:
    result = rewrite(ImageQueries(), *inputs(), dynamic=True)
    assert len(result.ops) == 1
    assert result.error < 1e-5


def test_in_the_second_block() -> None:
    assert len(rewrite(TwoBlocks(), *inputs()).ops) == 2


def test_shared_heads_and_copies_of_them() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, text: Tensor) -> Tensor:
        x = q * 2
        k, v = (torch.cat([text, y[:, :, :8] + x[:, :, :8]], 1) for y in (k, v))
        k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
        return attend(torch.cat([x, x], 2), k, v)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, IMAGE, 2, 16, generator=generator) for _ in range(3))
    text = torch.randn(B, TEXT, 2, 16, generator=generator)
    result = rewrite(function, q, k, v, text)
    assert result.ops[0].kwargs["enable_gqa"]
    assert result.error < 1e-5


@pytest.mark.parametrize("make", CROSS)
def test_cross_attention_stays_dense(make: Callable[..., nn.Module]) -> None:
    result = rewrite(make(rotary=True), *inputs())
    assert result.ops == []
    assert "it is cross-attention" in result.reasons[0]


def test_exact_ranges_count_keys_alone() -> None:
    """All text exact and one routed block: the same as the op says, and not what it says else."""
    image, text = inputs()
    model = ImageQueries()
    model(image, text)
    settings = {"sparsity": 0.9, "block_size": 16, "impl": "reference"}
    policy = pisa.Policy(min_tokens=0, exact=(TEXT, 0), **settings)
    result = rewrite(model, image, text, policy=policy)
    q, k, v, text_k, text_v = Projections.forward(model, image, text)
    q, k, v = (x.transpose(1, 2) for x in (q, torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)))
    for exact, same in (((TEXT, 0), True), ((0, 0), False)):
        out = pisa.attention(q, k, v, exact=exact, **settings).transpose(1, 2).flatten(2)
        assert torch.allclose(result.output, out, atol=1e-6) == same
    assert rewrite(model, image, text, policy=SPARSITY_ZERO).error < 1e-5
