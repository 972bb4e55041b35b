"""`calibrate`: run a model on real inputs, measure, allocate, verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.testing import relative_l2
from ...policies.policy import DEFAULT, Policy
from ...report.compilation import check_not_compiled
from ..stand_ins import Generate
from .pipelines import of_pipeline
from .plan import Plan, measured
from .progress import progress
from .result import Calibration
from .runner import Runner

DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.65)


def calibrate(
    model: Any,
    inputs: Sequence[Any],
    *,
    generate: Generate | None = None,
    sparsity: float | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    held_out: Sequence[Any] = (),
    policy: Policy | None = None,
    densities: Sequence[float] = DENSITIES,
    sensitivity: bool = True,
    per_head: bool = True,
    show_progress: bool = True,
) -> Calibration:
    """Find the density of every attention, denoising step and head that serves a model best.

    Runs `inputs` densely and measures at every attention what several densities would change
    there, on the spot: queries, keys and values are not kept. A cost model of the device predicts
    times. Then the densities are chosen with the least error of the result for the time that was
    asked for, or the least time for the error, and checked on `held_out` inputs.

    Args:
        model: an `nn.Module`, not compiled, or a diffusers pipeline. It is left as it is.
        inputs: what is generated from. Each is given to `generate`; for a pipeline each is a dict
            of its arguments with a `generator` or `latents`, and steps are known by themselves.
        generate: `generate(model, input)` returns a tensor, or a structure with tensors. It should
            make the denoising step known (`pisa.denoising`, `pisa.attach`, `pisa.set_step`), or all
            steps share one setting. By default one call of the model with the input, which may be a
            tensor, a tuple of arguments or a dict of keyword arguments.
        sparsity: spend as much time as this sparsity would in all places. One of the three.
        speedup: spend at most the time of dense attention divided by this.
        max_error: be as fast as possible with at most this relative L2 distance of the result to
            the dense one, as predicted.
        held_out: other inputs, for the check.
        policy: how what is not exact is approximated, and everything else but the sparsity.
        densities: the choices, besides dense.
        sensitivity: measure in further generations how much sites and steps matter to the result;
            about 6 and one per site. Otherwise the attention's own error is what counts.
        per_head: whether the heads of a site may differ.
        show_progress: a progress bar, where rich is installed.

    Returns:
        A `Calibration`: `apply(model)`, `save(path)`, `print`.

    Raises:
        ValueError, TypeError: an argument is not what is described above, or cannot be met.
        RuntimeError: no attention of the model could be measured.
    """
    if not isinstance(model, nn.Module):
        model, of_its_own = of_pipeline(model)
        generate = generate or of_its_own
    check_not_compiled(model)
    if isinstance(inputs, (Tensor, str, Mapping)) or len(inputs) == 0:
        raise ValueError("inputs must be a list with at least one input")
    asked = {"sparsity": sparsity, "speedup": speedup, "max_error": max_error}
    if sum(value is not None for value in asked.values()) != 1:
        raise ValueError(f"give exactly one of sparsity, speedup and max_error, got {asked}")
    if max_error is not None and not sensitivity:
        raise ValueError("max_error is about the result, which sensitivity=False leaves unknown")
    choices = tuple(sorted(set(densities)))
    if not choices or not all(0.0 < density < 1.0 for density in choices):
        raise ValueError(f"densities must be in (0, 1), got {densities}")
    base = (policy or Policy()).over(DEFAULT)

    with (
        progress(show_progress) as bar,
        torch.no_grad(),
        Runner(model, generate, base) as run,
    ):
        table, dense = measured(run, inputs, choices, bar)
        plan = Plan.of(table, per_head)
        if sensitivity:
            plan.weigh(run, inputs[0], dense[0], bar)
        chosen = plan.solve(sparsity=sparsity, speedup=speedup, max_error=max_error)
        policies = plan.policies(chosen, policy or Policy())
        delivered = uniform = None
        even = plan.uniform_sparsity(chosen)
        if held_out:
            expected = [run(input_) for input_ in bar.track(held_out, "held-out, dense")]
            named = {"policy": policies}
            found = [run(x, named) for x in bar.track(held_out, "held-out, calibrated")]
            evenly = [run(x, {"sparsity": even}) for x in bar.track(held_out, "held-out, uniform")]
            whole = torch.cat(expected)
            delivered = relative_l2(torch.cat(found), whole)
            uniform = relative_l2(torch.cat(evenly), whole)
    return Calibration(
        policies=policies,
        mean_density=plan.mean_density(chosen),
        predicted_error=plan.predicted_error(chosen) if sensitivity else None,
        delivered_error=delivered,
        uniform_error=uniform,
        uniform_sparsity=even,
        predicted_seconds=plan.seconds(chosen),
        dense_seconds=plan.dense_seconds,
        densities=plan.by_site_and_step(chosen),
    )
