"""Running a model on an input: densely, or as options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..policy import Policy

_SETTINGS = 1000
Generate = Callable[[nn.Module, Any], Any]


class Runner:
    """Runs inputs through compiled copies of the code of a model."""

    def __init__(self, model: nn.Module, generate: Generate | None, base: Policy) -> None:
        self.model = model
        self.generate = generate or _call
        self.base = base

    def __call__(self, input_: Any, options: Mapping[str, Any] | None = None) -> Tensor:
        """The result as one flat tensor: dense, or as the options say."""
        fields = {name: value for name, value in self.base._given().items() if name != "sparsity"}
        settings = {"preset": None, "inner": "eager", "sparsity": 0.0, **fields, **(options or {})}
        settings.setdefault("min_tokens", 1)
        compiled = torch.compile(self.model, backend="pisa", options=settings)
        # Every setting is another entry in Dynamo's cache of the model's code, and past its limit
        # the model would silently run as it is.
        with torch._dynamo.config.patch(recompile_limit=_SETTINGS):
            result = self.generate(compiled, input_)  # type: ignore[arg-type]
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        tensors = [x.detach().to("cpu", torch.float32).flatten() for x in tensors]
        if not tensors:
            raise TypeError(f"generate must return tensors, got {type(result).__name__}")
        return torch.cat(tensors)


def _call(model: nn.Module, input_: Any) -> Any:
    if isinstance(input_, Mapping):
        return model(**input_)
    return model(*input_) if isinstance(input_, (tuple, list)) else model(input_)
