"""Correctness on the device, before anything is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import Inputs, random_inputs, relative_l2
from pisa_compile.kernels.triton import attention, launcher

from . import timing
from .shapes import CHECKS, SETTINGS, Shape, inputs_of


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
    inputs, checks = inputs_of(shape, device), []
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

        results = timing.captured(call, device)
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
