"""The list of subcommands. A new one is a file with a function, and a line here."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, calibrate, doctor, explain
from .script import command as script

app = typer.Typer(
    help="Piecewise sparse attention for diffusion transformers.",
    epilog="Start with `pisa doctor`, then `pisa run script.py`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a script's traceback is its own
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pisa-compile {__version__}")
        raise typer.Exit


@app.callback()
def _general(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command("run", context_settings={"allow_interspersed_args": False})(script.run)
app.command("doctor")(doctor.doctor)
app.command("explain")(explain.explain)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
