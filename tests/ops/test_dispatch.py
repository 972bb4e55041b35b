"""What each implementation can run, and what it computes at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.kernels.cpu import build, native, torch_path
from pisa_compile.kernels.params import AttentionParams, Settings
from pisa_compile.kernels.testing import random_inputs
from pisa_compile.ops import dispatch

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("impl", "given", "words"),
    [
        ("reference", {"settings": Settings(order="blockwise")}, None),
        ("cpu", {"settings": Settings(order="blockwise")}, "order='blockwise'"),
        ("cpu", {"dtype": torch.float64, "head_dim": 300}, None),
        ("cpu", {"device": GPU}, "it runs CPU tensors"),
        ("triton", {"device": GPU, "settings": Settings(order="blockwise")}, "order='blockwise'"),
        ("triton", {"device": GPU, "dtype": torch.float64}, "bfloat16 and float16, not torch.fl"),
        ("triton", {"device": GPU, "head_dim": 257}, "head_dim up to 256, not 257"),
        ("triton", {"device": torch.device("mps")}, "CUDA and ROCm tensors, these are on mps"),
    ],
)
def test_refusals_say_what_is_supported(
    impl: str, given: dict[str, Any], words: str | None
) -> None:
    given = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64, **given}
    settings = given.pop("settings", Settings())
    found = dispatch.refusal(impl, value_dim=64, settings=settings, **given)
    assert found is None if words is None else words in (found or "")


def test_what_the_fast_implementations_lack_runs_on_the_reference() -> None:
    query, key, value, _ = random_inputs(query_len=100).astuple()
    settings = {"sparsity": 0.5, "block_size": 16, "order": "blockwise"}
    expected = pisa.attention(query, key, value, impl="reference", **settings)
    assert torch.equal(pisa.attention(query, key, value, **settings), expected)
    with pytest.raises(pisa.UnsupportedError, match="does not implement order='blockwise'"):
        pisa.attention(query, key, value, impl="cpu", **settings)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 2, 8, 4), (1, 0, 8, 4), (1, 2, 0, 4), (1, 2, 8, 0)])
def test_nothing_to_compute_gives_nothing(impl: str, shape: tuple[int, ...]) -> None:
    batch, heads, _, width = shape
    key = torch.ones(batch, heads, 8, width)
    value = torch.ones(batch, heads, 8, 4)
    out, lse = pisa.attention(
        torch.ones(shape), key, value, sparsity=0.5, impl=impl, return_lse=True, scale=1.0
    )
    assert out.shape == (*shape[:3], 4)
    assert lse.shape == shape[:3]
    assert bool(out.isfinite().all())


@pytest.mark.skipif(native.unavailable() is not None, reason="the native library is not built")
def test_blocks_that_score_alike_are_taken_from_the_front_everywhere() -> None:
    key = torch.ones(1, 1, 160, 8)
    value = torch.arange(160.0).repeat_interleave(8).reshape(1, 1, 160, 8)
    params = AttentionParams(0.3, 0.7, 16, order="none")
    expected, _ = reference.attention(key, key, value, None, params)
    for run in (torch_path.attention, native.attention):
        out, _ = run(key, key, value, None, params)
        torch.testing.assert_close(out, expected)


def test_the_library_has_the_epsilon_of_the_specification() -> None:
    source = (build.SOURCES / "statistics.cpp").read_text()
    assert f"kCovarianceEps = {reference.COVARIANCE_EPS:.0e}f".replace("e-0", "e-") in source
