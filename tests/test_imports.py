"""The rooms of DESIGN.md: arrows between them, their size, and what importing the package costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pisa_compile as pisa

PACKAGE = Path(pisa.__file__).parent
ROOT = PACKAGE.parent
MOST_FILES, MOST_LINES = 12, 350

# From the ground up: a room imports from itself and from the rooms that it lists, all above it
# here. "" are the files of the package itself.
ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "kernels.cpu": {"kernels"},
    "kernels.triton": {"kernels"},
    "kernels.triton.tools": {"kernels", "kernels.triton"},
    "ops": {"kernels", "kernels.cpu", "kernels.triton"},
    "policies": {"kernels", "ops"},
    "steps": {"ops", "policies"},
    "caller": {"ops"},
    "cost": {"kernels", "ops"},
    "passes.graph": set(),
    "passes.sites": {"policies", "passes.graph"},
    "passes.masks": {"passes.graph", "passes.sites"},
    "passes.tokens": {"ops", "policies", "passes.graph", "passes.sites"},
    "passes.match": {"passes.graph", "passes.sites", "passes.masks", "passes.tokens"},
    "passes.match.written": {
        "passes.graph",
        "passes.sites",
        "passes.masks",
        "passes.tokens",
        "passes.match",
    },
    "passes.judge": {
        *("kernels", "ops", "policies", "cost"),
        *("passes.graph", "passes.sites", "passes.masks", "passes.tokens"),
    },
    "passes.replace": {
        *("ops", "policies"),
        *("passes.graph", "passes.sites", "passes.masks", "passes.tokens"),
    },
    "passes": {
        *("ops", "policies", "passes.graph", "passes.sites", "passes.masks"),
        *("passes.tokens", "passes.match", "passes.match.written"),
        *("passes.judge", "passes.replace"),
    },
    "report": {"kernels", "ops", "policies", "steps", "passes"},
    "study": {"kernels", "ops", "policies", "report"},
    "study.calibration": {
        *("kernels", "ops", "policies", "steps", "cost", "report", "study"),
    },
    "": {
        *("ops", "policies", "steps", "caller", "passes", "report", "study"),
        "study.calibration",
    },
    "integrations": {"kernels", "ops", "policies", "passes.judge"},
    "cli.common": {"", "report"},
    "cli.script": {"", "policies", "steps", "report", "cli.common"},
    "cli": {
        *("", "kernels", "kernels.cpu", "kernels.triton", "kernels.triton.tools"),
        *("ops", "policies", "cost", "report", "study.calibration", "cli.common", "cli.script"),
    },
}


def sources() -> Iterator[Path]:
    """The files of the package; `passes` and `kernels` are links to the folders at the top."""
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def room_of(parts: tuple[str, ...]) -> str:
    """The innermost folder that a dotted name leads through."""
    room: list[str] = []
    for part in parts:
        if not (PACKAGE.joinpath(*room) / part).is_dir():
            break
        room.append(part)
    return ".".join(room)


def own_room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    # `python -m pisa_compile` is the door of the command line.
    return "cli" if parts == ("__main__.py",) else ".".join(parts[:-1])


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, at any depth of indentation."""
    here, found = path.relative_to(PACKAGE).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            own = (node.module or "").startswith("pisa_compile")
            assert not own, f"{path}: use relative imports inside the package"
            continue
        base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
        base = tuple(part for part in base if part)
        found |= {room_of((*base, alias.name)) for alias in node.names}
    return found


def test_every_room_is_listed_and_none_that_is_not_there() -> None:
    assert {own_room(path) for path in sources()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    for path in sources():
        if own_room(path) == room:
            others = imported_rooms(path) - {room}
            assert others <= ROOMS[room], f"{path} imports {others - ROOMS[room]}"


def test_the_arrows_make_no_circle() -> None:
    order = list(ROOMS)
    for room, others in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in others), room


def test_no_room_is_crowded_and_no_file_long() -> None:
    folders = [ROOT / name for name in ("passes", "kernels", "tests", "benchmarks", "examples")]
    for top in (PACKAGE, *folders):
        for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
            files = list(folder.glob("*.py"))
            assert len([f for f in files if f.name != "__init__.py"]) <= MOST_FILES, folder
            for path in files:
                if "kernels" not in path.relative_to(ROOT).parts:
                    assert len(path.read_text().splitlines()) <= MOST_LINES, path


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


def test_public_surface() -> None:
    assert dir(pisa) == sorted(pisa.__all__)
    assert set(dir(pisa)) == {
        "Attachment", "Calibration", "Comparison", "DENSE", "Policy", "Report", "Schedule",
        "UnsupportedError", "__version__", "attach", "attention", "calibrate", "compare",
        "delivered", "denoising", "explain", "load_policy", "policy", "rewrite", "save_policy",
        "set_policy", "set_step",
    }  # fmt: skip
    assert all(hasattr(pisa, name) for name in dir(pisa))
    assert pisa.__version__ != "0+unknown"


def test_modules_that_users_import_by_name_are_where_they_were() -> None:
    import pisa_compile.distributed
    import pisa_compile.ops

    assert callable(pisa_compile.distributed.merge_attention)
    assert pisa_compile.ops.__name__ == "pisa_compile.ops"
