"""How long the rewrite takes beside Inductor, and how it grows with the graph.

    python benchmarks/pass_time.py --output benchmarks/results/pass_time.json

Builds FLUX's transformer from diffusers with its 19 double and 38 single blocks at a tiny width,
and measures the rewrite, copy of the graph included, and Inductor inside one compilation, then the
rewrite alone for a growing number of blocks. Times are CPU seconds of the compiling process, which
a busy machine does not change; Inductor's C++ compiler runs in processes of its own and is left
out, so its true share of the time is larger.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import fx, nn

from pisa_compile.ops.token_order import NO_CALLER
from pisa_compile.passes import Context, rewritten
from pisa_compile.policies.policy import Policy
from pisa_compile.policies.presets import Presets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

CONTEXT = Context(Policy(min_tokens=0), {}, Presets(name=None), NO_CALLER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON record to write")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the rewrite per size")
    parser.add_argument("--skip-inductor", action="store_true", help="measure the rewrite alone")
    arguments = parser.parse_args()
    growth = [measure_rewrite(blocks, arguments.repeats) for blocks in (7, 14, 28, 57, 114)]
    record: dict[str, Any] = {
        "benchmark": "pass_time",
        "model": "FluxTransformer2DModel, 19 double and 38 single blocks, 2 heads of 16",
        "environment": records.environment("python benchmarks/pass_time.py"),
        "growth": growth,
        "cpu_seconds_per_node_spread": _spread([g["cpu_seconds_per_node"] for g in growth]),
    }
    if not arguments.skip_inductor:
        record["compilation"] = measure_compilation()
    print(records.text(record))
    if arguments.output is not None:
        records.write(arguments.output, record)


def flux(double: int, single: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, 4),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(64, 3),
        "txt_ids": torch.randn(16, 3),
    }
    return model, inputs


def compile_with(backend: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)


def measure_rewrite(blocks: int, repeats: int) -> dict[str, Any]:
    """Median time of the rewrite on a model with a third of its blocks double."""
    model, inputs = flux(blocks // 3, blocks - blocks // 3)
    seconds, nodes, replaced = [], 0, 0

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        nonlocal nodes, replaced
        nodes = len(gm.graph.nodes)
        for _ in range(repeats):
            start = time.process_time()
            sparse = rewritten(gm, CONTEXT, "input")
            seconds.append(time.process_time() - start)
            replaced = sum(decision.replaced for decision in sparse.decisions)
        return gm.forward

    compile_with(backend, model, inputs)
    median = statistics.median(seconds)
    return {
        "blocks": blocks,
        "nodes": nodes,
        "replaced": replaced,
        "cpu_seconds_median": median,
        "cpu_seconds_min": min(seconds),
        "cpu_seconds_max": max(seconds),
        "cpu_seconds_per_node": median / nodes,
    }


def measure_compilation() -> dict[str, Any]:
    """The parts of one compilation of the 57-block model, without Inductor's caches."""
    from torch._inductor.compile_fx import compile_fx

    model, inputs = flux(19, 38)
    parts: dict[str, float] = {}

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        start = time.process_time()
        sparse = rewritten(gm, CONTEXT, "input").graph
        parts["rewrite"] = time.process_time() - start
        start, wall = time.process_time(), time.perf_counter()
        patches = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
        compiled = compile_fx(sparse, example_inputs, config_patches=patches)
        parts["inductor"] = time.process_time() - start
        parts["inductor_wall"] = time.perf_counter() - wall
        return compiled

    with torch._functorch.config.patch(enable_autograd_cache=False):
        compile_with(backend, model, inputs)
    return {
        "cpu_seconds": parts,
        "rewrite_share_of_inductor": parts["rewrite"] / parts["inductor"],
    }


def _spread(values: list[float]) -> float:
    """Largest over smallest: 1 for perfectly linear growth."""
    return max(values) / min(values)


if __name__ == "__main__":
    main()
