"""Graph to graph: find attention, decide by policy, substitute the op. No numerics here."""

from .judge.strict import refuse_dense as refuse_dense
from .match.external import attention_kernel as attention_kernel
from .pipeline import Context as Context
from .pipeline import PassError as PassError
from .pipeline import Rewritten as Rewritten
from .pipeline import rewrite_attention as rewrite_attention
from .pipeline import rewritten as rewritten
from .pipeline import untouched as untouched
from .replace.density_input import DensityInput as DensityInput
from .sites.decision import Decision as Decision
from .tokens.plan import reads_caller as reads_caller
