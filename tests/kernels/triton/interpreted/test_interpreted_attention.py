"""The whole op in the interpreter against the float64 specification, feature by feature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_cases import assert_specified, case, run

from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2, specified
from pisa_compile.kernels.triton import configs, geometry, launcher, plan

FEATURES: dict[str, dict[str, Any]] = {
    "hybrid": {"heads": 2},
    "zeroth": {"order": "zeroth", "query_len": 256},
    "none": {"order": "none"},
    "threshold": {"routing": "threshold", "sparsity": 0.7},
    "covariance": {"routing": "topk_covariance"},
    "threshold_zeroth": {"routing": "threshold", "order": "zeroth", "block_size": 16},
    "covariance_none_masked": {"routing": "topk_covariance", "order": "none", "masked": 0.3},
    "all_blocks": {"sparsity": 0.0},
    "all_blocks_threshold": {"sparsity": 0.0, "routing": "threshold"},
    "head_dim_8": {"head_dim": 8, "heads": 1},
    "head_dim_40": {"head_dim": 40},
    "head_dim_72": {"head_dim": 72, "layout": "fused"},
    "head_dim_96": {"head_dim": 96, "routing": "topk_covariance", "heads": 1},
    "head_dim_256": {"head_dim": 256, "heads": 1},
    "value_wider": {"head_dim": 32, "value_dim": 80},
    "value_narrower": {"head_dim": 80, "value_dim": 24, "routing": "topk_covariance"},
    "gqa": {"batch": 2, "heads": 4, "kv_heads": 2, "query_len": 100, "block_size": 32},
    "mqa": {"heads": 3, "kv_heads": 1, "block_size": 32},
    "more_keys": {"query_len": 70, "key_len": 333},
    "fewer_keys": {"query_len": 200, "key_len": 90, "block_size": 16},
    "one_query": {"query_len": 1, "key_len": 150},
    "one_key": {"query_len": 70, "key_len": 1},
    "one_block": {"query_len": 40},
    "masked": {"batch": 2, "masked": 0.4},
    "masked_threshold": {"masked": 0.5, "routing": "threshold", "block_size": 32},
    "exact_prefix": {"exact": (70, 0), "query_len": 300},
    "exact_suffix": {"exact": (0, 10), "query_len": 300, "block_size": 32},
    "exact_both_cross": {"exact": (5, 70), "query_len": 100, "key_len": 300},
    "exact_everything": {"exact": (150, 60)},
    "exact_threshold_masked": {"exact": (20, 3), "routing": "threshold", "masked": 0.3},
    "block_16": {"block_size": 16, "query_len": 250},
    "block_32": {"block_size": 32, "query_len": 250},
    "block_128": {"block_size": 128, "query_len": 500, "heads": 1},
    "keys_32": {"key_block_size": 32, "order": "corrected", "query_len": 250},
    "keys_16_exact": {"block_size": 32, "key_block_size": 16, "exact": (70, 20), "masked": 0.3},
    "keys_128_threshold": {"block_size": 16, "key_block_size": 128, "routing": "threshold"},
    "keys_32_covariance": {"key_block_size": 32, "routing": "topk_covariance", "key_len": 170},
    "contiguous": {"layout": "BHTD"},
    "fused": {"layout": "fused"},
    "negative_scale": {"scale": -0.3},
    "large_scale": {"scale": 4.0},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_feature_matches_specification(options: dict[str, Any]) -> None:
    assert_specified(*case(**options))


HALF_FEATURES = ("hybrid", "none", "threshold", "head_dim_72", "gqa", "masked", "exact_suffix")


@pytest.mark.parametrize("name", HALF_FEATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_within_a_few_roundings(name: str, dtype: torch.dtype) -> None:
    """Weights, means and output are rounded to the input dtype once each.

    Rounding is measured on the exact result as the interpreter does it, which truncates bfloat16.
    """
    inputs, params = case(**FEATURES[name], dtype=dtype)
    exact = specified(inputs, params)[0]
    rounding = relative_l2(_truncated(exact, dtype), exact)
    assert_specified(inputs, params, tolerance=3 * rounding, lse_tolerance=20 * rounding)


def _truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        return x.to(dtype)
    return (x.float().view(torch.int32) & -65536).view(torch.float32)


@pytest.mark.parametrize("order", ["zeroth", "hybrid"])
def test_tail_mass_is_rescaled_when_the_maximum_grows(order: str) -> None:
    """Centroid scores rise from group to group and the largest lies in an unselected block.

    An implementation that keeps the tail mass apart and forgets to rescale it when the running
    maximum grows is off by orders of magnitude here.
    """
    inputs, params = case(query_len=32, key_len=16 * 80, head_dim=16, heads=1, block_size=16)
    params = replace(params, sparsity=0.9, order=order)
    # Half of each query block points along +x with twice the size of the half that points along
    # -x: the mean query selects the low end, where its minority finds its own small scores.
    inputs.query.mul_(0.1)
    inputs.query[..., 0] = torch.where(torch.arange(32) % 4 == 0, 8.0, -4.0)
    inputs.key.mul_(0.3)
    inputs.key[..., 0] = torch.linspace(-3, 3, 16 * 80)
    assert_specified(inputs, params)


def test_masked_keys_may_hold_nan() -> None:
    inputs, params = case(masked=0.4, batch=2, routing="topk_covariance")
    assert inputs.key_mask is not None
    inputs.key_mask[:, 64:128] = False  # a whole block
    clean = run(inputs, params)
    hidden = ~inputs.key_mask[:, None, :, None]
    poisoned = replace(
        inputs,
        key=inputs.key.masked_fill(hidden, torch.nan),
        value=inputs.value.masked_fill(hidden, torch.inf),
    )
    for ours, expected in zip(run(poisoned, params), clean, strict=True):
        assert torch.equal(ours, expected)
    assert_specified(inputs, params)


@pytest.mark.parametrize("routing", ["topk", "threshold", "topk_covariance"])
@pytest.mark.parametrize("order", ["none", "hybrid"])
def test_fully_masked_batch_is_zero_and_minus_infinity(routing: str, order: str) -> None:
    inputs, params = case(batch=2, masked=0.2, routing=routing, order=order, block_size=32)
    assert inputs.key_mask is not None
    inputs.key_mask[0] = False
    assert_specified(inputs, params)


def test_no_keys_and_no_queries() -> None:
    inputs, params = case(query_len=5, key_len=0)
    out, lse = run(inputs, params)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    inputs, params = case(query_len=0, key_len=70)
    out, lse = run(inputs, params)
    assert out.shape == (1, 1, 0, 64)
    assert lse.shape == (1, 1, 0)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_reads_nothing_outside_the_views(
    descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views into the middle of memory full of NaN: more heads, tokens and columns all around."""
    _use(monkeypatch, descriptors=descriptors)

    def surrounded(tensor: torch.Tensor) -> torch.Tensor:
        b, h, t, d = tensor.shape
        memory = torch.full((b + 2, t + 70, h + 2, d + 16), torch.nan)
        view = memory[1:-1, 33 : 33 + t, 1:-1, 8 : 8 + d].transpose(1, 2)
        return view.copy_(tensor)

    inputs, params = case(query_len=200, key_len=170, head_dim=24, value_dim=40)
    assert_specified(Inputs(*map(surrounded, inputs.astuple()[:3]), None), params)


def test_any_strides() -> None:
    """Columns apart in memory, heads innermost, a broadcast value and a strided mask."""
    inputs, params = case(masked=0.3, head_dim=24, batch=2, heads=2)
    assert inputs.key_mask is not None
    strange = Inputs(
        inputs.query.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        inputs.key.transpose(2, 3).contiguous().transpose(2, 3),
        inputs.value[:, :1].expand(-1, 2, -1, -1),
        inputs.key_mask.repeat_interleave(2, dim=1)[:, ::2],
    )
    assert strange.query.stride(3) != 1 != strange.key.stride(3)
    assert_specified(strange, params)


def test_offsets_beyond_32_bits() -> None:
    """Batches further apart than 2**31 elements, as a long video's are. Pages stay untouched."""
    apart = 2**31 + 64
    inputs, params = case(batch=2, heads=1, query_len=70, head_dim=16, dtype=torch.float16)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(apart + 70 * 16, dtype=tensor.dtype)
        return memory.as_strided(tensor.shape, (apart, 16, 16, 1)).copy_(tensor)

    far = replace(inputs, key=spread(inputs.key))
    for ours, expected in zip(run(far, params), run(inputs, params), strict=True):
        assert torch.equal(ours, expected)


def test_value_sums_beyond_float16() -> None:
    inputs, params = case(dtype=torch.float16, heads=1)
    inputs = replace(inputs, value=(inputs.value.clamp(-3, 3) * 1e4).contiguous())
    assert_specified(inputs, params, tolerance=2e-3, lse_tolerance=0.01)


def test_common_key_vector_does_not_cancel() -> None:
    """Centred keys keep their digits under a vector a thousand times their size."""
    inputs, params = case(sparsity=0.9, query_len=256, seed=3)
    common = 1000.0 * torch.ones(64)
    common[32:] *= -1.0
    query = inputs.query - inputs.query.mean(-1, keepdim=True)
    query[..., 32:] -= (query @ common / (-32_000.0))[..., None]  # orthogonal to it
    near = replace(inputs, query=query)
    far = replace(near, key=inputs.key + common)
    expected = specified(near, params)[0]
    # Float32 rounds the shifted keys to 3e-5 of their spread before any kernel sees them.
    assert relative_l2(specified(far, params)[0], expected) < 1e-3
    out, _ = run(far, params)
    assert relative_l2(out, specified(far, params)[0]) < 1e-3


TILES = {
    "pairs": {"rows": 128},
    "half_blocks": {"rows": 32, "keys": 16},
    "descriptors": {"descriptors": True},
    "in_chunks": {"in_chunks": True, "d_chunk": 16},
    "descriptor_pairs": {"rows": 128, "descriptors": True, "keys": 64},
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize(
    "options",
    [
        {"query_len": 200},
        {"query_len": 140, "block_size": 16, "exact": (20, 3), "routing": "threshold"},
        {"query_len": 140, "block_size": 32, "order": "none", "layout": "fused"},
        {"query_len": 70, "key_len": 270, "head_dim": 40, "heads": 2, "kv_heads": 1},
    ],
    ids=["ragged", "small_blocks_exact", "keep_or_drop", "cross_gqa"],
)
def test_tile_shape_never_changes_the_result(
    tile: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile over several query blocks visits their union; each row keeps its own selection."""
    _use(monkeypatch, **tile)
    assert_specified(*case(**options))


def _use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    config = replace(configs.INTERPRETER, **changes)
    monkeypatch.setattr(plan, "lookup", lambda *_: config)
    monkeypatch.setattr(launcher, "lookup", lambda *_: config)


def test_groups_of_heads_share_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MIN_TILES", 1)
    monkeypatch.setattr(geometry, "WORKSPACE_SHARE", 0.0)
    inputs, params = case(batch=2, heads=4, kv_heads=2, query_len=70, head_dim=16)
    work = plan.plan(*inputs.astuple(), params, geometry.Device("interpreter", 1))
    assert [launch.name for launch in work.launches].count("forward") == 4
    assert_specified(inputs, params)


def test_results_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, params = case(routing="topk_covariance")
    first = run(inputs, params)
    for again, expected in zip(run(inputs, params), first, strict=True):
        assert torch.equal(again, expected)


def test_random_shapes() -> None:
    """Everything at once, small."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)

        def pick(*choices: Any, draw: torch.Generator = draw) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=draw))]

        kv_heads = pick(1, 2)
        inputs = random_inputs(
            batch=pick(1, 2),
            heads=kv_heads * pick(1, 2),
            kv_heads=kv_heads,
            query_len=pick(1, 17, 64, 100),
            key_len=pick(1, 33, 100, 150),
            head_dim=pick(16, 24, 40),
            value_dim=pick(16, 24, 40),
            masked=pick(0.0, 0.0, 0.5),
            layout=pick("BTHD", "BHTD"),
            seed=seed,
        )
        params = AttentionParams(
            scale=0.25,
            sparsity=pick(0.3, 0.7, 0.9),
            block_size=pick(16, 16, 32),
            key_block_size=pick(None, 16, 32, 64),
            routing=pick("topk", "threshold", "topk_covariance"),
            order=pick("none", "zeroth", "hybrid"),
            exact=pick((0, 0), (9, 0), (0, 20)),
        )
        assert_specified(inputs, params)
