"""`pisa calibrate`: the densities that serve an importable model best, as a policy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..policies.policy import POLICY_FIELDS, Policy
from ..study.calibration import calibrate as calibration_of
from .common.errors import UserError
from .common.importing import load
from .common.options import Model, Options, compile_options
from .common.output import print_json
from .explain import model_of


def calibrate(
    model: Model,
    inputs: Annotated[
        str,
        typer.Option(
            "--inputs",
            "-i",
            metavar="MODULE:NAME",
            help="A list of inputs, or a function without arguments that gives one.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="The policy file to write.", dir_okay=False)
    ] = Path("pisa-policy.json"),
    *,
    generate: Annotated[
        str | None,
        typer.Option(
            "--generate",
            metavar="MODULE:NAME",
            help="A function (model, input) that returns the result of a whole generation.",
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", min=0, help="So many of the last inputs are for the check.")
    ] = 0,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Spend as much time as this one would.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="Attention this much faster than dense.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Relative L2 error of the result.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option(help="Measure how much sites and steps matter to the result.")
    ] = True,
    option: Options = [],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model's own attention and find the best density of each site, step and head.

    The file is for `torch.compile(..., options={"policy": "pisa-policy.json"})` and for
    `pisa.set_policy(model, pisa.load_policy("pisa-policy.json"))`.

    Examples:

        pisa calibrate mymodel:build -i mymodel:prompts --generate mymodel:sample --sparsity 0.85

        pisa calibrate mymodel.py:build -i mymodel.py:batches --max-error 0.02 --held-out 1
    """
    fields: dict[str, Any] = compile_options(option)
    if foreign := sorted(set(fields) - set(POLICY_FIELDS)):
        raise UserError(f"--option: calibration takes fields of a policy, not {foreign}")
    cases = load(inputs, "--inputs")
    cases = list(cases() if callable(cases) else cases)
    if len(cases) <= held_out:
        raise UserError(f"{inputs} gives {len(cases)} inputs, --held-out takes {held_out} of them")
    split = len(cases) - held_out
    try:
        found = calibration_of(
            model_of(model),
            cases[:split],
            generate=None if generate is None else load(generate, "--generate"),
            sparsity=sparsity,
            speedup=speedup,
            max_error=max_error,
            held_out=cases[split:],
            policy=Policy(**fields),
            sensitivity=sensitivity,
            show_progress=not as_json,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    found.save(output)
    if as_json:
        print_json({**found.about(), "densities": found.densities, "file": str(output)})
        return
    console = Console()
    console.print(str(found), highlight=False, soft_wrap=True)
    console.print(f"wrote {output}")
