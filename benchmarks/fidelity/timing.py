"""CPU time of the methods that the package has CPU kernels for, and of dense attention.

CPU time of one thread, which other processes disturb least. All candidates run one after the other
in every round, so that a slow moment of the machine hits all of them alike.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pisa_compile as pisa
from examples.photo_dit.sampling import euler_step, noise
from examples.photo_dit.weights import load_model

from .data import Attention, replaced_attention
from .methods import METHODS, PAPER, Method, deliverable, order_of_tokens, sparsity
from .operator import DENSITIES

_dense = torch.nn.functional.scaled_dot_product_attention
Key = tuple[str, float]
STEP_DENSITIES = (0.05, 0.15, 0.3)


def _package(method: Method, density: float) -> Attention:
    order = order_of_tokens("hilbert").int()
    settings = method.settings or {}
    share = sparsity(deliverable(method, density), settings)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return pisa.attention(
            query,
            key,
            value,
            sparsity=share,
            permutation=order,
            **settings,
        )

    return attention


def _candidates(densities: tuple[float, ...]) -> dict[Key, Attention]:
    return {("dense", 1.0): _dense} | {
        (method.name, density): _package(method, density)
        for density in densities
        for method in METHODS
        if method.settings is not None
    }


def _rounds(runs: dict[Key, Callable[[], Any]], count: int) -> list[dict[str, Any]]:
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(count + 1):
        for key, run in runs.items():
            begin = time.process_time()
            run()
            seconds[key].append(time.process_time() - begin)
    rows = []
    for (name, density), all_rounds in seconds.items():
        p20, median, p80 = (
            torch.tensor(all_rounds[1:]).quantile(torch.tensor((0.2, 0.5, 0.8))).tolist()
        )
        row = {"method": name, "density": density, "median": median, "p20": p20, "p80": p80}
        paper = seconds.get((PAPER, density))
        if paper is not None:  # round by round: the machine's speed drifts more than this differs
            ratios = [a / b for a, b in zip(all_rounds[1:], paper[1:], strict=True)]
            row["of_hybrid"] = statistics.median(ratios)
        rows.append(row)
    return rows


@torch.no_grad()
def measure(quick: bool = False) -> dict[str, Any]:
    """CPU seconds of one attention call, and of one step of the whole model in eager mode."""
    calls_count, steps_count = (3, 3) if quick else (25, 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    query, key, value = torch.randn(3, 1, 8, 4096, 64, generator=torch.Generator().manual_seed(0))
    densities = (0.15,) if quick else DENSITIES["hilbert"]
    calls = {
        name: functools.partial(run, query, key, value)
        for name, run in _candidates(densities).items()
    }
    model = load_model()
    x, label = noise(0, 256), torch.tensor([0])

    def step(attention: Attention) -> None:
        with replaced_attention(attention):
            euler_step(model, x, label, 0.4, 0.5)

    steps = {
        name: functools.partial(step, run)
        for name, run in _candidates((0.15,) if quick else STEP_DENSITIES).items()
    }
    times = {"calls": _rounds(calls, calls_count), "steps": _rounds(steps, steps_count)}
    torch.set_num_threads(threads)
    return {"threads": 1, "call_shape": [1, 8, 4096, 64], **times}


def speedups(rows: list[dict[str, Any]]) -> dict[Key, float]:
    """Dense seconds over those of each row."""
    dense = next(row["median"] for row in rows if row["method"] == "dense")
    return {(row["method"], row["density"]): dense / row["median"] for row in rows}


def slowdown(rows: list[dict[str, Any]], name: str) -> float:
    """How much longer `name` takes than the paper's method, the mean over all densities."""
    return statistics.fmean(row["of_hybrid"] for row in rows if row["method"] == name) - 1
