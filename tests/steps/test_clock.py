"""Which step is running: loops of one's own, one generation inside another, threads and tasks."""

from __future__ import annotations

import asyncio
import logging

import pytest

import pisa_compile as pisa
from pisa_compile.policies.schedule import Step
from pisa_compile.steps import clock as steps


def test_a_loop_of_steps() -> None:
    with pisa.denoising(3, noise=[1.0, 0.5, 0.25]) as loop:
        seen = [(i, steps.current_step()) for i in loop]
        assert steps.current_step() is None
    assert seen == [(0, Step(0, 3, 1.0)), (1, Step(1, 3, 0.5)), (2, Step(2, 3, 0.25))]
    with pytest.raises(RuntimeError, match=r"inside of `with pisa.denoising"):
        list(pisa.denoising(2))


def test_a_generation_inside_of_another_one() -> None:
    with pisa.denoising(2) as outer:
        outer.step()
        with pisa.denoising(2) as inner:
            assert [steps.current_step() for _ in inner] == [Step(0, 2), Step(1, 2)]
            assert steps.current_step() == Step(1, 2)
        outer.step()
        assert steps.current_step() is None
        with pytest.raises(RuntimeError, match="all 2 steps"):
            outer.step()


def test_an_error_in_the_loop_forgets_the_step() -> None:
    def loop() -> None:
        with pisa.denoising(5) as loop:
            for i in loop:
                if i == 2:
                    raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert steps.current_step() is None


def test_a_block_that_never_advances_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pisa_compile"), pisa.denoising(2):
        pass
    assert "ended at its first step" in caplog.text


def test_set_step() -> None:
    pisa.set_step(3, 10, noise=0.5)
    assert steps.current_step() == Step(3, 10, 0.5)
    pisa.set_step(4)
    assert steps.current_step() == Step(4)
    pisa.set_step(None)
    assert steps.current_step() is None
    with pytest.raises(ValueError, match="step 3 of 3: steps count from 0"):
        pisa.set_step(3, 3)
    with pytest.raises(ValueError, match="the noise level must be in"):
        pisa.set_step(0, 3, noise=1.5)
    with pytest.raises(ValueError, match="3 steps, but 2 noise levels"):
        pisa.denoising(3, noise=[1, 0])
    assert steps.current_step() is None


def test_tasks_do_not_mix() -> None:
    async def task(offset: int) -> list[Step | None]:
        found = []
        for _ in range(3):
            pisa.set_step(offset)
            await asyncio.sleep(0)
            found.append(steps.current_step())
        return found

    async def both() -> list[list[Step | None]]:
        return await asyncio.gather(task(1), task(2))

    assert asyncio.run(both()) == [[Step(1)] * 3, [Step(2)] * 3]
    assert steps.current_step() is None
