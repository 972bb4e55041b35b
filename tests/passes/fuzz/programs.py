"""Random programs around attention, as the text of a Python function that a seed determines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Where a line may be inserted: after the inputs, the scores, the mask, the softmax, the result.
PLACES = ("inputs", "scores", "masked", "weights", "result")
# The value that a mutation at a place changes; `inputs` has three, and those of before are still
# there to be changed later.
VALUES = {
    "inputs": ("q", "k", "v", "m"),
    "scores": ("s", "q", "k", "v", "m"),
    "masked": ("s", "q", "k", "v"),
    "weights": ("w", "q", "k", "v", "s"),
    "result": ("o", "w", "v", "q"),
}
# `X` is the value. A kind is drawn first, so that no kind drowns in another.
MUTATIONS = {
    "arithmetic": (
        "X = X + 0.3",
        "X = X - 1",
        "X = X.add(0.25)",
        "X += 0.2",
        "X = X * 0.7",
        "X = X / 1.5",
        "X = -X",
        "X = 1 - X",
        "X = X.tanh()",
        "X = X.clamp(-0.5, 0.5)",
        "X = X.clone(); X += 0.2",
    ),
    "in place": (
        "X.mul_(0.9)",
        "X[..., :1] = 0.2",
        "X[:, 1:] *= 0.5",
        "F.relu(X, inplace=True)",
        "F.hardtanh(X, -0.5, 0.5, True)",
        "F.silu(X, inplace=True)",
        "X = X.clone(); X[..., :2] = 0.4",
        "torch.mul(X, 0.8, out=X)",
    ),
    "through an alias": (
        "X.data.mul_(0.9)",
        "X.detach().add_(0.3)",
        "X.view(X.shape).add_(0.3)",
        "torch.atleast_3d(X).mul_(0.8)",
        "X.cpu().mul_(0.8)",
        "X.unsafe_chunk(1)[0].mul_(0.8)",
        "torch.broadcast_tensors(X, X[:1])[0].mul_(0.8)",
        "F.dropout(X, 0.5, training=False).mul_(0.8)",
    ),
    "view": (
        "X = X.movedim(0, 1).movedim(1, 0)",
        "X = X.transpose(0, -2).contiguous().transpose(0, -2)",
        "X = X.flatten(0, 1).unflatten(0, X.shape[:2])",
        "X = X.atleast_3d().view_as(X)",
        "X = X[None].squeeze(0)",
        "X = X.narrow(-1, 0, X.shape[-1])",
        "X = torch.cat(X.chunk(2, dim=-1), dim=-1)",
        "X = X.flip(-2)",
        "X = X.double().to(X.dtype)",
    ),
    "another use": (
        "tail = tail + X.sum()",
        "tail = tail + torch.zeros_like(X).sum() + X.shape[-1]",
        "tail = tail + X.detach().amax()",
    ),
    "along an axis": (
        "X = X * torch.linspace(0.5, 1.5, X.shape[-1], dtype=X.dtype)",
        "X = X * torch.linspace(0.5, 1.5, X.shape[-2], dtype=X.dtype)[:, None]",
        "X = X * torch.linspace(0.5, 1.5, X.shape[-3], dtype=X.dtype)[:, None, None]",
        "X = X + torch.linspace(-1, 1, X.shape[-1], dtype=X.dtype)",
        "X = X + torch.linspace(-1, 1, X.shape[-2], dtype=X.dtype)[:, None]",
    ),
}
MASK_MUTATIONS = (
    "m = m.clone(); m[:, :3] = True",
    "m = m & (torch.arange(m.shape[1]) < m.shape[1] - 1)",
    "m = m | (torch.arange(m.shape[1]) == 2)",
    "m.data[:, 4] = True",
    "m = m.logical_not().logical_not()",
    "m = m[:1].expand(m.shape[0], -1)",
)
BROADCASTS = ("q = q[:1]", "q = q[:, :1]", "k = k[:1]; v = v[:1]")


@dataclass(frozen=True)
class Program:
    """What a seed drew. `mutations` are `(place, line)` in order."""

    seed: int
    family: str
    by_hand: bool
    choices: dict[str, str]
    mutations: tuple[tuple[str, str], ...]

    def source(self) -> str:
        at = {place: [line for p, line in self.mutations if p == place] for place in PLACES}
        lines = [*_START[self.choices["layout"]], *at["inputs"], *self._heads()]
        if self.by_hand:
            lines += [self.choices["scores"], *at["scores"], *self._mask(), *at["masked"]]
            lines += [self.choices["softmax"], *at["weights"], self.choices["product"]]
        else:
            lines += self._sdpa(at)
        lines += [*at["result"], "return o, tail"]
        body = "\n".join(f"    {line}" for line in lines if line)
        return f"def f(q, k, v, m):\n    tail = 0.0\n{body}\n"

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        dtype = torch.float64 if self.choices["dtype"] == "float64" else torch.float32
        batch, heads, groups, tokens, width = 2, 2, 1 if self.choices["gqa"] else 2, 20, 8
        shapes = {
            "bhtd": [(batch, n, tokens, width) for n in (heads, groups, groups)],
            "bthd": [(batch, tokens, n, width) for n in (heads, groups, groups)],
            "ntd": [(batch, tokens, width)] * 3,
        }[self.choices["layout"]]
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        keep = torch.rand(batch, tokens, generator=generator) > 0.3
        # Sometimes a row of nothing but padding.
        keep[: 1 if self.seed % 4 == 0 else batch, 5] = True
        if self.seed % 4 == 0:
            keep[1] = False
        return [*tensors, keep]

    def function(self) -> Callable[..., Any]:
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.source(), names)
        function: Callable[..., Any] = names["f"]
        return function

    def _heads(self) -> list[str]:
        return [self.choices["gqa"]] if self.choices["gqa"] else []

    def _view(self) -> str:
        return "m[:, None, None]" if self.choices["layout"] != "ntd" else "m[:, None]"

    def _mask(self) -> list[str]:
        mask = self.choices["mask"]
        return [mask.replace("M", self._view())] if mask else []

    def _sdpa(self, at: dict[str, list[str]]) -> list[str]:
        mask = self.choices["sdpa mask"]
        given = f", attn_mask={mask.replace('M', self._view())}" if mask else ""
        call = f"o = F.scaled_dot_product_attention(q, k, v{given}{self.choices['sdpa scale']})"
        return [call]

    def without(self, index: int) -> Program:
        kept = tuple(x for i, x in enumerate(self.mutations) if i != index)
        return replace(self, mutations=kept)

    def with_choice(self, name: str, value: str) -> Program:
        return replace(self, choices={**self.choices, name: value})


_START = {
    "bhtd": (),
    "bthd": ("q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",),
    "ntd": (),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "layout": ("bhtd", "bthd", "ntd"),
    "dtype": ("float32", "float64"),
    "gqa": (
        "",
        "k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)",
        "k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))",
    ),
    "scores": (
        "s = q @ k.transpose(-2, -1) * 0.3",
        "s = torch.matmul(q * 0.3, k.mT)",
        "s = torch.einsum('...qd,...kd->...qk', q, k) / 3.0",
        "s = q.mul(0.5) @ (k * 0.6).transpose(-1, -2)",
    ),
    "mask": (
        "",
        "s = s.masked_fill(~M, float('-inf'))",
        "s = torch.where(M, s, torch.tensor(float('-inf'), dtype=s.dtype))",
        "s = s + torch.where(M, 0.0, float('-inf'))",
        "s = s + (1.0 - M.to(s.dtype)) * -1e9",
        "s = s + (1.0 - M.to(s.dtype)) * -10000.0",
        "s = s + (1.0 - M.to(s.dtype)) * -10000.0 - 10000.0",
        "s = s.masked_fill(M.logical_not(), torch.finfo(s.dtype).min)",
    ),
    "softmax": (
        "w = s.softmax(-1)",
        "w = F.softmax(s, dim=-1)",
        "e = (s - s.amax(-1, keepdim=True)).exp(); w = e / e.sum(-1, keepdim=True)",
        "e = torch.exp2((s - s.amax(-1, keepdim=True)) * 1.4426950408889634); "
        "w = e / e.sum(-1, keepdim=True)",
        "w = torch.log_softmax(s, -1).exp()",
    ),
    "product": ("o = w @ v", "o = torch.einsum('...qk,...kd->...qd', w, v)"),
    "sdpa mask": (
        "",
        "M",
        "torch.where(M, 0.0, float('-inf')).to(q.dtype)",
        "M.expand(-1, *q.shape[1:-1], -1)",
    ),
    "sdpa scale": ("", ", scale=0.3"),
}


def program(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    by_hand = rng.random() < 0.7
    choices = {name: rng.choice(options) for name, options in CHOICES.items()}
    if choices["layout"] != "bhtd" or rng.random() < 0.5:
        choices["gqa"] = ""
    mutations: list[tuple[str, str]] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        place = rng.choice(PLACES if by_hand else ("inputs", "result"))
        value = rng.choice(VALUES[place] if by_hand else ("q", "k", "v", "m", "o")[:4])
        if not by_hand and place == "result":
            value = "o"
        if value == "m":
            line = rng.choice(MASK_MUTATIONS)
        elif place == "inputs" and by_hand and rng.random() < 0.1:
            line = rng.choice(BROADCASTS)
        else:
            kind = rng.choice(sorted(MUTATIONS))
            line = rng.choice(MUTATIONS[kind]).replace("X", value)
        mutations.append((place, line))
    family = f"{'by hand' if by_hand else 'sdpa'}, {choices['layout']}"
    return Program(seed, family, by_hand, choices, tuple(mutations))
