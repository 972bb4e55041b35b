"""Steps that come from the scheduler of a diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pisa_compile as pisa
from pisa_compile import Schedule
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.policies.schedule import Step
from pisa_compile.steps import clock as steps
from pisa_compile.steps.scheduler import noise_levels

diffusers = pytest.importorskip("diffusers")

from examples.pipelines.tiny import TINY  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def watch(model: nn.Module) -> list[Step | None]:
    """The step at every call of `model`, from now on."""
    seen: list[Step | None] = []
    model.register_forward_pre_hook(lambda *_: seen.append(steps.current_step()))
    return seen


def indices(seen: list[Step | None]) -> list[int]:
    return [-1 if step is None else step.index for step in seen]


def call(name: str, pipe: Any, guided: bool = False, count: int = 3, **more: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    sizes = TINY[name].sizes[0]
    arguments = TINY[name].arguments(guided) | sizes | more
    return pipe(**arguments, num_inference_steps=count, output_type="latent")


@pytest.mark.parametrize(
    ("name", "per_step"), [("WanPipeline", 2), ("FluxPipeline", 2), ("CogVideoXPipeline", 1)]
)
def test_every_model_call_of_a_step_sees_that_step(name: str, per_step: int) -> None:
    """Guidance as two calls of the model, or as one call on a batch of two."""
    pipe = TINY[name].build()
    seen = watch(pipe.transformer)
    with pisa.attach(pipe):
        call(name, pipe, guided=True)
        assert steps.current_step() is None
        call(name, pipe, guided=True, count=2)
    expected = [i for count in (3, 2) for i in range(count) for _ in range(per_step)]
    assert indices(seen) == expected
    assert [step.count for step in seen if step] == [3] * 3 * per_step + [2] * 2 * per_step
    noise = [step.noise for step in seen[: 3 * per_step : per_step] if step]
    assert noise == sorted(noise, reverse=True)
    assert noise[0] > 0.8
    call(name, pipe)
    assert seen[-1] is None  # detached


def test_two_experts_share_the_steps() -> None:
    pipe = TINY["WanPipeline"].build()
    other = TINY["WanPipeline"].build().transformer
    pipe.register_modules(transformer_2=other)
    pipe.register_to_config(boundary_ratio=0.7)
    first, second = watch(pipe.transformer), watch(other)
    with pisa.attach(pipe):
        call("WanPipeline", pipe, guided=True, count=5)
    assert indices(first) + indices(second) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert first
    assert second


def test_a_compiled_pipeline_follows_its_schedule() -> None:
    pipe = TINY["FluxPipeline"].build()

    def latents() -> list[torch.Tensor]:
        """After each of four steps, from the same noise."""
        found = []

        def keep(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found.append(tensors["latents"])
            return tensors

        generator = torch.Generator().manual_seed(0)
        call("FluxPipeline", pipe, count=4, generator=generator, callback_on_step_end=keep)
        return found

    dense = latents()
    options = {"inner": "eager", "min_tokens": 0, "block_size": 16, "preset": None}
    schedule = Schedule(dense_first=0.5, steps=[0.9])
    pipe.transformer.compile(backend="pisa", options={**options, "schedule": schedule})
    with pisa.attach(pipe):
        first, second = latents(), latents()
    differences = [relative_l2(a, b) for a, b in zip(first, dense, strict=True)]
    assert max(differences[:2]) < 1e-5
    assert min(differences[2:]) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_image_to_image_starts_in_the_middle() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pisa.attach(scheduler)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6)
    sample, seen = torch.randn(1, 4), []
    for t in scheduler.timesteps[6:]:
        seen.append(steps.current_step())
        sample = scheduler.step(torch.zeros(1, 4), t, sample).prev_sample
    assert indices(seen) == [6, 7, 8, 9]
    assert steps.current_step() is None


def test_a_pipeline_inside_a_callback_does_not_disturb_the_outer_one() -> None:
    outer, inner = TINY["FluxPipeline"].build(), TINY["FluxPipeline"].build()
    seen, other = watch(outer.transformer), watch(inner.transformer)

    def preview(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 0:
            call("FluxPipeline", inner, count=2)
        return {}

    with pisa.attach(outer), pisa.attach(inner):
        call("FluxPipeline", outer, callback_on_step_end=preview)
    assert indices(seen) == [0, 1, 2]
    assert indices(other) == [0, 1]


def test_pipelines_in_threads_do_not_mix() -> None:
    results: dict[int, list[Step | None]] = {}
    turn = threading.Barrier(2, timeout=60)

    def generate(count: int) -> None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pisa.attach(scheduler)
        scheduler.set_timesteps(count)
        results[count] = []
        for t in scheduler.timesteps[:3]:
            turn.wait()
            results[count].append(steps.current_step())
            scheduler.step(torch.zeros(1), t, torch.zeros(1))

    threads = [threading.Thread(target=generate, args=(count,)) for count in (3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, seen in results.items():
        assert [(s.index, s.count) for s in seen if s] == [(0, count), (1, count), (2, count)]


def test_a_generation_that_failed_is_replaced_by_the_next() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pisa.attach(scheduler):
        scheduler.set_timesteps(5)
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
        scheduler.set_timesteps(4)
        assert steps.current_step() == Step(0, 4, noise=1.0)
    assert steps.current_step() is None


def test_copies_of_a_scheduler_are_left_alone() -> None:
    """Pipelines with sound copy their scheduler and step both."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pisa.attach(scheduler):
        for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            scheduler.set_timesteps(5)
            copied.set_timesteps(9)
            copied.step(torch.zeros(1), copied.timesteps[0], torch.zeros(1))
            assert steps.current_step() == Step(0, 5, noise=1.0)
            assert (len(copied.timesteps), copied.step_index) == (9, 1)
            assert len(scheduler.timesteps) == 5


def test_signatures_stay_and_detaching_undoes_all() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    before, keys = inspect.signature(scheduler.set_timesteps), set(vars(scheduler))
    first, second = pisa.attach(scheduler), pisa.attach(scheduler)  # wraps once
    assert inspect.signature(scheduler.set_timesteps) == before
    scheduler.set_timesteps(3)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    step = steps.current_step()
    assert step is not None
    assert step.index == 1
    first.detach()
    second.detach()
    assert steps.current_step() is None
    assert {"set_timesteps", "step", "set_begin_index"}.isdisjoint(set(vars(scheduler)) - keys)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("make", "highest", "lowest"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1.0, 0.02),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 1.0, 0.02),
        (
            lambda: diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            1.0,
            0.02,
        ),
        (lambda: diffusers.EulerDiscreteScheduler(), 0.99, 0.3),
        (lambda: diffusers.CogVideoXDDIMScheduler(), 1.0, 0.3),
        (lambda: diffusers.DDPMScheduler(), 1.0, 0.3),
    ],
    ids=["flow", "flow-inverted", "unipc-flow", "euler", "cogvideox", "ddpm"],
)
def test_noise_levels_fall_from_noise_to_sample(make: Any, highest: float, lowest: float) -> None:
    scheduler = make()
    scheduler.set_timesteps(20)
    levels = noise_levels(scheduler)
    assert levels is not None
    assert len(levels) == len(scheduler.timesteps)
    assert levels == sorted(levels, reverse=True)
    assert 0.9 * highest <= levels[0] <= 1.0
    assert 0.0 <= levels[-1] <= max(lowest, 0.3)


def test_noise_level_of_a_variance_preserving_scheduler_is_its_share_of_noise() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(4)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
    sigma = (1 - scheduler.alphas_cumprod[scheduler.timesteps]).sqrt()
    expected = (sigma / (alpha + sigma)).tolist()
    assert noise_levels(scheduler) == pytest.approx(expected, rel=1e-4)


def test_what_has_no_scheduler_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got Linear; pisa\.denoising and pisa\.set_step"):
        pisa.attach(nn.Linear(2, 2))
