"""The tuning command, with injected times: what it writes, and that the launcher then uses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_cases import assert_specified, case

from pisa_compile.kernels.triton import configs
from pisa_compile.kernels.triton.configs import INTERPRETER, Launch
from pisa_compile.kernels.triton.tools import tune

PROBLEM = tune.Problem(40, 1, 16, "float32", 0.6, torch.device("cpu"))


@pytest.fixture(autouse=True)
def shipped_table() -> Iterator[None]:
    configs.use_table(None)
    yield
    configs.use_table(None)


def test_the_fastest_right_candidate_wins() -> None:
    times = iter([5.0, 7.0, 3.0, 4.0])
    aspect = tune.Aspect("forward", ("forward",), ({"rows": 32}, {"keys": 32}, {"keys": 16}))
    entry = tune.tune(PROBLEM, lambda run: next(times), wanted=[aspect])
    assert entry["config"] == replace(INTERPRETER, keys=32)
    assert entry["times"] == {"forward": {"before_ms": 5.0, "after_ms": 3.0}}


def test_candidates_that_fail_the_check_or_are_wrong_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = tune._prepared

    def dishonest(inputs: Any, params: Any, config: configs.Config, names: Any) -> Any:
        out, run = honest(inputs, params, config, names)
        return out + (config.keys == 16), run

    def proven(config: configs.Config, *_: Any) -> bool:
        return config.rows != 32

    monkeypatch.setattr(tune, "_prepared", dishonest)
    times = iter([5.0, 1.0, 1.0])
    aspect = tune.Aspect("forward", ("forward",), ({"rows": 32}, {"keys": 16}))
    entry = tune.tune(PROBLEM, lambda run: next(times), wanted=[aspect], proven=proven)
    assert entry["config"] == INTERPRETER
    assert "is wrong by" in caplog.text


def test_command_writes_a_table_that_the_launcher_uses(tmp_path: Path) -> None:
    def falling() -> Callable[[Callable[[], None]], float]:
        """Every candidate is faster than the one before."""
        left = iter(range(1000, 0, -1))

        def timer(run: Callable[[], None]) -> float:
            run()
            return float(next(left))

        return timer

    table = tmp_path / "folder" / "table.json"
    size = ["--tokens", "20", "--heads", "1", "--sparsity", "0.5"]
    arguments = ["--output", str(table), *size, "--head-dims", "16", "--dtypes", "float32"]
    assert tune.main([*arguments, "--candidates", "1"], falling()) == 0
    written = json.loads(table.read_text())
    assert {name for entry in written["entries"] for name in entry["times"]} == {
        "forward", "guarded", "statistics", "routing", "threshold"
    }  # fmt: skip
    configs.use_table(table)
    found = configs.lookup("interpreter", 16, 16, "float32")
    assert found == configs.config_from(written["entries"][0]["config"])
    assert found.keys == 32
    assert found.guarded == Launch(4, 1)
    assert found.inside is False
    assert configs.lookup("interpreter", 64, 64, "float32") == INTERPRETER
    assert_specified(*case(query_len=100, head_dim=16, heads=1, routing="threshold"))


def test_table_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(INTERPRETER, keys=16)
    entry = {"architecture": "interpreter", "width": 32, "dtype": "float32", "config": own}
    configs.write_table(tmp_path / "table.json", [entry])
    monkeypatch.setenv(configs.TABLE_VARIABLE, str(tmp_path / "table.json"))
    configs._in_use.clear()
    configs._lookup.cache_clear()
    assert configs.lookup("interpreter", 24, 24, "float32") == own


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"schema": 0, "entries": []}',
     '{"schema": 1, "entries": [{"architecture": "sm_90", "width": 64, "dtype": "float16", '
     '"config": {"colour": 3}}]}'],
    ids=["empty", "other", "old", "unknown_setting"],
)  # fmt: skip
def test_what_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ValueError, match="expected a table of kernel configurations"):
        configs.use_table(tmp_path / "table.json")
    with pytest.raises(ValueError, match="expected a table"):
        configs.use_table(tmp_path / "missing.json")
