"""Piecewise sparse attention for diffusion transformers, as a torch.compile backend."""

from .export import rewrite as rewrite
from .functional import attention as attention
from .kernels.dispatch import UnsupportedError as UnsupportedError
from .policy import DENSE as DENSE
from .policy import Policy as Policy
from .policy import policy as policy
from .policy import set_policy as set_policy
from .report import Report as Report
from .report import explain as explain
