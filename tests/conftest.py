from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# What is replaced must not depend on how fast this machine is just now, in subprocesses neither.
os.environ["PISA_COST_MODEL"] = "0"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees code that another one compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
