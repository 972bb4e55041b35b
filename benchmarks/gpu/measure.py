"""Times of attention and of its phases, side by side."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs
from pisa_compile.kernels.triton import attention, geometry
from pisa_compile.kernels.triton.configs import lookup
from pisa_compile.kernels.triton.launcher import INTERPRETED, device_of
from pisa_compile.kernels.triton.plan import Plan, plan

from . import flash, timing
from .shapes import PERMUTATION_TOKENS, Shape, inputs_of
from .timing import Run, Timer


def measure_permutation(
    shapes: list[Shape], device: torch.device, timer: Timer
) -> dict[str, Any] | None:
    """What reading rows through a permutation costs, at the shape that is nearest to 32k tokens."""
    if not shapes:
        return None
    shape = min(shapes, key=lambda s: abs(s.tokens - PERMUTATION_TOKENS))
    inputs = inputs_of(shape, device)
    params = AttentionParams(scale=shape.head_dim**-0.5, sparsity=0.875)
    generator = torch.Generator().manual_seed(0)
    random = torch.randperm(shape.tokens, generator=generator).to(device)
    tiles = torch.arange(shape.tokens, device=device)
    tiles = torch.cat([tiles[i::8] for i in range(8)])  # strided runs, as spatial tiles give
    times = timer(
        {
            "tokens' own order": lambda: attention(*inputs.astuple(), params),
            "strided": lambda: attention(*inputs.astuple(), params, permutation=tiles),
            "random": lambda: attention(*inputs.astuple(), params, permutation=random),
            "gathered by torch": lambda: attention(
                *(t[:, :, tiles] for t in inputs.astuple()[:3] if t is not None), None, params
            )[0].index_select(2, tiles.argsort()),
        }
    )
    return {"shape": asdict(shape), "times": times}


def measure(
    shape: Shape, density: float, device: torch.device, timer: Timer, reference_path: Path | None
) -> dict[str, Any]:
    inputs = inputs_of(shape, device)
    q, k, v, _ = inputs.astuple()
    params = AttentionParams(scale=shape.head_dim**-0.5, sparsity=1.0 - density)
    selected = selection(inputs, params)
    candidates: dict[str, Run] = {"pisa": lambda: attention(*inputs.astuple(), params)}
    for name, changes in (
        ("pisa_corrected", {"order": "corrected"}),
        ("pisa_corrected_keys_32", {"order": "corrected", "key_block_size": 32}),
        ("pisa_threshold", {"routing": "threshold"}),
    ):
        other = replace(params, **changes)
        candidates[name] = lambda other=other: attention(*inputs.astuple(), other)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        candidates[f"dense_{backend.split('_')[0].lower()}"] = timing.dense(backend, q, k, v)
    config = lookup(
        device_of(device).arch, shape.head_dim, shape.head_dim, str(q.dtype).removeprefix("torch.")
    )
    candidates["triton_dense"] = flash.dense_flash(q, k, v, params.scale, config, INTERPRETED)
    candidates["flex"] = (
        timing.flex(q, k, v, selected) if timer.gpu else timing.missing("needs a GPU")
    )
    candidates["public_reference"] = timing.public(q, k, v, density, reference_path)
    result = {"shape": asdict(shape), "density": density, "times": timer(candidates)}
    before = ("statistics", "first_order", "routing")
    phases = {name: _phase(inputs, params, name) for name in before}
    for order in ("none", "zeroth", "hybrid"):
        phases[f"forward_{order}"] = _phase(inputs, replace(params, order=order))
    corrected, threshold = replace(params, order="corrected"), replace(params, routing="threshold")
    phases["energy_corrected"] = _phase(inputs, corrected, "energy")
    phases["statistics_corrected"] = _phase(inputs, corrected, "statistics")
    for name in ("moments", "cuts", "routing", "forward"):
        if _has(inputs, threshold, name):
            phases[f"{name}_threshold"] = _phase(inputs, threshold, name)
    result["phases"] = timer(phases)
    result["selected_share"] = float(selected.float().mean())
    result["flops"] = _flops(shape, int(selected.sum()))
    result["tflops"] = _tflops(result)
    inputs_bytes = 3 * q.numel() * q.element_size()
    result["extra_memory_share"] = timing.extra_memory(candidates["pisa"], timer.gpu) / inputs_bytes
    result["eager_host_ms"] = timing.host_time(candidates["pisa"], timer.gpu)
    medians = _medians(result["times"])
    if "pisa" not in medians:
        raise RuntimeError(f"our own op did not run: {result['times']['pisa']}")
    dense = min((t for name, t in medians.items() if name.startswith("dense")), default=None)
    rivals = {"best_dense": dense, "flex": medians.get("flex")}
    rivals["public_reference"] = medians.get("public_reference")
    ours = medians["pisa"]
    result["speedup"] = {name: t / ours if t else None for name, t in rivals.items()}
    phase = _medians(result["phases"])
    result["shares"] = {
        "statistics_and_routing": sum(phase[name] for name in before) / ours,
        "centroids_and_first_order": (phase["forward_hybrid"] - phase["forward_none"]) / ours,
        "exact_rate_of_dense_forward": result["tflops"]["forward_none"]
        / result["tflops"]["triton_dense"],
    }
    return result


def _medians(times: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: t["median_ms"] for name, t in times.items() if "median_ms" in t}


def selection(inputs: Inputs, params: AttentionParams) -> Tensor:
    """The exact blocks as our routing chooses them, boolean [B, H, M, N]."""
    share, geometry.WORKSPACE_SHARE = geometry.WORKSPACE_SHARE, 1e3  # all heads in one group
    try:
        work = _plan(inputs, params)
    finally:
        geometry.WORKSPACE_SHARE = share
    bitmap = torch.empty(0)
    for launch in work.launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)
        bitmap = launch.arguments.get("bitmap", bitmap)
    bits = (bitmap[..., None] >> torch.arange(32, device=bitmap.device)) & 1
    blocks = -(-inputs.key.shape[2] // params.block_size)
    return bits.flatten(-2)[..., :blocks].bool().unflatten(0, inputs.query.shape[:2])


def _plan(inputs: Inputs, params: AttentionParams) -> Plan:
    return plan(*inputs.astuple(), params, device_of(inputs.query.device))


def _has(inputs: Inputs, params: AttentionParams, name: str) -> bool:
    return any(launch.name == name for launch in _plan(inputs, params).launches)


def _phase(inputs: Inputs, params: AttentionParams, name: str = "forward") -> Run:
    """Only the launches of one name, on a workspace that one complete run has filled."""
    work: list[Plan] = []

    def run() -> None:
        if not work:
            work.append(_plan(inputs, params))
            for launch in work[0].launches:
                launch.kernel[launch.grid](**launch.arguments, **launch.options)
        for launch in work[0].launches:
            if launch.name == name:
                launch.kernel[launch.grid](**launch.arguments, **launch.options)

    return run


def _flops(shape: Shape, selected_blocks: int) -> dict[str, float]:
    blocks, d, heads = -(-shape.tokens // 64), shape.head_dim, shape.heads
    return {
        "dense": 4.0 * shape.tokens**2 * d * heads,
        "exact": 4.0 * 64 * 64 * d * selected_blocks,
        "zeroth": 4.0 * shape.tokens * blocks * d * heads,
        "first_order": 2.0 * shape.tokens * d * d * heads,
        "statistics": 2.0 * shape.tokens * d * d * heads,
        "routing": 2.0 * blocks * blocks * d * heads,
    }


def _tflops(result: dict[str, Any]) -> dict[str, float]:
    """Achieved rates: of the whole forward kernel, its exact part, and the dense forward."""
    flops, ms = result["flops"], _medians({**result["times"], **result["phases"]})
    work = {
        "forward_hybrid": flops["exact"] + flops["zeroth"] + flops["first_order"],
        "forward_none": flops["exact"],
        "triton_dense": flops["dense"],
    }
    return {name: amount / ms[name] / 1e9 for name, amount in work.items()}


def line(result: dict[str, Any]) -> str:
    times = (f"{name} {ms:.3f} ms" for name, ms in _medians(result["times"]).items())
    return f"{result['shape']['name']} density {result['density']}: {', '.join(times)}"
