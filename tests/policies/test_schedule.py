"""What schedules say: the densities of a step, with and without one that is known."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pisa_compile as pisa
from pisa_compile import Schedule
from pisa_compile.policies.schedule import Step


@pytest.mark.parametrize(
    ("schedule", "count", "expected"),
    [
        (Schedule(dense_first=2), 5, [1, 1, 0.5, 0.5, 0.5]),
        (Schedule(dense_first=0.3, dense_last=1), 5, [1, 1, 0.5, 0.5, 1]),
        (Schedule(dense_first=0.2), 10, [1, 1] + [0.5] * 8),
        (Schedule(dense_last=0.5), 3, [0.5, 1, 1]),
        (Schedule(dense_first=9), 3, [1, 1, 1]),
        (Schedule(steps=[0.0, 0.25, 0.75]), 3, [1, 0.75, 0.25]),
        (Schedule(steps=[0.0, 0.25, 0.75]), 6, [1, 1, 0.75, 0.75, 0.25, 0.25]),
        (Schedule(steps=[0.0, 0.25, 0.75, 0.5]), 2, [1, 0.25]),
        (Schedule(ramp=(0.25, 0.75)), 3, [0.75, 0.5, 0.25]),
        (Schedule(ramp=(0.25, 0.75), dense_first=1, dense_last=1), 5, [1, 0.75, 0.5, 0.25, 1]),
        (Schedule(ramp=(0.25, 0.75), dense_first=1), 2, [1, 0.75]),
    ],
    ids=str,
)
def test_densities_per_step(schedule: Schedule, count: int, expected: list[float]) -> None:
    given = [schedule.densities(Step(i, count), 0.5) for i in range(count)]
    assert given == [pytest.approx((density,)) for density in expected]


def test_noise_level_decides_where_it_is_known() -> None:
    schedule = Schedule(dense_above=0.9)
    given = [schedule.densities(Step(i, 3, noise), 0.5)[0] for i, noise in enumerate((1, 0.9, 0.8))]
    assert given == [1, 1, 0.5]
    assert not schedule.knows(Step(0, 3))
    assert schedule.densities(Step(0, 3), 0.5) == (0.5,)


@pytest.mark.parametrize(
    ("schedule", "density"),
    [
        (Schedule(dense_first=2), 0.5),
        (Schedule(dense_first=2, without_steps=0.2), 0.8),
        (Schedule(steps=[0.0, 0.3, 0.9]), 0.6),
        (Schedule(ramp=(0.2, 0.6)), 0.6),
    ],
    ids=str,
)
def test_without_a_step(schedule: Schedule, density: float) -> None:
    assert schedule.densities(None, 0.5) == pytest.approx((density,))
    policy = pisa.Policy(sparsity=0.5, schedule=schedule)
    assert policy.steady_sparsity == pytest.approx(1 - density)


def test_one_number_stands_for_a_schedule_whatever_holds_without_steps() -> None:
    """Or a policy that is dense until a step is known would be taken for a dense one."""
    schedule = Schedule(dense_first=0.5, steps=[0.3, 0.9], without_steps=0.0)
    policy = pisa.Policy(sparsity=0.5, schedule=schedule)
    assert (policy.nominal_sparsity, policy.steady_sparsity) == (0.6, 0.0)
    assert policy.sparsity_at(Step(9, 10)) == 0.9
    assert policy.sparsity_at(Step(4, 10)) == 0.0


def test_a_count_needs_no_number_of_steps_and_a_fraction_does() -> None:
    assert Schedule(dense_first=2).densities(Step(1), 0.5) == (1.0,)
    assert Schedule(steps=[0.1, 0.2]).densities(Step(7), 0.5) == (0.8,)
    for schedule in (Schedule(dense_first=0.5), Schedule(dense_last=1), Schedule(ramp=(0, 0.5))):
        assert not schedule.knows(Step(0))
        assert schedule.knows(Step(0, 10))


def test_heads_in_a_list_and_their_mean() -> None:
    schedule = Schedule(steps=[0.0, (0.2, 0.8)])
    assert schedule.heads == 2
    assert schedule.densities(Step(0, 2), 0.5) == (1.0,)
    assert schedule.densities(Step(1, 2), 0.5) == pytest.approx((0.8, 0.2))
    assert schedule.densities(None, 0.5) == pytest.approx((0.9, 0.6))


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule(dense_first=0.25, dense_last=2, dense_above=0.9, without_steps=0.3),
        Schedule(dense_first=1, steps=[0.5, [0.25, 0.75]]),
        Schedule(dense_first=1.0, ramp=[0.1, 0.9]),
    ],
    ids=str,
)
def test_text_form_and_back(schedule: Schedule) -> None:
    loaded = Schedule.of(json.loads(json.dumps(schedule.fields())))
    assert loaded == schedule
    assert hash(loaded) == hash(schedule)
    assert isinstance(loaded.dense_first, type(schedule.dense_first))
    assert pisa.Policy(schedule=schedule.fields()).schedule == schedule


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dense_first": -1}, ValueError, "dense_first must be >= 0"),
        ({"dense_first": 1.5}, ValueError, r"dense_first must be in \[0, 1\], got 1.5"),
        ({"dense_last": True}, TypeError, "dense_last must be an int"),
        ({"dense_above": 2}, ValueError, r"dense_above must be in \[0, 1\]"),
        ({"steps": []}, TypeError, "steps must list a sparsity"),
        ({"steps": [0.5, 1.0]}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"steps": [0.5, []]}, TypeError, "sparsity must be a number"),
        ({"steps": [(0.1, 0.2), (0.1, 0.2, 0.3)]}, ValueError, r"numbers of heads: \[2, 3\]"),
        ({"ramp": (0.5,)}, TypeError, "ramp must be two sparsities"),
        ({"ramp": (0.1, 0.2), "steps": [0.1]}, ValueError, "either steps or a ramp"),
        ({"without_steps": "0.5"}, TypeError, "sparsity must be a number"),
    ],
    ids=str,
)
def test_bad_schedules_raise_when_built(
    fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Schedule(**fields)
    with pytest.raises(error, match=words):
        pisa.Policy(schedule=fields)


def test_other_values_are_no_schedule() -> None:
    with pytest.raises(TypeError, match="schedule must be a pisa.Schedule, got list"):
        pisa.Policy(schedule=[0.5])
    with pytest.raises(ValueError, match=r"no \['first'\]; its fields are"):
        pisa.Policy(schedule={"first": 3})


def test_an_inner_sparsity_keeps_the_dense_steps_of_an_outer_schedule() -> None:
    outer = pisa.Policy(schedule=Schedule(dense_first=3, ramp=(0.1, 0.2), without_steps=0.3))
    assert pisa.Policy(sparsity=0.9).over(outer).schedule == Schedule(dense_first=3)
    assert pisa.Policy(order="none").over(outer).schedule == outer.schedule
    assert pisa.Policy(schedule=Schedule()).over(outer).schedule == Schedule()
