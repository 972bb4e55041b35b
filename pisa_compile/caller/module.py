"""The module whose forward Dynamo is tracing, which the traced graph does not name."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def traced_module() -> nn.Module | None:
    """The module that is being compiled while a backend runs, if it is one.

    Dynamo guards on its class, so the class may decide what is compiled; other instances share the
    code. Dynamo has no public interface for this: where the private one is gone, nobody knows.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        module: Any = InstructionTranslator.current_tx().output.local_scope.get("self")
    except (ImportError, AttributeError):
        module = _compiled_ahead()
    return module if isinstance(module, nn.Module) else None


def _compiled_ahead() -> Any:
    """What `aot_compile` was called for: it calls the backend when tracing is over."""
    try:
        from torch._dynamo.aot_compile import aot_compile_fullgraph
    except ImportError:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is aot_compile_fullgraph.__code__:
            model = frame.f_locals.get("model")
            return getattr(model, "__self__", model)
        frame = frame.f_back  # type: ignore[assignment]
    return None
