"""Calibration: the density of every site, denoising step and head, from a model's own attention.

`errors` measures what each density costs in accuracy, `sensitivity` how much that matters to the
result, `allocation` finds the best densities for a budget.
"""

from .calibrate import calibrate as calibrate
from .result import Calibration as Calibration
