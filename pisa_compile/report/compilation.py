"""Whether a model is compiled already, as a whole or in part."""

from __future__ import annotations

import torch
from torch import nn


def is_compiled(model: nn.Module) -> bool:
    return _compiled_part(model) is not None


def check_not_compiled(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model or a part of it is compiled, so no stand-in could change it.
    """
    part = _compiled_part(model)
    if part is not None:
        raise ValueError(
            f"model must not be compiled, but {part or 'it'} is; give the model as it was before "
            "torch.compile, which is done here for each setting"
        )


def _compiled_part(model: nn.Module) -> str | None:
    """The name of the first compiled module, "" for the model itself."""
    name: str
    for name, module in model.named_modules():
        compiled = isinstance(module, torch._dynamo.OptimizedModule)
        if compiled or module._compiled_call_impl is not None:
            return name
    return None
