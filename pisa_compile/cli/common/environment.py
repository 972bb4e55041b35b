"""What this machine and its installation are, in words."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "pisa-compile")


def versions() -> dict[str, str]:
    """Versions of what is installed; what is not is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the local part that says which build it is
    return found
