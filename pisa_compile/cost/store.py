"""Measured profiles, kept in the user's cache directory.

`PISA_CACHE_DIR` names another directory. `PISA_COST_MODEL=0` switches measuring off: decisions then
rest on fixed lengths and are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..kernels.params import Settings
from ..ops import dispatch
from .measure import measure
from .model import DENSE_TERMS, SPARSE_TERMS, Profile

_SCHEMA = 1
log = logging.getLogger("pisa_compile")


def profile_of(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int
) -> Profile | None:
    """The device's profile: from this process, the cache directory, or measured now.

    None where nothing can be measured: switched off, a device that is not there (as for fake
    tensors of another machine), or one that only the specification runs on. None, too, on one of
    several ranks: each would measure a little different, decide otherwise at some length, and wait
    for ever in the others' collectives. Fixed lengths are the same everywhere, and need no word
    between ranks that may not all compile.
    """
    if os.environ.get("PISA_COST_MODEL") == "0" or _has_company():
        return None
    return _profile(device.type, device.index or 0, dtype, head_dim, value_dim)


@cache
def _profile(
    device_type: str, index: int, dtype: torch.dtype, head_dim: int, value_dim: int
) -> Profile | None:
    if not _present(device_type):
        return None
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, index)
    implementation = dispatch.preferred(device)
    if dispatch.refusal(implementation, device, dtype, head_dim, value_dim, Settings()) is not None:
        return None
    key = {
        "schema": _SCHEMA,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device_type == "cpu" else None,
        "implementation": implementation,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "value_dim": value_dim,
    }
    path = cache_directory() / f"cost-{_digest(key)}.json"
    found = _read(path, key)
    if found is not None:
        return found
    log.info("timing attention on %s once, for a few seconds; kept in %s", key["device"], path)
    try:
        measured = measure(device, dtype, head_dim, value_dim)
    except (RuntimeError, ValueError) as error:
        log.warning("attention could not be timed, fixed lengths decide: %s", error)
        return None
    _write(path, key, measured)
    return measured


def cache_directory() -> Path:
    """`PISA_CACHE_DIR`, or `pisa_compile` in the user's cache directory."""
    given = os.environ.get("PISA_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pisa_compile"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _has_company() -> bool:
    """Whether this process is one of several ranks."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1


def _present(device_type: str) -> bool:
    if device_type == "cpu":
        return True
    return device_type == "cuda" and torch.cuda.is_available()


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> Profile | None:
    try:
        content = json.loads(path.read_text())
        if content["key"] != key:
            return None
        found = Profile(tuple(map(float, content["dense"])), tuple(map(float, content["sparse"])))
        if (len(found.dense), len(found.sparse)) != (DENSE_TERMS, SPARSE_TERMS):
            raise ValueError("it has another number of rates")
        if not all(math.isfinite(rate) and rate >= 0 for rate in (*found.dense, *found.sparse)):
            raise ValueError("its rates are not finite numbers from 0 on")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not a cost profile (%s); attention is timed again", path, error)
        return None


def _write(path: Path, key: dict[str, Any], profile: Profile) -> None:
    content = {"key": key, "dense": profile.dense, "sparse": profile.sparse}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may write at once; a rename is never seen half done.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(content, indent=1) + "\n")
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        log.warning("the cost profile could not be kept in %s: %s", path, error)
