"""Every Python block of the README runs, in order, against a small model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cpu import markdown
from pisa_compile.kernels.testing import random_inputs

from ..models import TinyTransformer, tiny, tokens

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Repeating(TinyTransformer):
    def compile_repeated_blocks(self, **settings: Any) -> None:
        """As in diffusers' models."""
        for block in self.blocks:
            block.compile(**settings)


class Scheduler:
    """As far as `pisa.attach` looks at one."""

    def set_timesteps(self, count: int) -> None:
        self.timesteps = list(range(count))

    def step(self) -> None: ...


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 4
    inputs = random_inputs(query_len=200, head_dim=16)
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "model": tiny(),
        "transformer": tiny(),
        "x": tokens(100),
        "pipe": SimpleNamespace(transformer=Repeating().eval(), scheduler=Scheduler()),
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
    }
    with torch.no_grad():
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
        names["pipe"].transformer(tokens(100))
    assert names["out"].isfinite().all()
    assert names["VideoSelfAttention"].__mro__[1] is nn.Module


def test_speed_table_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert f"cpu.json -->\n{markdown(record)}\n<!-- end -->" in README


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
