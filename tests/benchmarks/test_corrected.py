"""The derivation of order "corrected", which docs/fidelity.md states."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.kernels.params import MASS_FACTOR_LIMIT

for _needed in ("rich", "matplotlib", "scipy", "skimage"):
    pytest.importorskip(_needed)

from benchmarks.fidelity import (  # noqa: E402
    data,
    methods,
)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def mass_errors(spread: float) -> tuple[float, float]:
    """Distance of one block's true mean mass factor from 1 (hybrid) and from the corrected one.

    Keys are normal around their mean. The queries are one vector with all signs of its
    components, so that their mean square is theirs alone and products of two components cancel.
    """
    generator = torch.Generator().manual_seed(3)
    scatter = torch.randn(128, 6, generator=generator, dtype=torch.float64)
    key = torch.randn(6, generator=generator, dtype=torch.float64) + spread * scatter
    size = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    query, scale = signs * size, 0.7
    stats = reference.block_statistics(
        key[None, None], key[None, None], torch.ones(1, 128, dtype=torch.bool), 128
    )
    correction = reference.tail_mass_correction(query[None, None], stats, scale, kv_heads=1)
    centred = stats.centred_key[0, 0, 0]
    true = (scale * query @ centred.T).exp().mean()
    return float(true - 1), float((true - correction[0, 0, 0].exp()).abs())


def test_the_corrected_mass_of_gaussian_keys_is_right_to_second_order() -> None:
    hybrid, corrected = zip(*(mass_errors(spread) for spread in (0.4, 0.2, 0.1)), strict=True)
    for wide, narrow in ((0, 1), (1, 2)):
        # Half the spread: what is missing falls to a quarter without the second order, and to a
        # sixteenth with it, since the third order cancels between opposite queries.
        assert hybrid[wide] / hybrid[narrow] == pytest.approx(4, rel=0.2)
        assert corrected[wide] / corrected[narrow] == pytest.approx(16, rel=0.2)
    assert corrected[2] < 0.01 * hybrid[2]


def test_the_correction_is_limited_and_finite_for_any_outlier(
    head: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, _ = (x[None].clone() for x in head)
    stats = reference.block_statistics(key, key, torch.ones(1, key.shape[-2], dtype=torch.bool), 64)
    for outlier in (1e4, 1e150, math.inf):
        query[0, 0, 5, 3] = outlier
        correction = reference.tail_mass_correction(query, stats, 0.2, kv_heads=1)
        assert bool(correction.isfinite().all())
        assert float(correction.max()) == pytest.approx(math.log(MASS_FACTOR_LIMIT))


@pytest.mark.parametrize(
    "sample", [*data.adversarial(), *data.structured(quick=True)], ids=lambda s: s.place
)
def test_corrected_is_never_much_worse_than_hybrid(sample: data.Sample) -> None:
    # A quarter of the tokens, every second row and column of the grid, in Hilbert order.
    order = methods.order_of_tokens("hilbert").view(-1, 4)[:, 0]
    qkv = [x[:, :, order].double() for x in (sample.query, sample.key, sample.value)]
    expected = dense(*qkv)
    for sparsity in (0.7, 0.9):
        hybrid, corrected = (
            relative(pisa.attention(*qkv, sparsity=sparsity, order=name), expected)
            for name in ("hybrid", "corrected")
        )
        assert corrected <= 1.15 * hybrid + 1e-12
