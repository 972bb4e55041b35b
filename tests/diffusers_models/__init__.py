"""Tiny, fully random configurations of diffusion transformers, to trace and to compare.

Everything from a model library is imported when a case is built, never here.
"""

from . import classic as classic  # each module registers its cases
from .case import CASES as CASES
from .case import Case as Case
from .case import outputs as outputs
