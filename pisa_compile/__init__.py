"""Piecewise sparse attention for diffusion transformers, as a torch.compile backend."""

from importlib import metadata as _metadata

from .export import rewrite
from .ops.dispatch import UnsupportedError
from .ops.functional import attention
from .policies.attach import policy, set_policy
from .policies.file import load_policy, save_policy
from .policies.policy import DENSE, Policy
from .policies.schedule import Schedule
from .report.explain import Report, explain
from .steps.clock import denoising, set_step
from .steps.scheduler import Attachment, attach
from .study.calibration import Calibration, calibrate
from .study.compare import Comparison, compare
from .study.delivery import delivered

__all__ = [
    "DENSE",
    "Attachment",
    "Calibration",
    "Comparison",
    "Policy",
    "Report",
    "Schedule",
    "UnsupportedError",
    "__version__",
    "attach",
    "attention",
    "calibrate",
    "compare",
    "delivered",
    "denoising",
    "explain",
    "load_policy",
    "policy",
    "rewrite",
    "save_policy",
    "set_policy",
    "set_step",
]

try:
    __version__ = _metadata.version("pisa-compile")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """The public names alone: rooms of the package are no part of the interface."""
    return sorted(__all__)
