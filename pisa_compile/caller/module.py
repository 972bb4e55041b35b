"""The module whose forward Dynamo is tracing, which the traced graph does not name."""

from __future__ import annotations

from torch import nn


def traced_module() -> nn.Module | None:
    """The module that is being compiled while a backend runs, if it is one.

    Dynamo guards on its class, so the class may decide what is compiled; other instances share the
    code. Dynamo has no public interface for this: where the private one is gone, nobody knows.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        module = InstructionTranslator.current_tx().output.local_scope.get("self")
    except (ImportError, AttributeError):
        return None
    return module if isinstance(module, nn.Module) else None
