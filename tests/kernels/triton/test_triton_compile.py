"""Ahead-of-time compilation of the shipped configurations, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


from pisa_compile.kernels.triton.configs import Launch, lookup
from pisa_compile.kernels.triton.tools.compile_check import ARCHITECTURES, HEAD_DIMS, rows

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
    assert found
    problems = [f"{row.kernel}: {row.problem}" for row in found if not row.ok]
    assert not problems
    for row in found:
        if row.kernel == "forward" and dtype != "float32":
            assert row.mma == KINDS[architecture]


# A call for each architecture, so that all kernels and the main variants of each are compiled
# somewhere in a normal run; `test_product` has all of them everywhere.
NORMAL: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "sm_80": ("sm_80", 72, "bfloat16", {"kernels": ("forward",), "order": "zeroth"}),
    "sm_89": ("sm_89", 96, "bfloat16",
              {"kernels": ("moments", "forward"), "order": "zeroth", "routing": "threshold"}),
    "sm_90": ("sm_90", 128, "bfloat16",
              {"kernels": ("energy", "statistics", "first_order", "forward"),
               "order": "corrected"}),
    "sm_90_threshold": ("sm_90", 128, "bfloat16",
                        {"kernels": ("cuts", "forward"), "routing": "threshold"}),
    "sm_90_masked": ("sm_90", 96, "float16", {"kernels": ("forward",), "masked": True,
                                              "permuted": True}),
    "sm_90_small_key_blocks": ("sm_90", 64, "bfloat16",
                               {"kernels": ("statistics", "routing", "forward"),
                                "routing": "topk", "order": "corrected", "key_block_size": 32}),
    "sm_100": ("sm_100", 128, "bfloat16", {"kernels": ("covariance", "forward")}),
    "sm_120": ("sm_120", 128, "bfloat16", {"kernels": ("routing",), "density": True}),
    "gfx942": ("gfx942", 128, "bfloat16", {"kernels": ("forward",), "order": "none",
                                           "routing": "topk"}),
}  # fmt: skip


@pytest.mark.parametrize("variant", NORMAL.values(), ids=NORMAL.keys())
def test_variant(variant: tuple[str, int, str, dict[str, Any]]) -> None:
    architecture, head_dim, dtype, call = variant
    _check(architecture, head_dim, dtype, **call)


def test_a_spilling_configuration_is_found() -> None:
    """Four warps with tiles for eight: what the check is there to keep out of the table."""
    spilling = replace(lookup("sm_80", 128, 128, "bfloat16"), rows=128, forward=Launch(4, 2))
    (row,) = rows(
        ["sm_80"], [128], [torch.bfloat16], kernels=("forward",), config=spilling, routing="topk"
    )
    assert row.compiles
    assert not row.ok
    assert "spills" in row.problem


CALLS: dict[str, dict[str, Any]] = {
    "corrected_covariance": {"order": "corrected", "density": True},
    "masked_and_permuted": {
        "order": "corrected", "masked": True, "permuted": True,
        "kernels": ("statistics", "covariance", "routing", "forward"),
    },
    "masked": {"masked": True, "kernels": ("forward",)},
    "threshold": {"routing": "threshold", "density": True,
                  "kernels": ("moments", "cuts", "forward")},
    "threshold_masked": {"routing": "threshold", "masked": True, "permuted": True,
                         "kernels": ("cuts", "forward")},
    "threshold_zeroth": {"routing": "threshold", "order": "zeroth"},
    "topk_none": {"routing": "topk", "order": "none", "kernels": ("routing", "forward")},
    "topk_corrected": {"routing": "topk", "order": "corrected", "kernels": ("routing",)},
    "threshold_none": {"routing": "threshold", "order": "none", "kernels": ("routing",)},
    "small_key_blocks": {"routing": "topk", "order": "corrected", "key_block_size": 32},
    "small_key_blocks_masked": {"routing": "topk", "order": "corrected", "key_block_size": 32,
                                "masked": True, "permuted": True, "kernels": ("forward",)},
    "small_key_blocks_threshold": {"routing": "threshold", "key_block_size": 32,
                                   "kernels": ("forward",)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_86", "gfx950"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_product(architecture: str, head_dim: int, dtype: str, call: dict[str, Any]) -> None:
    _check(architecture, head_dim, dtype, **call)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tokens", [75_600, 300_000])
def test_many_small_blocks(architecture: str, tokens: int) -> None:
    """Rows of scores that do not fit the registers are searched a tile at a time."""
    call = {"kernels": ("routing",), "block_size": 16, "tokens": tokens}
    _check(architecture, 128, "bfloat16", **call)
