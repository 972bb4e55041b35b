"""Time dense and sparse attention on a device for a few seconds and fit a `Profile` to that."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.params import Settings
from ..ops import dispatch
from .model import Profile, Workload, dense_terms, fit, sparse_terms

# (tokens, heads, density) on a CPU. Lengths vary most, as the terms differ in their power of them.
_SHAPES = (
    (256, 8, 0.25),
    (512, 8, 0.5),
    (1024, 2, 0.125),
    (1024, 8, 0.25),
    (2048, 2, 0.5),
    (2048, 4, 0.15),
    (4096, 2, 0.0625),
    (4096, 2, 0.25),
)
_GPU_SCALE = 4  # a GPU is not filled by the lengths above
_ROUNDS = 5
_SECONDS = 0.02  # a round of a short call repeats it for about this long


def measure(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> Profile:
    """Times of the implementation that `ops.dispatch` prefers on `device`, fitted.

    May be called while a graph is traced or compiled: it runs in a thread of its own, which has
    none of the caller's modes.
    """
    result: list[Profile] = []

    def run() -> None:
        with torch.inference_mode():
            result.append(_measure(device, dtype, head_dim, value_dim))

    thread = threading.Thread(target=run, name="pisa cost model")
    thread.start()
    thread.join()
    if not result:
        raise RuntimeError(f"attention could not be timed on {device}")
    return result[0]


def _measure(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> Profile:
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, tokens: int, width: int) -> Tensor:
        x = torch.randn(1, tokens, heads, width, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    works, dense, sparse = [], [], []
    for tokens, heads, density in _SHAPES:
        if device.type != "cpu":
            tokens *= _GPU_SCALE
        settings = Settings(sparsity=1 - density)
        works.append(Workload(1, heads, heads, tokens, head_dim, value_dim, settings))
        inputs = (
            tensor(heads, tokens, head_dim),
            tensor(heads, tokens, head_dim),
            tensor(heads, tokens, value_dim),
        )
        runs: list[Callable[[], object]] = [
            partial(scaled_dot_product_attention, *inputs),
            partial(dispatch.attention, *inputs, None, settings.scaled(head_dim**-0.5)),
        ]
        times = interleaved(runs, device)
        dense.append(times[0])
        sparse.append(times[1])
    return Profile(
        dense=fit([dense_terms(work) for work in works], dense),
        sparse=fit([sparse_terms(work) for work in works], sparse),
    )


def interleaved(
    runs: Sequence[Callable[[], object]], device: torch.device, rounds: int = _ROUNDS
) -> list[float]:
    """Median seconds per call of each candidate, all of them once in every round."""
    repeats = []
    for run in runs:  # also compiles and warms up
        _seconds(run, 1, device)
        repeats.append(max(1, int(_SECONDS / max(_seconds(run, 1, device), 1e-7))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, seconds in zip(runs, repeats, times, strict=True):
            seconds.append(_seconds(run, count, device))
    return [statistics.median(seconds) for seconds in times]


def _seconds(run: Callable[[], object], count: int, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _synchronise(device)
    return (time.perf_counter() - start) / count


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
