"""Density as a tensor, permutations, the corrected order and threshold routing inside the forward
kernel, in the interpreter against the float64 specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_cases import assert_specified, case, run

import pisa_compile  # noqa: F401  (registers the op)
from pisa_compile.kernels import reference
from pisa_compile.kernels.testing import Inputs, relative_l2
from pisa_compile.kernels.triton import configs, launcher, plan

DENSITIES = torch.tensor([1.0, 0.5, 0.2, 0.05])


def _use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    config = replace(configs.INTERPRETER, **changes)
    monkeypatch.setattr(plan, "lookup", lambda *_: config)
    monkeypatch.setattr(launcher, "lookup", lambda *_: config)


@pytest.mark.parametrize("routing", ["topk", "threshold", "topk_covariance"])
def test_density_per_head(routing: str) -> None:
    inputs, params = case(
        heads=4, kv_heads=2, query_len=40, key_len=300, block_size=16, head_dim=16,
        routing=routing, exact=(20, 0),
    )  # fmt: skip
    assert_specified(inputs, params, density=DENSITIES)


@pytest.mark.parametrize("inside", [False, True], ids=["routing_kernel", "inside"])
def test_density_of_all_heads_and_dense(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, inside=inside)
    inputs, params = case(heads=2, query_len=150, block_size=32, head_dim=16, routing="threshold")
    assert_specified(inputs, params, density=torch.tensor(0.25))
    dense, _ = run(inputs, params, torch.tensor(1.5))
    q, k, v, _ = inputs.to(torch.float64).astuple()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=params.scale)
    assert relative_l2(dense, expected) < 1e-6


def test_density_may_be_any_view() -> None:
    inputs, params = case(heads=4, query_len=100, block_size=16, head_dim=16)
    table = torch.full((4, 3), torch.nan)
    table[:, 1] = DENSITIES
    assert_specified(inputs, params, density=table[:, 1])


def test_density_rounds_as_the_specification_does() -> None:
    """Float32 densities whose product with the block count is a whole number stay that number."""
    inputs, params = case(
        query_len=16, key_len=16 * 100, block_size=16, head_dim=16, heads=3, kv_heads=1,
        order="none",
    )  # fmt: skip
    assert_specified(inputs, params, density=torch.tensor([0.15, 0.29, 0.001]))


PERMUTED: dict[str, dict[str, Any]] = {
    "hybrid": {"heads": 2, "kv_heads": 1},
    "threshold": {"routing": "threshold", "sparsity": 0.7, "exact": (20, 3)},
    "covariance_masked": {"routing": "topk_covariance", "masked": 0.4, "batch": 2, "head_dim": 24},
    "exact": {"exact": (70, 5), "layout": "fused", "head_dim": 40, "order": "corrected"},
    "none": {"order": "none", "value_dim": 40},
}


@pytest.mark.parametrize("options", PERMUTED.values(), ids=PERMUTED.keys())
def test_permutation(options: dict[str, Any]) -> None:
    inputs, params = case(**{"query_len": 150, "block_size": 32, **options})
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    assert_specified(inputs, params, permutation=order)


def test_permutation_of_either_integer_type() -> None:
    inputs, params = case(query_len=90, block_size=32, head_dim=16)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    for ours, expected in zip(
        run(inputs, params, permutation=order.int()), run(inputs, params, permutation=order),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("tile", [{"rows": 128}, {"in_chunks": True}, {"descriptors": True}])
def test_permutation_with_other_tiles(tile: dict[str, Any], monkeypatch: Any) -> None:
    _use(monkeypatch, **tile)
    inputs, params = case(query_len=150, block_size=32, head_dim=24, heads=1)
    assert_specified(inputs, params, permutation=torch.arange(150).flip(0), density=DENSITIES[2])


def test_permutation_with_wrong_entries_reads_nothing_outside() -> None:
    """Rows that are never named keep what was there; the others are finite."""
    inputs, params = case(query_len=64, block_size=16, head_dim=16, heads=1)
    order = torch.arange(64)
    order[5], order[40] = -3, 2**40
    out, _ = run(inputs, params, permutation=order)
    named = torch.ones(64, dtype=torch.bool)
    named[[5, 40]] = False
    assert bool(out[:, :, named].isfinite().all())


CORRECTED: dict[str, dict[str, Any]] = {
    "one_tile": {"heads": 2},
    "gqa_masked": {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "query_len": 70,
        "masked": 0.3,
        "block_size": 32,
    },
    "two_tiles": {"head_dim": 96, "heads": 1, "masked": 0.3},
    "cross": {"query_len": 70, "key_len": 333, "block_size": 32},
    "few_queries": {"query_len": 1, "key_len": 150, "block_size": 16},
    "inside": {"routing": "threshold", "sparsity": 0.7},
    "beyond_the_limit": {"scale": 4.0, "block_size": 32},
}


@pytest.mark.parametrize("options", CORRECTED.values(), ids=CORRECTED.keys())
def test_corrected(options: dict[str, Any]) -> None:
    assert_specified(*case(**{"order": "corrected", **options}))


def test_correction_of_a_fully_masked_batch() -> None:
    inputs, params = case(batch=2, masked=0.2, order="corrected", block_size=32)
    assert inputs.key_mask is not None
    inputs.key_mask[0] = False
    assert_specified(inputs, params)


INSIDE: dict[str, dict[str, Any]] = {
    "pairs": {"rows": 128, "head_dim": 24},
    "in_chunks": {"in_chunks": True, "d_chunk": 16, "head_dim": 40, "block_size": 32},
    "descriptors": {"descriptors": True, "head_dim": 16, "block_size": 32},
    "rows_of_several_blocks": {"block_size": 16, "exact": (20, 3)},
    "half_blocks": {"rows": 32, "keys": 16},
}


@pytest.mark.parametrize("inside", [False, True], ids=["routing_kernel", "inside"])
@pytest.mark.parametrize("options", INSIDE.values(), ids=INSIDE.keys())
def test_threshold_in_either_kernel(
    options: dict[str, Any], inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"rows", "in_chunks", "d_chunk", "descriptors", "keys"} & set(options)
    _use(monkeypatch, inside=inside, **{name: options[name] for name in names})
    others = {name: value for name, value in options.items() if name not in names}
    inputs, params = case(query_len=140, routing="threshold", sparsity=0.7, **others)
    assert_specified(inputs, params)


@pytest.mark.parametrize(("rows", "order"), [(64, "zeroth"), (128, "corrected")])
def test_the_best_block_is_exact_even_below_the_cut(
    rows: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the blocks high and half low no score is 1.3 deviations above the mean, unless
    noise puts it there; then each query block takes its best one alone."""
    _use(monkeypatch, rows=rows, centroids=16)
    inputs, params = case(query_len=64 * 5, routing="threshold", sparsity=0.9, heads=1)
    params = replace(params, order=order)
    inputs.query.mul_(0.05)
    inputs.query[..., 0] = torch.where(torch.arange(320) // 64 == 2, -3.0, 3.0)
    inputs.key.mul_(0.02)
    inputs.key[..., 0] += torch.where(torch.arange(320) // 64 % 2 == 0, 1.0, -1.0)
    work = plan.plan(*inputs.astuple(), params, launcher.device_of(torch.device("cpu")))
    assert work.launches[-1].arguments["INSIDE"]
    exact = inputs.to(torch.float64)
    stats = reference.block_statistics(
        exact.key, exact.value, torch.ones(1, 320, dtype=torch.bool), 64
    )
    selected = reference.route(exact.query, stats, 320, params)
    assert bool((selected.sum(-1) == 1).all())
    assert_specified(inputs, params)


def test_equal_scores_select_one_block_anywhere() -> None:
    """Inside the forward kernel as in the routing kernel: not always the first one."""
    inputs, params = case(query_len=1024, block_size=16, head_dim=16, heads=1, routing="threshold")
    key = torch.zeros_like(inputs.key)
    same = Inputs(inputs.query, key, inputs.value, None)
    work = plan.plan(*same.astuple(), params, launcher.device_of(torch.device("cpu")))
    for launch in work.launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)
    found = work.launches[-1].arguments["indices"][0, :, :4]  # [tiles of 4 query blocks, entries]
    taken = torch.zeros(64, dtype=torch.int64)
    for entry in found.flatten().tolist():
        taken[entry & 0xFFFF] += (entry >> 16).bit_count()
    assert torch.equal(taken, torch.ones(64, dtype=torch.int64))


def test_the_op_reaches_the_kernels() -> None:
    inputs, params = case(heads=2, query_len=100, block_size=16, head_dim=16, order="corrected")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    density = torch.tensor([0.3, 0.6])
    out, lse = torch.ops.pisa.attention_with_lse(
        *inputs.astuple()[:3], None, density, order, scale=params.scale, sparsity=0.5,
        block_size=16, order="corrected", impl="triton",
    )  # fmt: skip
    ours = run(inputs, params, density, order)
    assert torch.equal(out, ours[0])
    assert torch.equal(lse, ours[1])


class _Broken:
    """Stands for a kernel that a device refuses."""

    def __init__(self, kernel: Any, refuses: str) -> None:
        self.kernel, self.refuses = kernel, refuses

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> Any:
            if self.refuses == "all" or arguments[self.refuses]:
                raise RuntimeError("the device refuses this")
            return self.kernel[grid](**arguments)

        return launch


def test_a_failing_configuration_is_replaced_once_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, params = case(query_len=100, head_dim=16, heads=1)
    _use(monkeypatch, descriptors=True)
    monkeypatch.setattr(plan, "forward_kernel", _Broken(plan.forward_kernel, "DESCRIPTORS"))
    assert_specified(inputs, params)
    run(inputs, params)
    assert len(caplog.records) == 1
    assert "the device refuses this" in caplog.text
    assert "falling back" in caplog.text
    assert list(launcher.failures().values()) == [1]
    launcher.forget_failures()


def test_what_fails_with_every_configuration_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, params = case(query_len=40, head_dim=16, heads=1)
    monkeypatch.setattr(plan, "forward_kernel", _Broken(plan.forward_kernel, "all"))
    with pytest.raises(RuntimeError, match="the device refuses this"):
        run(inputs, params)
    launcher.forget_failures()


def test_out_of_memory_is_not_answered_with_another_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(launcher, "plan", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        run(*case(query_len=40, head_dim=16, heads=1))


def test_the_least_demanding_configuration_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "lookup", lambda *_: configs.LEAST)
    for options in ({}, {"routing": "topk_covariance", "block_size": 16}, {"order": "corrected"}):
        assert_specified(*case(**{"query_len": 100, "head_dim": 24, "heads": 1, **options}))
