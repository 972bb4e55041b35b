from __future__ import annotations

import pytest
import torch
from torch import Tensor

TOKENS = 1024


@pytest.fixture(scope="module")
def head() -> tuple[Tensor, Tensor, Tensor]:
    """[1, 1024, 32] each, in double precision, with keys that are alike within a block."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(1, count, 32, generator=generator, dtype=torch.float64)

    means = normal(TOKENS // 64).repeat_interleave(64, 1)
    return 2 * normal(TOKENS), means + 0.5 * normal(TOKENS), normal(TOKENS)
