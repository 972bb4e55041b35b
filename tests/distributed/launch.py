"""Run scenarios on several gloo ranks, all in one set of processes: starting them costs most."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)
Scenario = Callable[[int, int], None]


def run_on_ranks(ranks: int, module: str, folder: Path) -> dict[str, str]:
    """Call every scenario of a module on every rank.

    Args:
        ranks: how many processes.
        module: name of a module with `SCENARIOS`, functions of rank and number of ranks that raise
            if something is wrong.
        folder: for the file through which the ranks find each other.

    Returns:
        What went wrong, by scenario: the tracebacks of the ranks that failed, or "".
    """
    # Forked from a server that has imported the module and run nothing: quick, and no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    queue = context.Queue()
    store = f"file://{folder / 'store'}"
    processes = [
        context.Process(target=_rank, args=(rank, ranks, module, store, queue), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    failures: dict[str, str] = {}
    try:
        for _ in processes:
            rank, found = queue.get(timeout=10 * TIMEOUT.total_seconds())
            for name, text in found.items():
                failures[name] = failures.get(name, "") + (f"rank {rank}:\n{text}" if text else "")
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return failures


def _rank(rank: int, ranks: int, module: str, store: str, queue: Any) -> None:
    import importlib

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    scenarios: Mapping[str, Scenario] = importlib.import_module(module).SCENARIOS
    dist.init_process_group("gloo", store, timeout=TIMEOUT, rank=rank, world_size=ranks)
    found = {}
    for name, scenario in scenarios.items():
        torch._dynamo.reset()
        try:
            scenario(rank, ranks)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    queue.put((rank, found))
    # Whoever fails leaves the others waiting: they time out and report it.
    dist.destroy_process_group()
