"""What the launcher refuses, and how it plans, without running a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pisa_compile.kernels import triton
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import random_inputs
from pisa_compile.kernels.triton import configs
from pisa_compile.kernels.triton.geometry import Device
from pisa_compile.kernels.triton.plan import plan
from pisa_compile.kernels.triton.tools import tune
from pisa_compile.kernels.triton.tools.compile_check import launches_of
from pisa_compile.ops import dispatch

PARAMS = AttentionParams(scale=0.1)
INPUTS = random_inputs(batch=2, heads=4, kv_heads=2, query_len=100)


def test_cpu_tensors_need_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        triton.attention(*INPUTS.astuple(), PARAMS)


def test_dispatch_knows_how_many_blocks_there_may_be() -> None:
    """Otherwise a site would be replaced and the call then fail."""

    def reason(key_len: Any) -> str | None:
        device, small = torch.device("cuda"), replace(PARAMS, block_size=16)
        return dispatch.refusal("triton", device, torch.float16, 64, 64, small, key_len)

    assert reason(2**20) is None
    assert "up to 65536 key blocks, not 65537; use a larger block_size" in str(reason(2**20 + 1))
    assert reason(None) is None


def test_a_long_row_is_searched_in_tiles() -> None:
    def tile(tokens: int, **settings: Any) -> tuple[int, int]:
        launches = launches_of("sm_90", 64, torch.float16, tokens=tokens, **settings)
        arguments = next(x.arguments for x in launches if x.name == "routing")
        return arguments["T"], arguments["N"]

    assert tile(2048 * 64) == (2048, 2048)
    assert tile(4096 * 64) == (4096, 4096)
    assert tile(4097 * 64) == (4096, 8192)
    assert tile(75_600, block_size=16) == (1024, 8192)


def test_no_map_of_scores_is_made() -> None:
    """With 2,048 blocks one of float32 scores would take 16 MB per head, 800 MB in all."""

    def largest(heads: int) -> int:
        launches = launches_of("sm_90", 128, torch.bfloat16, tokens=2048 * 64, heads=heads)
        (routing,) = (launch for launch in launches if launch.name == "routing")
        found = (routing.arguments[name] for name in ("scratch", "bitmap"))
        return max(tensor.numel() * tensor.element_size() for tensor in found)

    assert largest(24) < 40 << 20
    assert largest(24) == largest(96)


def test_many_heads_fit_the_grid() -> None:
    launches = launches_of("sm_90", 64, torch.float16, tokens=64, heads=40_000)
    assert all(size <= 65_535 for launch in launches for size in launch.grid[1:])


def test_configuration_survives_a_file(tmp_path: Path) -> None:
    for architecture in ("sm_80", "sm_90", "gfx942"):
        for width in (64, 256):
            config = configs.lookup(architecture, width, width, "bfloat16")
            entry = {"architecture": "x", "width": width, "dtype": "bfloat16", "config": config}
            configs.write_table(tmp_path / "table.json", [entry])
            assert configs.read_table(tmp_path / "table.json") == {("x", width, "bfloat16"): config}


def test_unknown_architecture_gets_that_of_a_relative(caplog: pytest.LogCaptureFixture) -> None:
    assert configs.lookup("sm_99", 64, 64, "float16") == configs.lookup("sm_86", 64, 64, "float16")
    assert "no kernel configurations for sm_99" in caplog.text


def test_tuning_needs_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the refusal is for those without")
    assert tune.main(["--output", str(tmp_path / "table.json")]) == 1
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err


VIDEO = {
    "wan_14b_720p": (75_600, 40),
    "wan_14b_480p": (32_760, 40),
    "hunyuan_video": (119_056, 24),
}


@pytest.mark.parametrize(("tokens", "heads"), VIDEO.values(), ids=VIDEO.keys())
@pytest.mark.parametrize("sparsity", [0.75, 0.875, 0.95])
@pytest.mark.parametrize(
    ("order", "routing"), [("hybrid", "topk"), ("corrected", "topk"), ("corrected", "threshold")]
)
def test_workspace_stays_below_three_percent(
    tokens: int, heads: int, sparsity: float, order: str, routing: str
) -> None:
    def tensor() -> torch.Tensor:
        memory = torch.empty(1, tokens, heads, 128, dtype=torch.bfloat16, device="meta")
        return memory.transpose(1, 2)

    query, key, value = tensor(), tensor(), tensor()
    params = AttentionParams(scale=0.1, sparsity=sparsity, order=order, routing=routing)
    work = plan(query, key, value, None, params, Device("sm_90", 132))
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
