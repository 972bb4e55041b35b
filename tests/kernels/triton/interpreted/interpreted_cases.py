"""What the interpreted tests share: a call on poisoned memory against the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pisa_compile.kernels import reference, triton
from pisa_compile.kernels.params import AttentionParams, exact_block_counts, free_key_blocks
from pisa_compile.kernels.testing import Inputs, poisoned_memory, random_inputs, relative_l2

# Float32 arithmetic in another order may be this much worse than the reference's in float32.
TOLERANCE_FACTOR = 4.0
SETTINGS = ("sparsity", "block_size", "key_block_size", "routing", "order", "exact", "scale")


def case(**options: Any) -> tuple[Inputs, AttentionParams]:
    """Inputs and settings from one flat list of options."""
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    inputs = random_inputs(**{"query_len": 200, "heads": 1, **options})
    scale = settings.pop("scale", inputs.query.shape[-1] ** -0.5)
    return inputs, AttentionParams(scale=scale, **{"sparsity": 0.6, **settings})


def run(
    inputs: Inputs,
    params: AttentionParams,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        return triton.attention(*inputs.astuple(), params, density=density, permutation=permutation)


def assert_specified(
    inputs: Inputs,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    tolerance: float = 0.0,
    lse_tolerance: float = 0.0,
) -> None:
    """The kernels agree with the float64 specification, for inputs without near-ties.

    The error may be TOLERANCE_FACTOR times that of the reference in float32, or as given.
    """
    gap = routing_gap(inputs, params, density, permutation)
    assert gap > 1e-5, "the test's inputs have a near-tie: change the seed"

    def specification(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = inputs.to(dtype).astuple()
        return reference.attention(*tensors, params, density=density, permutation=permutation)

    expected = specification(torch.float64)
    reference_out, reference_lse = specification(torch.float32)
    out, lse = run(inputs, params, density, permutation)
    assert out.dtype == inputs.query.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    empty = expected[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    own = relative_l2(reference_out, expected[0])
    assert relative_l2(out, expected[0]) <= max(tolerance, TOLERANCE_FACTOR * own)
    own = _largest_difference(reference_lse, expected[1])
    rounding = 2.4e-7 * _largest_difference(expected[1].clamp(min=-1e30), torch.zeros(()))
    assert _largest_difference(lse, expected[1]) <= max(lse_tolerance, rounding, 4 * own)


def _largest_difference(ours: Tensor, expected: Tensor) -> float:
    difference = (ours - expected)[ours > -1e29].abs()
    return float(difference.max()) if difference.numel() else 0.0


def routing_gap(
    inputs: Inputs,
    params: AttentionParams,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> float:
    """Distance of the closest routing decision from going the other way.

    Below the accuracy of float32 scores two right implementations may select different blocks, and
    their outputs then differ by as much as the method approximates.
    """
    q, k, v, mask = inputs.to(torch.float64).astuple()
    tokens = k.shape[2]
    first, last = free_key_blocks(tokens, params)
    if first >= last:
        return float("inf")
    mask = mask if mask is not None else torch.ones(k.shape[0], tokens, dtype=torch.bool)
    if permutation is not None:
        q, k, v = (x[:, :, permutation] for x in (q, k, v))
        mask = mask[:, permutation]
    repeat = q.shape[1] // k.shape[1]
    stats = reference.block_statistics(
        k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), mask, params.key_size
    )
    valid = stats.valid[:, :, None, first:last]
    score = reference._proxy_score(q, stats, params, k.shape[1])[..., first:last]
    score = score.masked_fill(~valid, -torch.inf)
    if density is None:
        density = torch.tensor(params.density, dtype=torch.float64)
    fraction = density.double().expand(q.shape[1])[:, None, None]  # [H, 1, 1]
    ordered = score.sort(-1, descending=True).values
    if params.routing == "threshold":
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        finite = score.masked_fill(~valid, 0.0)
        mean = finite.sum(-1, keepdim=True) / count
        square = ((finite - mean).masked_fill(~valid, 0.0) ** 2).sum(-1, keepdim=True)
        beta = torch.special.ndtri(1 - fraction)
        gap = (score - mean - beta * (square / count).sqrt()).abs()
        gap = torch.cat([gap, ordered[..., :1] - ordered[..., 1:2]], dim=-1)
    else:
        chosen = exact_block_counts(fraction, last - first).long().expand(*score.shape[:3], 1)
        following = torch.cat([ordered, torch.full_like(ordered[..., :1], torch.nan)], dim=-1)
        gap = ordered.gather(-1, chosen - 1) - following.gather(-1, chosen)
    gap = gap.masked_fill(fraction >= 1, torch.inf)
    finite_gap = gap[gap.isfinite()]
    return float(finite_gap.min()) if finite_gap.numel() else float("inf")
