"""Records are written one way, and nothing that is measured depends on the tests."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records

RECORDS = sorted(records.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_as_the_writer_leaves_it(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    records.write(copy, records.read(path))
    assert copy.read_text() == path.read_text()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_where_it_is_from(path: Path) -> None:
    record = records.read(path)
    if path.stem == "photo_dit":  # written by an example, which needs no benchmark
        assert {"machine", "torch", "threads"} <= record.keys()
        return
    about = record["environment"]
    parts = about.values() if all(isinstance(x, dict) for x in about.values()) else [about]
    for part in parts:
        assert "torch" in part or "torch" in part.get("versions", {})


def test_the_environment_names_command_and_machine() -> None:
    about = records.environment("python benchmarks/any.py", "diffusers", note="quiet")
    assert about["command"] == "python benchmarks/any.py"
    assert about["note"] == "quiet"
    assert about["versions"].keys() == {"diffusers"}
    assert json.loads(records.text(about)) == about


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2.5, None, "a"], '[1, 2.5, null, "a"]'),
        ({}, "{}"),
        ({"a": [{"b": [1, 2]}, {}]}, '{\n "a": [\n  {\n   "b": [1, 2]\n  },\n  {}\n ]\n}'),
        ([[1, 2], [3]], "[\n [1, 2],\n [3]\n]"),
    ],
)
def test_lists_of_plain_values_stand_on_one_line(value: Any, text: str) -> None:
    assert records.text(value) == text
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("folder", "others"), [("benchmarks", {"tests"}), ("examples", {"tests", "benchmarks"})]
)
def test_imports_make_no_circle(folder: str, others: set[str]) -> None:
    for path in (records.ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & others, path
