"""The GPU record: correctness first, then times side by side, as one JSON file.

    python benchmarks/gpu.py                                       every shape and density
    python benchmarks/gpu.py --shapes flux wan_14b_720p --densities 0.125
    python benchmarks/gpu.py --reference-path ~/piecewise-sparse-attention
    python benchmarks/gpu.py --smoke                               toy sizes, interpreter, no GPU

Nothing is timed or written when a correctness check fails. Times are medians over rounds in which
all candidates run one after the other, each from a captured graph and with a cold cache. The smoke
run goes through every line of this on toy sizes; its times mean nothing, and it writes a file only
where --output names one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton

import gpu_flash
import gpu_timing
import torch
from gpu_timing import Run, Timer
from torch import Tensor

from benchmarks import records
from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2
from pisa_compile.kernels.triton import attention, geometry, launcher
from pisa_compile.kernels.triton.configs import lookup
from pisa_compile.kernels.triton.launcher import INTERPRETED, device_of
from pisa_compile.kernels.triton.plan import Plan, plan


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    heads: int
    head_dim: int


SHAPES = (
    Shape("flux", 4608, 24, 128),
    Shape("sd35", 4429, 38, 64),
    Shape("pixart", 4096, 16, 72),
    Shape("wan_14b_480p", 32_760, 40, 128),
    Shape("wan_14b_720p", 75_600, 40, 128),
    Shape("hunyuan_video", 119_056, 24, 128),
)
TOYS = (Shape("toy", 200, 2, 16), Shape("toy_ragged", 150, 1, 24))
DENSITIES = (0.05, 0.10, 0.125, 0.15, 0.25)
# Small enough for the specification in float64, and every feature that has a branch of its own.
CHECKS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "zeroth": {"order": "zeroth"},
    "none": {"order": "none"},
    "threshold": {"routing": "threshold"},
    "covariance": {"routing": "topk_covariance"},
    "head_dim_72": {"head_dim": 72},
    "head_dim_256": {"head_dim": 256},
    "value_narrower_gqa": {"head_dim": 96, "value_dim": 40, "heads": 4, "kv_heads": 2},
    "masked_exact": {"masked": 0.3, "exact": (70, 20)},
    "cross_block_32": {"query_len": 100, "key_len": 333, "block_size": 32},
    "cross_keys_16": {"query_len": 100, "key_len": 333, "key_block_size": 16},
    "corrected": {"order": "corrected"},
    "corrected_keys_32": {"order": "corrected", "key_block_size": 32},
    "corrected_gqa_masked": {"order": "corrected", "masked": 0.3, "heads": 4, "kv_heads": 2},
    "corrected_threshold": {"order": "corrected", "routing": "threshold"},
    "density": {"heads": 3, "density": (1.0, 0.4, 0.05)},
    "density_threshold": {"heads": 3, "density": (1.0, 0.4, 0.05), "routing": "threshold"},
    "permuted": {"permuted": True},
    "permuted_threshold_masked": {"permuted": True, "routing": "threshold", "masked": 0.3},
    "permuted_corrected_head_dim_72": {"permuted": True, "order": "corrected", "head_dim": 72},
    "permuted_exact_density": {"permuted": True, "exact": (70, 20), "density": (0.4,)},
}
SETTINGS = ("routing", "order", "exact", "block_size", "key_block_size")
PERMUTATION_TOKENS = 32_760  # about 32k: where a permutation must cost little


def main() -> int:
    arguments = _arguments()
    device = torch.device("cpu" if arguments.smoke else "cuda")
    checks = check_features(device, arguments.smoke)
    shapes = [s for s in SHAPES if not arguments.shapes or s.name in arguments.shapes]
    shapes = list(TOYS) if arguments.smoke else shapes
    for shape in shapes:
        checks += check_shape(shape, device)
    checks += check_replay(device, arguments.smoke)
    checks.append(check_fallbacks())
    failures = [json.dumps(check) for check in checks if not check["passed"]]
    if failures:
        print("\n".join(["not measured, because results are wrong:", *failures]), file=sys.stderr)
        return 1
    record: dict[str, Any] = {
        "environment": gpu_timing.environment(device, device_of(device).arch),
        "checks": checks,
        "results": [],
    }
    timer = Timer(device, arguments.rounds)
    record["matmul_tflops"] = gpu_timing.matmul_tflops(timer, device)
    for shape in shapes:
        for density in arguments.densities:
            result = measure(shape, density, device, timer, arguments.reference_path)
            record["results"].append(result)
            print(_line(result), flush=True)
            _write(arguments.output, record)
    record["permutation"] = measure_permutation(shapes, device, timer)
    record["environment_after"] = gpu_timing.environment(device, device_of(device).arch)
    _write(arguments.output, record)
    if arguments.output:
        print(f"written to {arguments.output}")
    return 0


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(path, record)


def check_features(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """Every feature and dtype against the specification in float64."""
    checks = []
    for name, options in CHECKS.items():
        for dtype in (torch.float32,) if smoke else (torch.float32, torch.float16, torch.bfloat16):
            options = {"query_len": 150 if smoke else 1000, "heads": 1 if smoke else 2, **options}
            if smoke and options.get("head_dim", 64) > 96:
                options = {**options, "query_len": 80}
            settings = {k: v for k, v in options.items() if k in SETTINGS}
            data = _data(options, device)
            unused = (*SETTINGS, "density", "permuted")
            shape = {k: v for k, v in options.items() if k not in unused}
            inputs = random_inputs(**shape, dtype=dtype, device=str(device))
            scale = inputs.query.shape[-1] ** -0.5
            params = AttentionParams(scale=scale, **{"sparsity": 0.7, **settings})
            ours = attention(*inputs.astuple(), params, **data)
            checks.append(_compare(f"{name} {dtype}", inputs, params, ours, **data))
    return checks


def _data(options: dict[str, Any], device: torch.device) -> dict[str, Tensor | None]:
    """The tensor arguments of a check: density and permutation."""
    density, permutation = options.get("density"), None
    if density is not None:
        density = torch.tensor(density, device=device)
        density = density[0] if density.numel() == 1 else density
    if options.get("permuted"):
        generator = torch.Generator().manual_seed(1)
        permutation = torch.randperm(options["query_len"], generator=generator).to(device)
    return {"density": density, "permutation": permutation}


def check_shape(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Some query blocks of the full problem; the others are too large for the specification."""
    inputs, checks = _inputs(shape, device), []
    params = AttentionParams(scale=shape.head_dim**-0.5, sparsity=0.875)
    out, lse = attention(*inputs.astuple(), params)
    for first in (0, shape.tokens // 128 * 64, (shape.tokens - 1) // 64 * 64):
        rows = (slice(None), slice(-2, None), slice(first, first + 64))
        part = Inputs(inputs.query[rows], inputs.key[:, -2:], inputs.value[:, -2:], None)
        name = f"{shape.name} from row {first}"
        checks.append(_compare(name, part, params, (out[rows], lse[rows])))
    return checks


def check_replay(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """A captured graph reads new inputs and a new density, and so does compiled code.

    Without a GPU nothing is captured: the same buffers are filled and used again.
    """
    checks = []
    tokens, heads = (150, 2) if smoke else (4096, 8)
    for order, routing in (("corrected", "topk"), ("hybrid", "threshold")):
        params = AttentionParams(scale=0.125, routing=routing, order=order)
        first, second = (
            random_inputs(heads=heads, query_len=tokens, seed=seed, device=str(device))
            for seed in (1, 2)
        )
        buffers = Inputs(*(t.clone() for t in first.astuple()[:3]), None)
        density = torch.full((heads,), 0.5, device=device)
        permutation = torch.arange(tokens, device=device)

        def call(
            buffers: Inputs = buffers, density: Tensor = density,
            permutation: Tensor = permutation, params: AttentionParams = params,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            return attention(*buffers.astuple(), params, density=density, permutation=permutation)

        results = gpu_timing.captured(call, device)
        for ours, new in zip(buffers.astuple()[:3], second.astuple()[:3], strict=True):
            assert ours is not None
            assert new is not None
            ours.copy_(new)
        density.fill_(0.2)
        permutation.copy_(permutation.flip(0))
        ours = results()
        expected = attention(*second.astuple(), params, density=density, permutation=permutation)
        checks.append(
            {"name": f"replay {order} {routing}",
             "passed": all(map(torch.equal, ours, expected))}
        )  # fmt: skip
    return [*checks, _check_reduce_overhead(device, tokens, heads)]


def _check_reduce_overhead(device: torch.device, tokens: int, heads: int) -> dict[str, Any]:
    """`torch.compile(mode="reduce-overhead")` around the op, called with changing data."""

    def model(q: Tensor, k: Tensor, v: Tensor, density: Tensor) -> Tensor:
        return torch.ops.pisa.attention(
            q * 2.0, k, v, None, density, sparsity=0.5, impl="triton"
        ) + 1.0  # fmt: skip

    compiled = (
        torch.compile(model, mode="reduce-overhead")
        if device.type == "cuda"
        else torch.compile(model, backend="aot_eager")
    )
    passed = True
    for seed, share in ((1, 0.5), (2, 0.25), (3, 1.0), (4, 0.1)):
        inputs = random_inputs(heads=heads, query_len=tokens, seed=seed, device=str(device))
        density = torch.full((heads,), share, device=device)
        arguments = (*inputs.astuple()[:3], density)
        passed &= relative_l2(compiled(*arguments), model(*arguments)) < 1e-5
    return {"name": "reduce-overhead", "passed": passed}


def check_fallbacks() -> dict[str, Any]:
    """Every configuration ran as it is in the table: a record of a fallback would mislead."""
    failures = {str(kind): count for kind, count in launcher.failures().items()}
    return {"name": "no fallback", "passed": not failures, "failures": failures}


def _compare(
    name: str,
    inputs: Inputs,
    params: AttentionParams,
    ours: tuple[Tensor, Tensor],
    **data: Tensor | None,
) -> dict[str, Any]:
    """Passes within four times the error of the reference in the same dtype, plus TF32's rest."""
    exact = inputs.to(torch.float64)
    expected, expected_lse = reference.attention(*exact.astuple(), params, **data)
    own = relative_l2(reference.attention(*inputs.astuple(), params, **data)[0], expected)
    error, allowed = relative_l2(ours[0], expected), 4 * own + 1e-5
    valid = expected_lse > -torch.inf
    lse_error = float((ours[1] - expected_lse)[valid].abs().max())
    lse_allowed = 1e-4 if inputs.query.dtype == torch.float32 else 2e-2
    passed = error <= allowed and lse_error <= lse_allowed
    return {"name": name, "error": error, "allowed": allowed, "lse_error": lse_error,
            "passed": passed}  # fmt: skip


def measure_permutation(
    shapes: list[Shape], device: torch.device, timer: Timer
) -> dict[str, Any] | None:
    """What reading rows through a permutation costs, at the shape that is nearest to 32k tokens."""
    if not shapes:
        return None
    shape = min(shapes, key=lambda s: abs(s.tokens - PERMUTATION_TOKENS))
    inputs = _inputs(shape, device)
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
    inputs = _inputs(shape, device)
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
        candidates[f"dense_{backend.split('_')[0].lower()}"] = gpu_timing.dense(backend, q, k, v)
    config = lookup(
        device_of(device).arch, shape.head_dim, shape.head_dim, str(q.dtype).removeprefix("torch.")
    )
    candidates["triton_dense"] = gpu_flash.dense_flash(q, k, v, params.scale, config, INTERPRETED)
    candidates["flex"] = (
        gpu_timing.flex(q, k, v, selected) if timer.gpu else gpu_timing.missing("needs a GPU")
    )
    candidates["public_reference"] = gpu_timing.public(q, k, v, density, reference_path)
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
    result["extra_memory_share"] = (
        gpu_timing.extra_memory(candidates["pisa"], timer.gpu) / inputs_bytes
    )
    result["eager_host_ms"] = gpu_timing.host_time(candidates["pisa"], timer.gpu)
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


def _inputs(shape: Shape, device: torch.device) -> Inputs:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_inputs(
        heads=shape.heads, query_len=shape.tokens, head_dim=shape.head_dim, dtype=dtype,
        device=str(device),
    )  # fmt: skip


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


def _line(result: dict[str, Any]) -> str:
    times = (f"{name} {ms:.3f} ms" for name, ms in _medians(result["times"]).items())
    return f"{result['shape']['name']} density {result['density']}: {', '.join(times)}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=[s.name for s in SHAPES])
    parser.add_argument("--densities", nargs="*", type=float, default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--reference-path", type=Path, help="checkout of the public implementation")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/gpu.json")
    parser.add_argument("--smoke", action="store_true", help="toy sizes in the interpreter")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.densities, arguments.rounds = (0.5,), 1
    elif arguments.output is None:
        arguments.output = ROOT / "benchmarks" / "results" / "gpu.json"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
