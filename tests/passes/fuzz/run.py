"""Running a program eagerly and compiled, and making a failing one small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .programs import CHOICES, Program

OPTIONS = {"sparsity": 0.0, "min_tokens": 1, "block_size": 16, "preset": None}
# Next to -10000, float32 scores are multiples of 0.001; next to -1e9, float64 ones of 1e-7.
TOLERANCE = {"float32": 2e-3, "float64": 1e-6}


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        failure: what is wrong, or None.
        valid: whether it runs eagerly and gives the same in plain `torch.compile`; nothing is asked
            of others.
        found, replaced: attention in it.
    """

    failure: str | None = None
    valid: bool = True
    found: int = 0
    replaced: int = 0


def outcome(program: Program, inner: str = "eager") -> Outcome:
    """Compare a program under the backend with itself, arguments that it writes to included."""
    inputs = program.inputs()
    tolerance = TOLERANCE[program.choices["dtype"]]
    try:
        expected = _run(program.function(), inputs)
        torch._dynamo.reset()
        plain = _run(torch.compile(program.function(), backend=inner, fullgraph=True), inputs)
    except Exception:
        return Outcome(valid=False)
    if _difference(plain, expected, tolerance) is not None:
        return Outcome(valid=False)  # of torch itself, such as writes through inactive dropout
    torch._dynamo.reset()
    compiled = torch.compile(
        program.function(), backend="pisa", fullgraph=True, options={**OPTIONS, "inner": inner}
    )
    try:
        with _recording() as active:
            given = _run(compiled, inputs)
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    replaced = sum(decision.replaced for decision in active.decisions)
    failure = _difference(given, expected, tolerance)
    return Outcome(failure, True, len(active.decisions), replaced)


def shrunk(program: Program, inner: str = "eager") -> Program:
    """A program without what the failure does not need."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(program):
            if outcome(candidate, inner).failure is not None:
                program, smaller = candidate, True
                break
    return program


def _simpler(program: Program) -> Iterator[Program]:
    for index in range(len(program.mutations)):
        yield program.without(index)
    for name, options in CHOICES.items():
        if program.choices[name] != options[0]:
            yield program.with_choice(name, options[0])


def _run(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Results, and the arguments after the call."""
    given = [x.clone() for x in inputs]
    with torch.no_grad():
        out, tail = function(*given)
    return [out, torch.as_tensor(tail), *given]


def _difference(given: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    names = ("result", "tail", "q", "k", "v", "m")
    for name, a, b in zip(names, given, expected, strict=True):
        a, b = a.double(), b.double()
        if a.shape != b.shape:
            return f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if not bool(b.isfinite().all()):
            continue  # rows without a key, or overflow: nothing is promised
        error, scale = float((a - b).norm()), float(b.norm())
        if not error <= tolerance * max(scale, 1e-3):
            return f"{name} is off by {error / max(scale, 1e-300):.1e} of its norm"
    return None


def _recording() -> Any:
    try:
        from pisa_compile.report.recording import recording
    except ImportError:  # before the package had rooms
        from pisa_compile.recording import recording
    return recording()
