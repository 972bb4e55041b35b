"""The list of subcommands. A new one is a file with a function, and a line here."""

from __future__ import annotations

import typer

from . import bench, calibrate, doctor, explain
from .script import command as run

app = typer.Typer(
    help="Piecewise sparse attention for diffusion transformers.",
    epilog="Start with `pisa doctor`, then `pisa run script.py`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a script's traceback is its own
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)
app.command("doctor")(doctor.doctor)
app.command("explain")(explain.explain)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
