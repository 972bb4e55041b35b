"""What routing delivered: the density that was computed, and how much attention it covered.

Asked for by `with pisa.delivered()`. The routing of every call is computed a second time in float32
by the specification, a key head at a time, so a run under it is slower; otherwise it is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.params import block_count
from ..ops.observation import OpCall, observed
from ..report.tables import TOP_LEVEL, table_text

_SAMPLED_ROWS = 128
_COLUMNS = ("module", "requested", "delivered (heads)", "mass in exact blocks (heads)", "calls")


@dataclass(frozen=True)
class Delivery:
    """One call of the op.

    Attributes:
        module: where it stands in the model, "" outside of one.
        call: how many calls the same site had before, as many as denoising steps in a pipeline
            (twice as many with two model calls per step).
        requested: exact fraction of the key blocks that was asked for, per head [H].
        density: exact fraction that was computed, exact ranges included; mean of the query blocks
            [H].
        mass: share of the dense attention probabilities on exact blocks, mean over up to
            128 queries that are spread over the sequence [H].
    """

    module: str
    call: int
    requested: Tensor
    density: Tensor
    mass: Tensor


@dataclass
class Deliveries:
    """The calls so far, in order. Prints as a table with a row per site."""

    calls: list[Delivery] = field(default_factory=list)

    def sites(self) -> dict[str, list[Delivery]]:
        found: dict[str, list[Delivery]] = {}
        for call in self.calls:
            found.setdefault(call.module, []).append(call)
        return found

    def __str__(self) -> str:
        rows = []
        for module, calls in self.sites().items():
            requested = torch.stack([call.requested for call in calls]).mean()
            density = torch.stack([call.density for call in calls]).mean(0)
            mass = torch.stack([call.mass for call in calls]).mean(0)
            measured = (f"{requested:.3f}", _spread(density), _spread(mass), str(len(calls)))
            rows.append((module or TOP_LEVEL, *measured))
        return table_text(_COLUMNS, rows)


@contextmanager
def delivered() -> Iterator[Deliveries]:
    """Record, for every call of the op inside, what its routing delivered.

        with pisa.delivered() as deliveries:
            model(x)
        print(deliveries)

    Sees what runs through Python in this thread; not what a CUDA graph replays.
    """
    deliveries = Deliveries()
    counts: dict[str, int] = {}

    def observe(call: OpCall) -> None:
        module = "" if call.site is None else call.site.module
        deliveries.calls.append(_delivery(call, module, counts.get(module, 0)))
        counts[module] = counts.get(module, 0) + 1

    with observed(observe):
        yield deliveries


@torch.no_grad()
def _delivery(call: OpCall, module: str, index: int) -> Delivery:
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    requested = torch.full((heads,), call.params.density)
    if call.density is not None:
        requested = call.density.detach().to("cpu").expand(heads).clone()
    density, mass = torch.zeros(heads), torch.zeros(heads)
    group = heads // kv_heads
    for head in range(kv_heads):
        queries, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        density[queries], mass[queries] = _group(
            call,
            call.query[:, queries],
            call.key[:, own],
            call.value[:, own],
            requested[queries].to(call.query.device) if call.density is not None else None,
        )
    return Delivery(module, index, requested, density, mass)


def _group(
    call: OpCall, query: Tensor, key: Tensor, value: Tensor, density: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Density and mass [h] of the query heads [B, h, T, D] that share one key head [B, 1, T, D]."""
    q, k, v = (x.to(torch.float32).expand(-1, query.shape[1], -1, -1) for x in (query, key, value))
    key_len, size = k.shape[2], call.params.key_size
    mask = call.key_mask
    if mask is None:
        mask = torch.ones(k.shape[0], key_len, dtype=torch.bool, device=k.device)
    if call.permutation is not None:
        order = call.permutation
        q, k, v, mask = q[:, :, order], k[:, :, order], v[:, :, order], mask[:, order]
    stats = reference.block_statistics(k, v, mask, size)
    exact = reference.route(q, stats, key_len, call.params, density, kv_heads=1)  # [B, h, M, N]
    blocks = stats.valid.sum(-1).clamp(min=1)[..., None]  # [B, 1, 1]
    density_found = (exact.sum(-1) / blocks).mean((0, 2))

    count = min(_SAMPLED_ROWS, q.shape[2])
    rows = torch.linspace(0, q.shape[2] - 1, count, device=q.device).long()
    logit = call.params.scale * (q[:, :, rows] @ k.transpose(-1, -2))
    logit = logit.masked_fill(~mask[:, None, None], -torch.inf)
    weight = logit.softmax(-1).nan_to_num(0.0)  # rows without any valid key
    weight = torch.nn.functional.pad(weight, (0, block_count(key_len, size) * size - key_len))
    per_block = weight.reshape(*weight.shape[:-1], -1, size).sum(-1)  # [B, h, rows, N]
    covered = (per_block * exact[:, :, rows // call.params.block_size]).sum(-1)
    return density_found.cpu(), covered.mean((0, 2)).cpu()


def _spread(values: Tensor) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
