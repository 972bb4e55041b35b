"""Running a model on an input: densely, or as options say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...policies.policy import Policy
from ..stand_ins import Generate, StandIns, call_model, flat


class Runner(StandIns):
    """Runs inputs through stand-ins for a model."""

    def __init__(self, model: nn.Module, generate: Generate | None, base: Policy) -> None:
        super().__init__(model)
        self.generate = generate or call_model
        self.base = base

    def __call__(self, input_: Any, options: Mapping[str, Any] | None = None) -> Tensor:
        """The result as one flat tensor: dense, or as the options say."""
        fields = {name: value for name, value in self.base.given().items() if name != "sparsity"}
        settings = {"preset": None, "min_tokens": 1, "sparsity": 0.0, **fields, **(options or {})}
        return flat(self.generate(self.of(settings), input_))
