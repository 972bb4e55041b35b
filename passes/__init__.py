"""Graph to graph: find attention, decide by policy, substitute the op. No numerics here."""

from .graph.copies import copied as copied
from .judge.strict import refuse_dense as refuse_dense
from .match.external import attention_kernel as attention_kernel
from .pipeline import has_schedules as has_schedules
from .pipeline import rewrite_attention as rewrite_attention
from .replace.density_input import Scheduled as Scheduled
from .replace.density_input import add_density_input as add_density_input
from .sites.decision import Decision as Decision
from .tokens.plan import reads_caller as reads_caller
