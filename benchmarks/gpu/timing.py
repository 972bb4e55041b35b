"""What `gpu.py` measures with: timer, rivals, memory and the description of the machine."""

from __future__ import annotations

import statistics
import subprocess
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

from benchmarks import records

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


def captured(function: Run, device: torch.device) -> Run:
    """A function that repeats what `function` did, from a captured graph where there are graphs."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


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


def extra_memory(function: Run, gpu: bool) -> float:
    """Peak bytes beyond what was allocated before and the tensors that `function` returns."""
    if not gpu:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = sum(t.numel() * t.element_size() for t in function())
    return float(torch.cuda.max_memory_allocated() - before - results)


def host_time(function: Run, gpu: bool) -> float:
    """Time until an eager call returns; any synchronisation inside is an error."""
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    start = time.perf_counter()
    function()
    elapsed = (time.perf_counter() - start) * 1e3
    if gpu:
        torch.cuda.set_sync_debug_mode("default")
    return elapsed


def matmul_tflops(timer: Timer, device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if timer.gpu else (256, torch.float32)
    a = torch.randn(size, size, device=device).to(dtype)
    return 2.0 * size**3 / timer({"matmul": lambda: a @ a})["matmul"]["median_ms"] / 1e9


def environment(device: torch.device, architecture: str) -> dict[str, Any]:
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    return records.environment(
        "python -m benchmarks.gpu",
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        architecture=architecture,
        clocks=_ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv"),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
    )


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
