"""What calibration found, as policies and in numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...policies.attach import set_policy
from ...policies.file import save_policy
from ...policies.policy import Policy
from ...report.tables import TOP_LEVEL, table_text


@dataclass(frozen=True)
class Calibration:
    """Policies for the sites of one model, with what was predicted and what was delivered.

    Attributes:
        policies: by module name, for `pisa.set_policy` or `options={"policy": ...}`.
        mean_density: exact fraction of the key blocks, mean over sites, steps and heads.
        predicted_error, delivered_error: relative L2 distance of the result to the dense one; the
            latter on held-out inputs. None where sensitivity was not measured, or nothing held out.
        uniform_error: the same on the held-out inputs for one sparsity everywhere, at equal cost.
        uniform_sparsity: that sparsity.
        predicted_seconds, dense_seconds: attention of one generation by the cost model.
        densities: mean density per site and step.
    """

    policies: dict[str, Policy]
    mean_density: float
    predicted_error: float | None
    delivered_error: float | None
    uniform_error: float | None
    uniform_sparsity: float
    predicted_seconds: float
    dense_seconds: float
    densities: dict[str, list[float]] = field(default_factory=dict)

    @property
    def predicted_speedup(self) -> float:
        """Of the attention alone."""
        return self.dense_seconds / self.predicted_seconds if self.predicted_seconds else 1.0

    def apply(self, model: nn.Module) -> None:
        """Attach the policies to the modules of a model, compiled already or not."""
        set_policy(model, self.policies)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a policy file for `pisa.load_policy` and `options={"policy": path}`."""
        save_policy(path, self.policies, self.about())

    def about(self) -> dict[str, Any]:
        """The numbers, as they stand in the file."""
        return {
            "mean_density": round(self.mean_density, 4),
            "predicted_relative_l2": self.predicted_error,
            "delivered_relative_l2": self.delivered_error,
            "uniform_relative_l2": self.uniform_error,
            "uniform_sparsity": round(self.uniform_sparsity, 4),
            "predicted_attention_speedup": round(self.predicted_speedup, 3),
        }

    def __str__(self) -> str:
        rows = []
        for site, densities in self.densities.items():
            shown = densities[:: max(1, len(densities) // 10)][:10]
            rows.append((site or TOP_LEVEL, " ".join(f"{density:.2f}" for density in shown)))
        lines = [table_text(("module", "density by step"), rows)]
        lines.append(
            f"mean density {self.mean_density:.3f}; predicted: attention "
            f"{self.predicted_speedup:.2f}x faster"
            + ("" if self.predicted_error is None else f", error {self.predicted_error:.4f}")
        )
        if self.delivered_error is not None and self.uniform_error is not None:
            lines.append(
                f"held-out inputs: error {self.delivered_error:.4f}; sparsity "
                f"{self.uniform_sparsity:.3f} everywhere, at equal cost: {self.uniform_error:.4f}"
            )
        return "\n".join(lines)
