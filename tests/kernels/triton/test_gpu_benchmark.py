"""The GPU benchmark's smoke run: every line of it at toy sizes, in the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
BROKEN = """
import sys
sys.path[:0] = [{root!r}]
sys.argv = ["gpu", "--smoke", "--output", {output!r}]
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks
right = checks.attention
checks.attention = lambda *a, **k: tuple(1.01 * t for t in right(*a, **k))
checks.CHECKS = {{"hybrid": {{}}}}
gpu.TOYS = ()
sys.exit(gpu.main())
"""


@pytest.mark.slow
def test_smoke_run_writes_a_record(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke"]
    subprocess.run([*command, "--output", str(output)], check=True, cwd=ROOT)
    record = json.loads(output.read_text())
    assert all(check["passed"] for check in record["checks"])
    names = {check["name"] for check in record["checks"]}
    assert {"reduce-overhead", "no fallback", "replay corrected topk"} <= names
    for result in record["results"]:
        assert {"pisa", "pisa_corrected", "pisa_threshold", "triton_dense"} <= set(result["times"])
        assert "needs a GPU" in result["times"]["flex"]["unavailable"]
    assert {"strided", "random"} <= set(record["permutation"]["times"])


@pytest.mark.slow
def test_nothing_is_measured_when_a_result_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    code = BROKEN.format(root=str(ROOT), output=str(output))
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1, finished.stderr
    assert "not measured, because results are wrong" in finished.stderr
    assert not output.exists()
