"""Triton decides when it defines a kernel whether to interpret it, so both kinds need a process.

A normal run collects the tests of this folder; one of them runs `interpreted/` in a child process
with TRITON_INTERPRET=1. With that variable set, `pytest tests/kernels/triton` runs the interpreted
tests directly.
"""

import os

collect_ignore_glob = (
    ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
)
