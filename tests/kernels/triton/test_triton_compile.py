"""Ahead-of-time compilation of the shipped configurations, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pisa_compile.kernels.triton.compile_check import ARCHITECTURES, HEAD_DIMS, rows

KINDS = {
    "sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma",
    "sm_100": "tcgen05", "sm_120": "mma.sync", "gfx942": "mfma", "gfx950": "mfma",
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached kernel would hide that the compiler of today fails."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _check(architecture: str, head_dim: int, dtype: str, **call: Any) -> None:
    found = list(rows([architecture], [head_dim], [DTYPES[dtype]], **call))
    problems = [f"{row.kernel}: {row.problem}" for row in found if not row.ok]
    assert not problems
    for row in found:
        if row.kernel == "forward" and dtype != "float32":
            assert row.mma == KINDS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    _check(architecture, 128, "bfloat16", kernels=("statistics", "routing", "forward"))


VARIANTS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "all_kernels": ("sm_90", 64, "bfloat16", {}),
    "odd_width": ("sm_80", 72, "bfloat16", {"kernels": ("forward",)}),
    "wide_small_memory": ("sm_89", 256, "bfloat16", {"kernels": ("forward",)}),
    "masked": ("sm_90", 96, "float16", {"kernels": ("forward",), "masked": True}),
    "budget": ("sm_90", 128, "bfloat16", {"kernels": ("routing",), "budget": True}),
    "float32": ("sm_90", 64, "float32", {"kernels": ("forward",)}),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_variant(variant: tuple[str, int, str, dict[str, Any]]) -> None:
    architecture, head_dim, dtype, call = variant
    _check(architecture, head_dim, dtype, **call)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_86", "gfx950"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(architecture: str, head_dim: int, dtype: str) -> None:
    _check(architecture, head_dim, dtype)
    _check(architecture, head_dim, dtype, kernels=("forward",), masked=True)
    for routing, order in (("threshold", "zeroth"), ("topk", "none")):
        names = ("routing", "forward")
        _check(architecture, head_dim, dtype, kernels=names, routing=routing, order=order)
