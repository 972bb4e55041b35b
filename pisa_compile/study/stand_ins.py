"""Running a model on inputs: as it is, or in compiled stand-ins that leave it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Generate = Callable[[nn.Module, Any], Any]
StandInsT = TypeVar("StandInsT", bound="StandIns")

_LIMIT = 1000
_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # torch >= 2.13


class StandIns:
    """Compiled stand-ins for a model, one for each set of options, while a `with` lasts.

    Past a number of compilations of the same code, Dynamo silently runs it as it is. Those of the
    stand-ins must not use up the number for the model that is compiled afterwards, nor be limited
    by it. Torch without isolated compilations forgets all that it compiled when the `with` ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._made: list[tuple[Mapping[str, Any], Any]] = []
        self._until = ExitStack()

    def __enter__(self: StandInsT) -> StandInsT:
        patched = torch._dynamo.config.patch(
            recompile_limit=_LIMIT, accumulated_recompile_limit=_LIMIT
        )
        self._until.enter_context(patched)
        if not _ISOLATES:
            self._until.callback(torch._dynamo.reset)
        return self

    def __exit__(self, *exception: object) -> None:
        self._made.clear()
        self._until.close()

    def of(self, options: Mapping[str, Any]) -> Any:
        """The model under `torch.compile(backend="pisa", options=options)`, Inductor left out."""
        for known, made in self._made:
            if known == options:
                return made
        isolated: dict[str, Any] = {"isolate_recompiles": True} if _ISOLATES else {}
        made = torch.compile(
            self.model, backend="pisa", options={"inner": "eager", **options}, **isolated
        )
        self._made.append((options, made))
        return made


def call_model(model: nn.Module, input_: Any) -> Any:
    """One call with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(input_, Mapping):
        return model(**input_)
    return model(*input_) if isinstance(input_, (tuple, list)) else model(input_)


def flat(result: Any) -> Tensor:
    """All floating-point tensors of a result as one float32 vector on the host.

    The others, if it has no floating-point ones.

    Raises:
        TypeError: there is no tensor in it.
    """
    tensors = [x.detach() for x in tree_leaves(result) if isinstance(x, Tensor)]
    if not tensors:
        raise TypeError(f"expected a result with tensors, got {type(result).__name__}")
    tensors = [x for x in tensors if x.is_floating_point()] or tensors
    return torch.cat([x.to("cpu", torch.float32).flatten() for x in tensors])
