"""Graph to graph: find attention, decide by policy, substitute the op. No numerics here."""

from .pipeline import rewrite_attention as rewrite_attention
from .site import Decision as Decision
