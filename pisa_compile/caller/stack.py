"""The calls of modules that are under way, innermost first."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from ..ops.token_order import NO_CALLER, CallerTokens
from .arguments import tokens_of_call

_CALLS = (nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__)


def tokens_of_caller() -> CallerTokens:
    """What the call of the innermost model that we can read says. Costs microseconds."""
    for module, args, kwargs in _module_calls():
        names = _parameters(type(module).forward)
        found = tokens_of_call(module, {**dict(zip(names, args, strict=False)), **kwargs})
        if found.grids:
            return found
    return NO_CALLER


def _module_calls() -> Iterator[tuple[nn.Module, Sequence[Any], Mapping[str, Any]]]:
    frame = sys._getframe(1)
    last: nn.Module | None = None
    while frame is not None:
        # By identity: code that Dynamo made may have constants that cannot be hashed.
        if any(frame.f_code is code for code in _CALLS):
            given = frame.f_locals
            module = given["self"]
            if module is not last and not isinstance(module, OptimizedModule):
                yield module, given["args"], given["kwargs"]
            last = module
        frame = frame.f_back  # type: ignore[assignment]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
