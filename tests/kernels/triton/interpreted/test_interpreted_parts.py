"""Statistics and routing kernels by themselves: what they leave in the workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreted_cases import case, routing_gap

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams, block_count, exact_block_count
from pisa_compile.kernels.testing import Inputs, poisoned_memory, random_inputs, relative_l2
from pisa_compile.kernels.triton import geometry, thresholds
from pisa_compile.kernels.triton.geometry import Device
from pisa_compile.kernels.triton.plan import plan


def _workspace(
    inputs: Inputs, params: AttentionParams, *names: str, **options: Any
) -> dict[str, Any]:
    """Arguments of the named kernels after they have run."""
    with poisoned_memory():
        work = plan(*inputs.astuple(), params, Device("interpreter", 1), **options)
    arguments: dict[str, Any] = {}
    for launch in work.launches:
        if launch.name in names:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
            arguments |= launch.arguments
    return arguments


@pytest.mark.parametrize("masked", [0.0, 0.5], ids=["dense", "masked"])
def test_statistics(masked: float) -> None:
    inputs, params = case(
        batch=2, heads=2, head_dim=24, value_dim=40, block_size=32, masked=masked,
        routing="topk_covariance",
    )  # fmt: skip
    mask = inputs.key_mask
    if mask is None:
        mask = torch.ones(2, 200, dtype=torch.bool)
    else:
        mask[0, 32:64] = False
    found = _workspace(inputs, params, "statistics", "first_order", "covariance")
    exact = inputs.to(torch.float64)
    stats = reference.block_statistics(exact.key, exact.value, mask, 32)

    def flat(name: str, expected: torch.Tensor) -> None:
        ours = found[name].view(expected.shape)
        assert relative_l2(ours, expected) < 1e-6, name

    flat("key_mean", stats.key_mean)
    flat("value_mean", stats.value_mean)
    assert torch.allclose(
        found["log_weight"].view(2, 2, -1).double(),
        stats.length.expand(-1, 2, -1).double().log(),
    )
    matrix = stats.first_order()
    valid_keys = mask.sum(1)[:, None, None, None]
    flat("first_order", params.scale * matrix / valid_keys)
    mean = matrix / stats.valid.sum(-1)[..., None, None]
    flat("mean_matrix", mean)
    norm = (stats.first_order_per_block() - mean[:, :, None]).flatten(-2).norm(dim=-1)
    flat("score_bias", (norm + reference.COVARIANCE_EPS).log())


def test_first_order_keeps_its_digits_under_a_large_common_key() -> None:
    """Keys are centred before the product, so only the rounding of the mean itself remains."""
    inputs, params = case(head_dim=16, query_len=256, key_len=256)
    shifted = Inputs(inputs.query, inputs.key + 1024.0, inputs.value, None)
    found = _workspace(shifted, params, "statistics", "first_order")["first_order"]
    exact = shifted.to(torch.float64)
    stats = reference.block_statistics(
        exact.key, exact.value, torch.ones(1, 256, dtype=torch.bool), 64
    )
    assert relative_l2(found, (params.scale / 256 * stats.first_order())[0]) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"query_len": 600, "block_size": 16},
        {"query_len": 600, "block_size": 16, "routing": "threshold", "order": "none"},
        {"query_len": 600, "block_size": 16, "routing": "topk_covariance", "masked": 0.5},
        {"query_len": 330, "block_size": 16, "exact": (50, 20)},
        {"query_len": 40, "key_len": 700, "exact": (50, 20), "block_size": 32},
        {"query_len": 300, "block_size": 16, "head_dim": 96, "heads": 2, "kv_heads": 1},
        {"query_len": 330, "key_block_size": 16, "exact": (50, 20)},
    ],
    ids=["topk", "threshold", "covariance_masked", "exact", "cross", "two_chunks_gqa", "keys_16"],
)
def test_routing_selects_what_the_specification_selects(options: dict[str, Any]) -> None:
    inputs, params = case(**{"head_dim": 16, "heads": 2, **options})
    assert routing_gap(inputs, params) > 1e-5
    found = _workspace(inputs, params, "statistics", "first_order", "covariance", "routing")
    exact = inputs.to(torch.float64)
    mask = inputs.key_mask
    key_len, size = exact.key.shape[2], params.key_size
    if mask is None:
        mask = torch.ones(1, key_len, dtype=torch.bool)
    repeat = exact.query.shape[1] // exact.key.shape[1]
    stats = reference.block_statistics(
        exact.key.repeat_interleave(repeat, 1), exact.value.repeat_interleave(repeat, 1),
        mask, size,
    )  # fmt: skip
    selected = reference.route(exact.query, stats, key_len, params)[0]  # [H, M, N]
    assert torch.equal(_from_bitmap(found["bitmap"], block_count(key_len, size)), selected)
    _check_indices(found, selected)


def _from_bitmap(bitmap: torch.Tensor, blocks: int) -> torch.Tensor:
    bits = (bitmap[..., None] >> torch.arange(32)) & 1
    assert not bits.flatten(-2)[..., blocks:].any()
    return bits.flatten(-2)[..., :blocks].bool()


def _check_indices(found: dict[str, Any], selected: torch.Tensor) -> None:
    """The entries of a tile are the sorted union of its query blocks, with a bit for each."""
    pack = found["PACK"]
    padding = -selected.shape[1] % pack
    rows = torch.nn.functional.pad(selected, (0, 0, 0, padding)).unflatten(1, (-1, pack))
    members = (rows.int() << torch.arange(pack)[:, None]).sum(2)  # [H, tiles, N]
    for head in range(members.shape[0]):
        for tile in range(members.shape[1]):
            blocks = members[head, tile].nonzero().flatten()
            count = int(found["counts"][head, tile])
            assert count == len(blocks)
            expected = blocks | (members[head, tile, blocks] << 16)
            assert found["indices"][head, tile, :count].tolist() == expected.tolist()


@pytest.mark.parametrize("elements", [4096, 128], ids=["in_registers", "in_tiles"])
def test_ties_favour_neither_early_nor_late_blocks(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal scores everywhere each row takes exactly its count, all blocks about as often."""
    monkeypatch.setattr(geometry, "SELECT_ELEMENTS", elements)
    inputs = random_inputs(heads=1, query_len=1024, head_dim=16)
    # One column of ones: a sum with a single term is the same in every order.
    key = torch.zeros_like(inputs.key)
    key[..., 0] = 1.0
    same = Inputs(inputs.query, key, inputs.value, None)
    params = AttentionParams(scale=0.25, sparsity=0.8, block_size=16)
    found = _workspace(same, params, "statistics", "first_order", "routing")
    selected = _from_bitmap(found["bitmap"], 64)[0]  # [M, N]
    count = exact_block_count(params.density, 64)
    assert torch.equal(selected.sum(1), torch.full((64,), count))
    assert torch.equal(selected.sum(0), torch.full((64,), count))


LONG_ROWS: dict[str, tuple[int, int, str]] = {
    "in_registers": (1100, 4096, "topk"),
    "in_tiles": (330, 512, "topk"),
    "in_tiles_threshold": (330, 512, "threshold"),
}


@pytest.mark.parametrize("case_", LONG_ROWS.values(), ids=LONG_ROWS.keys())
def test_long_rows_of_scores(case_: tuple[int, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of bitmap words, and a row of scores that is searched at once or tile by tile."""
    blocks, elements, routing = case_
    monkeypatch.setattr(geometry, "SELECT_ELEMENTS", elements)
    inputs = random_inputs(heads=1, query_len=40, key_len=blocks * 16, head_dim=16, seed=1)
    params = AttentionParams(
        scale=0.25, sparsity=0.9, block_size=16, order="none", routing=routing, exact=(40, 20)
    )
    assert routing_gap(inputs, params) > 1e-6
    found = _workspace(inputs, params, "statistics", "routing")
    assert found["N"] // found["T"] == {1100: 2, 330: 4}[blocks]
    exact = inputs.to(torch.float64)
    mask = torch.ones(1, blocks * 16, dtype=torch.bool)
    stats = reference.block_statistics(exact.key, exact.value, mask, 16)
    selected = reference.route(exact.query, stats, blocks * 16, params)[0]
    assert torch.equal(_from_bitmap(found["bitmap"], blocks), selected)
    _check_indices(found, selected)


@triton.jit
def _quantile_kernel(density, out, size: tl.constexpr):
    places = tl.arange(0, size)
    tl.store(out + places, thresholds.normal_upper_quantile(tl.load(density + places)))


def test_normal_quantile() -> None:
    density = torch.cat([torch.logspace(-30, 0, 512), 1 - torch.logspace(-7, -0.4, 510)])
    density = torch.cat([density, torch.tensor([0.0, 1.0])])
    out = torch.empty_like(density)
    _quantile_kernel[(1,)](density, out, size=1024)
    expected = torch.special.ndtri(1 - density.double())
    small = density < 1e-12  # 1 - density has no digits left there
    expected[small] = -torch.special.ndtri(density[small].double())
    infinite = expected.isinf()
    assert torch.equal(out[infinite].double(), expected[infinite])
    error = (out[~infinite].double() - expected[~infinite]).abs()
    assert bool((error <= 2e-6 * expected[~infinite].abs() + 1e-6).all())
