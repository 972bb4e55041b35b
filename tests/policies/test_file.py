"""Files of policies: what is none is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

import pisa_compile as pisa


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    policies = {
        "blocks.*": pisa.Policy(sparsity=0.9, exact=(3, 0)),
        "blocks.0": pisa.DENSE,
        "last": pisa.Policy(schedule=pisa.Schedule(dense_first=0.2)),
    }
    pisa.save_policy(tmp_path / "policy.json", policies)
    assert pisa.load_policy(tmp_path / "policy.json") == policies


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("{", "not JSON"),
        ("[]", "schema"),
        (None, "it is a folder"),
    ],
)
def test_what_is_no_policy_file_is_a_value_error(
    content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=words):
        pisa.load_policy(path)
