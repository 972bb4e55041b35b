"""What the values of a permutation must be, checked where they can be read without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def check_values(permutation: Tensor) -> None:
    """Raise ValueError unless a CPU tensor [T] lists every number from 0 to T - 1 once.

    Tensors on other devices are not read: that would wait for the device.
    """
    tokens = permutation.shape[0]
    if permutation.device.type != "cpu" or tokens == 0:
        return
    expected = f"permutation must list every token from 0 to {tokens - 1} once"
    low, high = (int(x) for x in permutation.aminmax())
    if low < 0 or high >= tokens:
        raise ValueError(f"{expected}, got values from {low} to {high}")
    seen = torch.zeros(tokens, dtype=torch.bool)
    seen[permutation] = True
    if missing := tokens - int(seen.sum()):
        raise ValueError(f"{expected}, got {missing} of them not at all and others repeatedly")
