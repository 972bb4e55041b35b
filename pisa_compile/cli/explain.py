"""`pisa explain`: which attention of an importable model is replaced, and why the rest is not."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from ..ops.dispatch import UnsupportedError
from ..report.explain import explain as report_of_call
from .common.errors import UserError
from .common.importing import load
from .common.options import Model, Options, compile_options
from .common.output import print_json, print_report, report_as_data


def explain(
    model: Model,
    inputs: Annotated[
        str,
        typer.Option(
            "--inputs",
            "-i",
            metavar="MODULE:NAME",
            help="A function without arguments that gives what the model is called with: a tensor, "
            "a tuple of arguments, or a dict of keyword arguments.",
        ),
    ],
    *,
    option: Options = [],
    every_site: Annotated[
        bool, typer.Option("--every-site", help="A line for each site, with shapes and FLOPs.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if no attention is replaced.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a model once and list its attention: what is replaced, and why the rest is not.

    Nothing is compiled by Inductor, so it takes little longer than one call of the model.

    Examples:

        pisa explain mymodel:build --inputs mymodel:example

        pisa explain mymodel.py:build -i mymodel.py:example -o min_tokens=0 --every-site
    """
    options = compile_options(option)
    module, arguments, keywords = model_of(model), *_inputs(inputs)
    compiled: Any = torch.compile(module, backend="pisa", options={**options, "inner": "eager"})
    try:
        report = report_of_call(compiled, *arguments, **keywords)
    except UnsupportedError as error:
        raise UserError(str(error)) from error
    if as_json:
        print_json(report_as_data(report))
    else:
        print_report(report, Console(), every_site=every_site)
    if strict and not report.replaced:
        raise typer.Exit(1)


def model_of(target: str) -> nn.Module:
    found = load(target, "the model")
    if callable(found) and not isinstance(found, nn.Module):
        found = found()
    if not isinstance(found, nn.Module):
        raise UserError(f"{target} gives {_described(found)}, not a torch.nn.Module")
    return found.eval()


def _inputs(target: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = load(target, "--inputs")
    if callable(found):
        found = found()
    if isinstance(found, dict):
        return (), found
    if isinstance(found, (tuple, list)):
        return tuple(found), {}
    if isinstance(found, torch.Tensor):
        return (found,), {}
    raise UserError(f"{target} gives {_described(found)}, not a tensor, a tuple or a dict")


def _described(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
