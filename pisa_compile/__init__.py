"""Piecewise sparse attention for diffusion transformers, as a torch.compile backend."""

from .attachment import Attachment as Attachment
from .attachment import attach as attach
from .calibration import Calibration as Calibration
from .calibration import calibrate as calibrate
from .compare import Comparison as Comparison
from .compare import compare as compare
from .delivery import delivered as delivered
from .export import rewrite as rewrite
from .functional import attention as attention
from .kernels.dispatch import UnsupportedError as UnsupportedError
from .policy import DENSE as DENSE
from .policy import Policy as Policy
from .policy import policy as policy
from .policy import set_policy as set_policy
from .policy_file import load_policy as load_policy
from .policy_file import save_policy as save_policy
from .report import Report as Report
from .report import explain as explain
from .schedule import Schedule as Schedule
from .steps import denoising as denoising
from .steps import set_step as set_step
