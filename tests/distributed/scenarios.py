"""What must hold on several ranks: the result is that of a single process.

Models and inputs are the same everywhere. Rank 0 works out what to expect, alone, while the others
wait, for all ranks share the processor.
"""

from __future__ import annotations

from . import context_parallel as context_parallel
from . import model_parallel as model_parallel
from .shared import SCENARIOS as SCENARIOS
