"""`module:name` and `path/to/file.py:name` on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError


def load(target: str, what: str) -> Any:
    """The object that `target` names; modules are looked for in the current folder too.

    Raises:
        UserError: there is no such module, file or name.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"{what} must be module:name or file.py:name, got {target!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = _file(place, what) if place.endswith(".py") else _module(place, what)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{what}: {place} has no {name!r}")
        found = getattr(found, part)
    return found


def _module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            raise UserError(f"{what}: there is no module {error.name!r}") from error
        raise  # an import inside of it failed: that is for its traceback to tell


def _file(path: str, what: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"{what}: there is no file {path!r}")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
