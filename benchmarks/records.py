"""Records: JSON files that say what was measured, where and when, all written the same way.

Lists of numbers and of strings stand on one line, so that a record of thousands of numbers can be
read and compared.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(command: str, *packages: str, **more: Any) -> dict[str, Any]:
    """What a reader must know of a measurement besides its numbers.

    Args:
        command: that makes the record.
        packages: whose versions matter, besides torch and Triton.
        more: what else there is to say.
    """
    versions = {name: _version(name) for name in packages}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "-uno")),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **({"versions": versions} if versions else {}),
        "load_before": list(os.getloadavg()),
        **more,
    }


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(record) + "\n")


def text(value: Any, indent: str = "") -> str:
    """JSON, indented by one, with lists that hold neither lists nor objects on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = (f"{inner}{json.dumps(key)}: {text(x, inner)}" for key, x in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(x, (dict, list, tuple)) for x in value):
        return "[\n" + ",\n".join(f"{inner}{text(x, inner)}" for x in value) + f"\n{indent}]"
    return json.dumps(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    first = info.read_text().split("\n\n", 1)[0]
    lines = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"
