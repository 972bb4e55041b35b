"""What the launcher refuses, and how it plans, without running a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pisa_compile.kernels import triton
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs
from pisa_compile.kernels.triton.compile_check import launches_of
from pisa_compile.kernels.triton.geometry import Device
from pisa_compile.kernels.triton.launcher import check
from pisa_compile.kernels.triton.plan import plan

PARAMS = AttentionParams(scale=0.1)
INPUTS = random_inputs(batch=2, heads=4, kv_heads=2, query_len=100)


def test_cpu_tensors_need_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        triton.attention(*INPUTS.astuple(), PARAMS)


def _with(**changes: Any) -> tuple[Inputs, AttentionParams]:
    params = {k: changes.pop(k) for k in list(changes) if hasattr(PARAMS, k)}
    return replace(INPUTS, **changes), replace(PARAMS, **params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "blockwise"}, "order in .*'hybrid'.*'blockwise'"),
        ({"routing": "random"}, "routing in .*'random'"),
        ({"block_size": 48}, "block_size in .*48"),
        ({"query": INPUTS.query.double()}, "dtype in .*float64"),
        ({"query": INPUTS.query.half()}, "one dtype"),
        ({"key": INPUTS.key[:, :, :50]}, "expected query"),
        ({"query": INPUTS.query[:, :3]}, "multiple of G"),
        ({"query": torch.zeros(2, 4, 9, 320), "key": torch.zeros(2, 2, 100, 320)}, "up to 256"),
        ({"key": torch.zeros(2, 2, 200_000, 64), "value": torch.zeros(2, 2, 200_000, 1),
          "block_size": 16}, "at most 8192 key blocks"),
        ({"key_mask": torch.ones(2, 100)}, "boolean"),
        ({"key_mask": torch.ones(2, 99, dtype=torch.bool)}, "key_mask"),
        ({"key_mask": torch.ones(2, 100, dtype=torch.bool, device="meta")}, "one device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refusals_say_what_is_supported(changes: dict[str, Any], message: str) -> None:
    inputs, params = _with(**changes)
    with pytest.raises(ValueError, match=message):
        check(*inputs.astuple(), params, None)


def test_budget_is_checked() -> None:
    with pytest.raises(ValueError, match="budget must be float32"):
        check(*INPUTS.astuple(), PARAMS, torch.ones(2))


VIDEO = {
    "wan_14b_720p": (75_600, 40),
    "wan_14b_480p": (32_760, 40),
    "hunyuan_video": (119_056, 24),
}


@pytest.mark.parametrize(("tokens", "heads"), VIDEO.values(), ids=VIDEO.keys())
@pytest.mark.parametrize("sparsity", [0.75, 0.875, 0.95])
def test_workspace_stays_below_three_percent(tokens: int, heads: int, sparsity: float) -> None:
    def tensor() -> torch.Tensor:
        memory = torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16, device="meta")
        return memory.transpose(1, 2)

    query, key, value = tensor(), tensor(), tensor()
    params = AttentionParams(scale=0.1, sparsity=sparsity)
    work = plan(query, key, value, None, params, None, Device("sm_90", 132))
    outside = [query, key, value, work.out, work.lse]
    used: dict[int, int] = {}
    for launch in work.launches:
        for argument in launch.arguments.values():
            tensor_ = getattr(argument, "base", argument)
            if isinstance(tensor_, torch.Tensor) and not any(tensor_ is t for t in outside):
                used[id(tensor_)] = tensor_.numel() * tensor_.element_size()
    inputs = 3 * query.numel() * query.element_size()
    assert sum(used.values()) <= 0.03 * inputs


def test_length_and_sparsity_do_not_compile_again() -> None:
    """Constants of the kernels depend on the length only by powers of two of the block count."""

    def constants(**call: Any) -> list[dict[str, Any]]:
        found = []
        for launch in launches_of("sm_90", 128, torch.bfloat16, **call):
            names = [p.name for p in launch.kernel.params if p.is_constexpr]
            found.append({name: launch.arguments[name] for name in names})
        return found

    base = constants(tokens=75_600, sparsity=0.85)
    assert constants(tokens=75_601, sparsity=0.85) == base
    assert constants(tokens=119_056, sparsity=0.9) == base
    assert constants(tokens=70_000, sparsity=0.0) == base
