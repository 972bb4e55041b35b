"""The import arrow of DESIGN.md, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pisa_compile as pisa

PACKAGE = Path(pisa.__file__).parent
# Each layer may import from itself and from those after it.
LAYERS = {
    "backend": {
        "passes",
        "recording",
        "options",
        "policy",
        "presets",
        "frame",
        "grids",
        "stepwise",
    },
    "stepwise": {"passes", "recording", "schedule", "steps"},
    "passes": {
        "policy",
        "presets",
        "schedule",
        "annotation",
        "ops",
        "cost",
        "kernels",
        "token_order",
    },
    "presets": {"policy", "schedule"},
    "steps": {"schedule", "validation"},
    "schedule": {"validation"},
    "cost": {"kernels"},
    "ops": {"kernels", "observation", "validation"},
    "observation": {"kernels"},
    "grids": {"token_order"},
    "token_order": {"kernels"},
    "kernels": set(),
}


def imported(path: Path) -> set[str]:
    """Names directly under `pisa_compile` that a file imports, at any depth of indentation."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pisa_compile"):
            raise AssertionError(f"{path}: use relative imports inside the package")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    root = PACKAGE / layer
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    assert files
    for file in files:
        others = imported(file) - {layer}
        assert others <= LAYERS[layer], f"{file} imports {others - LAYERS[layer]}"


def test_package_runs_where_triton_and_the_extras_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'diffusers', 'rich', 'matplotlib', 'safetensors', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "import torch, pisa_compile, pisa_compile.backend\n"
        "q = torch.randn(1, 1, 200, 16)\n"
        "print(bool(pisa_compile.attention(q, q, q, sparsity=0.5).isfinite().all()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_nothing_imports_the_command_line_or_an_integration() -> None:
    outside = {PACKAGE / "cli", PACKAGE / "integrations"}
    for file in PACKAGE.rglob("*.py"):
        if file.name != "__main__.py" and not outside & set(file.parents):
            assert not imported(file) & {"cli", "integrations"}, file


def test_public_surface() -> None:
    names = {name for name in vars(pisa) if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.iterdir()}  # whatever another test imported
    assert names - modules == {
        "Attachment", "Calibration", "Comparison", "DENSE", "Policy", "Report", "Schedule",
        "UnsupportedError", "attach", "attention", "calibrate", "delivered", "denoising",
        "explain", "load_policy", "rewrite", "save_policy", "set_policy", "set_step",
    }  # fmt: skip
    assert callable(pisa.policy)
    assert callable(pisa.compare)
