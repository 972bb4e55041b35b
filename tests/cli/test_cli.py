"""The subcommands `explain`, `bench` and `doctor`, and the command line around them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pisa_compile.cli import main

pytest.importorskip("typer")

from pisa_compile.cli import bench, doctor

MODEL = """
import torch
from tests.models import tiny, tokens
def build(): return tiny()
def example(): return tokens(300)
def example_dict(): return {"x": tokens(300)}
def nothing(): return None
built = tiny(1)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mymodel.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", sys.path[:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small calls
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("mymodel", None)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return int(exit.value.code or 0)


def test_help_has_examples(capsys) -> None:
    for command in ("run", "doctor", "explain", "calibrate", "bench"):
        assert call(command, "--help") == 0
        out = capsys.readouterr().out
        assert "Examples" in out
        assert f"pisa {command}" in out


def test_says_how_to_install_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call("doctor") == 2
    assert "pip install 'pisa-compile[cli]'" in capsys.readouterr().err


def test_explain(capsys) -> None:
    options = ("-o", "min_tokens=0", "-o", "sparsity=0.5")
    assert call("explain", "mymodel:build", "--inputs", "mymodel:example", *options) == 0
    out = capsys.readouterr().out
    assert "blocks.*.attn" in out
    assert "2 of 2 attention sites replaced" in " ".join(out.split())
    target = ("explain", "mymodel.py:built", "-i", "mymodel.py:example_dict")
    assert call(*target, *options, "--json") == 0
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert (site["module"], site["query_shape"]) == ("blocks.0.attn", [1, 2, 300, 16])
    assert call(*target, "--every-site", "--strict") == 1
    assert "too short to gain" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mymodel", "-i", "mymodel:example"], "must be module:name"),
        (["nomodule:build", "-i", "mymodel:example"], "there is no module 'nomodule'"),
        (["no.py:build", "-i", "mymodel:example"], "there is no file 'no.py'"),
        (["mymodel:bild", "-i", "mymodel:example"], "mymodel has no 'bild'"),
        (["mymodel:example", "-i", "mymodel:example"], "object of type Tensor, not a torch.nn"),
        (["mymodel:build", "-i", "mymodel:nothing"], "gives None, not a tensor"),
    ],
)
def test_explain_names_mistakes(arguments, words, capsys) -> None:
    assert call("explain", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_bench_times_and_draws(capsys, tmp_path: Path) -> None:
    shapes = ("-s", "1x4/2x200x16", "-s", "1x2x100x8")
    settings = ("--device", "cpu", "--sparsity", "0.5", "--sparsity", "0.8", "--rounds", "2")
    plot = tmp_path / "times.png"
    assert call("bench", *shapes, *settings, "--json", "--plot", str(plot)) == 0
    record = json.loads(capsys.readouterr().out)
    found = [(row["shape"], row["sparsity"]) for row in record["timings"]]
    assert found == [(s, x) for s in ("1x4/2x200x16", "1x2x100x8") for x in (None, 0.5, 0.8)]
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in record["timings"])
    assert record["about"]["dtype"] == "float32"
    assert record["about"]["versions"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert call("bench", *shapes, *settings, "--key-block-size", "32") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "sparsity 0.8" in words
    assert "block size 64 (keys 32)" in words


def test_bench_refuses_to_time_wrong_results(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "attention", lambda query, key, value, **settings: query + 1)
    assert call("bench", "-s", "1x2x100x8", "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "results are wrong" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-s", "2x100x8"], "takes BxHxTxD"),
        (["-s", "1x4/3x100x8"], "not a multiple of 3 key heads"),
        (["-s", "1x4x100x8", "--dtype", "int8"], "--dtype must be one of"),
        (["-s", "1x4x100x8", "--device", "gpu"], "'gpu' cannot be used"),
        (["-s", "1x4x100x8", "--sparsity", "1.5"], "must be in [0, 1), got 1.5"),
        (["-s", "1x4x100x8", "--block-size", "48"], "block_size must be one of"),
    ],
)
def test_bench_names_mistakes(arguments, words, capsys) -> None:
    assert call("bench", *arguments) == 2
    assert words in capsys.readouterr().err


def test_doctor_finds_this_environment_fine(capsys) -> None:
    assert call("doctor", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"]
    found = {finding["name"]: finding for finding in record["findings"]}
    for name in ("versions", "backend", "CPU results", "C++ compiler", "torch.compile"):
        assert found[name]["status"] == "ok", found[name]
    assert all(finding["advice"] or finding["status"] == "ok" for finding in record["findings"])


def test_doctor_fails_with_advice(monkeypatch, capsys) -> None:
    def broken_check() -> Iterator[doctor.Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    monkeypatch.setattr(doctor, "CHECKS", (doctor._packages, broken_check))
    assert call("doctor") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "failure backend: torch lists inductor" in out
    assert "-> install the package with pip" in out
    assert "failure broken check: OSError: no such thing" in out


def test_doctor_lists_compiled_kernels(monkeypatch, capsys) -> None:
    check = pytest.importorskip("pisa_compile.kernels.triton.tools.compile_check")
    rows = [
        check.Row("forward", "sm_90", 64, "bfloat16", "", True, "wgmma", 200, spills, 1024, 2048)
        for spills in (0, 8)
    ]
    monkeypatch.setattr(check, "rows", lambda names, widths: iter(rows))
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert call("doctor", "--kernels", "--architecture", "sm_90", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert [row["problem"] for row in record["kernels"]] == ["", "spills 8 of its registers"]
    assert call("doctor", "--kernels", "--architecture", "sm_1") == 2
    assert "--architecture must be one of sm_80" in capsys.readouterr().err
