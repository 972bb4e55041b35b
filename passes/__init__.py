"""Graph to graph: find attention, decide by policy, substitute the op. No numerics here."""

from .copies import copied as copied
from .density_input import Scheduled as Scheduled
from .density_input import add_density_input as add_density_input
from .external import attention_kernel as attention_kernel
from .grid import reads_caller as reads_caller
from .pipeline import has_schedules as has_schedules
from .pipeline import rewrite_attention as rewrite_attention
from .site import Decision as Decision
from .strict import refuse_dense as refuse_dense
