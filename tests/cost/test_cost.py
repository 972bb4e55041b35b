"""Predictions of the cost model, its store, and the gate that rests on them. Nothing is timed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import pisa_compile as pisa
from pisa_compile.cost import Profile, Workload, break_even, store
from pisa_compile.cost.model import dense_terms, fit, sparse_terms
from pisa_compile.kernels.params import Settings
from pisa_compile.ops.flops import attention_flops, dense_flops

from ..models import Attention

RATES = Profile(dense=(0.0, 1e-11, 0.0), sparse=(1e-3, 2e-11, 2e-11, 0.0))


def work(tokens: int = 4096, **settings: Any) -> Workload:
    return Workload(1, 8, 8, tokens, 64, 64, Settings(**settings))


def test_terms_are_those_of_the_flop_formula() -> None:
    given = work(1000, sparsity=0.8, order="zeroth", exact=(70, 0))
    shape = (1, 8, 1000, 64)
    assert dense_terms(given)[1] == dense_flops(shape, shape, shape)
    _, exact, means, _ = sparse_terms(given)
    expected = attention_flops(shape, shape, shape, given.settings)
    assert exact < expected <= exact + means


def test_fit_recovers_rates_and_drops_terms_that_do_not_help() -> None:
    works = [work(t, sparsity=s) for t in (512, 1024, 4096) for s in (0.5, 0.8, 0.95)]
    rates = (1e-4, 3e-12, 2e-12, 5e-10)
    terms = [sparse_terms(w) for w in works]
    seconds = [sum(r * x for r, x in zip(rates, t, strict=True)) for t in terms]
    assert fit(terms, seconds) == pytest.approx(rates, rel=1e-6)
    # A rate that would have to be negative is zero, and the others make the best of it.
    falling = fit([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0])
    assert falling[1] == 0.0
    assert 1.0 < falling[0] < 2.0


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.95])
def test_break_even_is_where_the_prediction_crosses(sparsity: float) -> None:
    profile = replace(RATES, sparse=(5e-2, 1e-11, 1e-11, 0.0))
    given = work(sparsity=sparsity)
    tokens = break_even(given, profile)
    assert tokens is not None
    assert tokens % 64 == 0

    def ratio(length: int) -> float:
        at = replace(given, tokens=length)
        return profile.sparse_seconds(at) / profile.dense_seconds(at)

    assert ratio(tokens) <= 0.95 < ratio(tokens - 64)


def test_break_even_never_and_always() -> None:
    slow = Profile(dense=(0.0, 1e-12, 0.0), sparse=(0.0, 1e-10, 1e-10, 0.0))
    assert break_even(work(sparsity=0.5), slow) is None
    free = Profile(dense=(1.0, 1e-10, 0.0), sparse=(0.0, 1e-12, 1e-12, 0.0))
    assert break_even(work(sparsity=0.5), free) == 16 * 64  # too few blocks to choose from
    assert break_even(work(sparsity=0.5, block_size=16), free) == 16 * 16


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PISA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PISA_COST_MODEL")
    store._profile.cache_clear()
    yield tmp_path / "cache"
    store._profile.cache_clear()


def profile() -> Profile | None:
    store._profile.cache_clear()  # as a new process would
    return store.profile_of(torch.device("cpu"), torch.float32, 64, 64)


def test_a_profile_is_measured_once_and_kept(cache: Path) -> None:
    with mock.patch.object(store, "measure", return_value=RATES) as measure:
        assert profile() == RATES
        assert profile() == RATES
        assert measure.call_count == 1
        with mock.patch.object(torch, "get_num_threads", return_value=77):
            profile()
        assert measure.call_count == 2  # another number of threads is another device
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_rates_that_cannot_be_are_measured_again(cache: Path, rate: float) -> None:
    with mock.patch.object(store, "measure", return_value=RATES):
        profile()
        (path,) = cache.iterdir()
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "sparse": [rate, 0.0, 0.0, 0.0]}))
        store._profile.cache_clear()
        assert profile() == RATES
    assert "NaN" not in path.read_text()


def test_a_failed_rename_leaves_no_file(cache: Path) -> None:
    with (
        mock.patch.object(store, "measure", return_value=RATES),
        mock.patch.object(store.os, "replace", side_effect=OSError("full")),
    ):
        assert profile() == RATES
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}}', '{"dense": 3}'])
def test_a_foreign_or_broken_file_is_measured_again(
    cache: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(store, "measure", return_value=RATES) as measure:
        profile()
        (file,) = cache.iterdir()
        file.write_text(content)
        with caplog.at_level(logging.WARNING):
            assert profile() == RATES
        assert measure.call_count == 2
        assert profile() == RATES
        assert measure.call_count == 2


def test_an_unwritable_cache_costs_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file, not a directory")
    with mock.patch.object(store, "measure", return_value=RATES):
        assert profile() == RATES
    assert "could not be kept" in caplog.text


def test_without_a_profile_fixed_lengths_decide(cache: Path) -> None:
    assert store.profile_of(torch.device("cuda", 0), torch.bfloat16, 64, 64) is None or (
        torch.cuda.is_available()
    )
    with mock.patch.object(store, "measure", side_effect=RuntimeError("no timer")):
        assert profile() is None


def test_a_real_measurement_gives_positive_times(cache: Path) -> None:
    shapes = ((256, 1, 0.25), (512, 1, 0.5), (512, 2, 0.25), (1024, 1, 0.25))
    with mock.patch("pisa_compile.cost.measure._SHAPES", shapes):
        found = profile()
    assert found is not None
    assert found.dense_seconds(work()) > 0
    assert found.sparse_seconds(work()) > 0
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["key"]["head_dim"] == 64


@pytest.mark.parametrize(("tokens", "replaced"), [(1024, False), (1152, False), (2048, True)])
def test_the_gate_follows_the_profile(cache: Path, tokens: int, replaced: bool) -> None:
    model, x = Attention(width=64, heads=2).eval(), torch.randn(1, tokens, 64)
    # Break-even of two heads of 32 at sparsity 0.85 lies between the lengths.
    rates = Profile(dense=(0.0, 1e-11, 0.0), sparse=(4e-3, 1e-11, 1e-11, 0.0))
    with mock.patch.object(store, "measure", return_value=rates), torch.no_grad():
        options = {"inner": "eager", "sparsity": 0.85}
        compiled = torch.compile(model, backend="pisa", options=options)
        (site,) = pisa.explain(compiled, x).sites
        assert site.replaced is replaced
        if not replaced:
            assert "on this device it pays from" in site.reason
        pisa.set_policy(compiled, {"": pisa.Policy(min_tokens=0)})
        (site,) = pisa.explain(compiled, x).sites
        assert site.replaced  # an explicit length goes before the prediction
