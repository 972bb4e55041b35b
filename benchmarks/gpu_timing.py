"""Timing and the rivals of `gpu.py`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Run = Callable[[], Any]


class Timer:
    """Medians over interleaved rounds; every candidate starts with a cold cache."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.gpu, self.rounds = device.type == "cuda", rounds
        self.flush = torch.empty((256 << 20) if self.gpu else 1, dtype=torch.int8, device=device)

    def __call__(self, candidates: dict[str, Run]) -> dict[str, dict[str, Any]]:
        ready, found = {}, {}
        for name, function in candidates.items():
            try:
                ready[name], kind = self.prepare(function)
                found[name] = {"launch": kind}
            except Exception as error:  # a rival that cannot run is a result, not a crash
                found[name] = {"unavailable": f"{type(error).__name__}: {error}"[:300]}
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(self.rounds):
            for name, function in ready.items():
                times[name].append(self.once(function))
        for name, values in times.items():
            ordered = sorted(values)
            found[name] |= {
                "median_ms": statistics.median(ordered),
                "p20_ms": ordered[int(0.2 * (len(ordered) - 1))],
                "p80_ms": ordered[round(0.8 * (len(ordered) - 1))],
            }
        return found

    def prepare(self, function: Run) -> tuple[Run, str]:
        """Warm up and capture in a graph, so that the host's launch time does not count."""
        function()
        if not self.gpu:
            return function, "eager"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            return function, "eager"
        return graph.replay, "graph"

    def once(self, function: Run) -> float:
        if not self.gpu:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start_event.record()
        function()
        end.record()
        end.synchronize()
        return start_event.elapsed_time(end)


def dense(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend) if q.is_cuda else SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Run:
    """FlexAttention over the same exact blocks: the keep-or-drop part of the work."""
    counts = selected.sum(-1, dtype=torch.int32)
    order = torch.argsort((~selected).to(torch.int8), dim=-1, stable=True).to(torch.int32)
    lengths = (q.shape[2], k.shape[2])
    compiled = torch.compile(flex_attention, dynamic=False)
    made: list[Any] = []

    def run() -> Any:
        if not made:
            # Whole blocks go to the "full" list, so no mask function is evaluated inside them.
            none = torch.zeros_like(counts)
            made.append(BlockMask.from_kv_blocks(
                none, order, counts, order, BLOCK_SIZE=64, seq_lengths=lengths
            ))  # fmt: skip
        return compiled(q, k, v, block_mask=made[0])

    return run


def public(q: Tensor, k: Tensor, v: Tensor, density: float, path: Path | None) -> Run:
    if path is None:
        return missing("no --reference-path")
    sys.path.insert(0, str(path.expanduser()))
    q, k, v = (t.contiguous() for t in (q, k, v))  # it reads no other layout

    def run() -> Tensor:
        from piecewise_attn import piecewise_sparse_attention

        return piecewise_sparse_attention(q, k, v, density=density)

    return run


def missing(reason: str) -> Run:
    def run() -> None:
        raise RuntimeError(reason)

    return run
