"""`pisa run`: somebody's script, with `torch.compile`'s default backend replaced."""

from __future__ import annotations

import builtins
import io
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ...backend import pisa
from ...report.explain import report_of
from ...report.recording import tally
from ..common.errors import UserError
from ..common.options import Options, compile_options
from ..common.output import print_report, report_as_data
from .pipelines import followed_steps

_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def run(
    target: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="A script, or with `-m` a module.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS...", help="The script's own arguments.")
    ] = None,
    *,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="Run a module, as `python -m` does.")
    ] = False,
    compile_transformers: Annotated[
        bool,
        typer.Option(
            "--compile-transformers",
            help="Also compile transformers of diffusers that the script leaves eager.",
        ),
    ] = False,
    option: Options = [],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report as JSON.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no report.")] = False,
) -> None:
    """Run a script with `pisa` as the default backend of `torch.compile`.

    Calls that name a backend are left alone. Arguments, exit code, traceback and `__main__` are
    those of `python SCRIPT`. The report goes to standard error when the script ends.

    Examples:

        pisa run generate.py --prompt "a red fox"

        pisa run --compile-transformers -o sparsity=0.9 generate.py

        torchrun --nproc-per-node 2 -m pisa_compile run generate.py
    """
    options = compile_options(option)
    if module:
        execute: Callable[[], object] = _module(target)
    else:
        execute = _script(target)
    sys.argv = [target if module else str(target), *(arguments or [])]
    eager: Any = nullcontext()
    if compile_transformers:
        from .transformers import compiled_on_first_call

        eager = compiled_on_first_call()
    with tally() as counted, default_backend(DefaultBackend(options)), followed_steps(), eager:
        code = _exit_code(execute)
    report = report_of(counted)
    if json_file is not None:
        json_file.write_text(json.dumps(report_as_data(report), indent=1) + "\n")
    if not quiet and os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        console = Console(stderr=True)
        print_report(report, console)
        if not report.graphs:
            console.print(_why_nothing_ran(compile_transformers), highlight=False)
    raise SystemExit(code)


class DefaultBackend:
    """`backend="pisa"` with options of the command line below those of each compile call."""

    __name__ = "pisa"

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __call__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        merged = {**self.options, **(options or {})}
        return pisa(gm, example_inputs, mode=mode, options=merged)


@contextmanager
def default_backend(backend: Callable[..., Any]) -> Iterator[None]:
    """Make `torch.compile(model)` without a `backend` mean this one."""
    if hasattr(torch.compiler, "set_default_backend"):
        before = torch.compiler.get_default_backend()
        torch.compiler.set_default_backend(backend)
        try:
            yield
        finally:
            torch.compiler.set_default_backend(before)
        return
    # Up to torch 2.12 the default is that of the keyword argument. All references to the function
    # see a change there, those that other modules imported included.
    defaults: Any = torch.compile.__kwdefaults__
    before = defaults["backend"]
    defaults["backend"] = backend
    try:
        yield
    finally:
        defaults["backend"] = before


def _script(target: str) -> Callable[[], object]:
    """What `python target` does, ready to be called.

    Not `runpy.run_path`: it takes `__main__` away again when the code returns, while functions that
    run at exit and threads may still need it.
    """
    path = os.path.abspath(target)
    if os.path.isdir(path):
        raise UserError(f"{target!r} is a folder; give a script, or a module with -m")
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"can't open {target!r}: {error.strerror}") from error
    main = ModuleType("__main__")
    main.__dict__.update(
        __builtins__=builtins,
        __file__=path,
        __loader__=SourceFileLoader("__main__", path),
        __package__=None,
        __cached__=None,
        __annotations__={},
    )

    def execute() -> None:
        _search_first(os.path.dirname(os.path.realpath(path)))
        sys.modules["__main__"] = main
        code: CodeType = compile(source, path, "exec", dont_inherit=True)
        exec(code, main.__dict__)

    return execute


def _module(name: str) -> Callable[[], object]:
    def execute() -> None:
        _search_first(os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return execute


def _search_first(folder: str) -> None:
    """The first entry of the search path is that of the script, not of this command."""
    if getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = folder


def _exit_code(execute: Callable[[], object]) -> int | str | None:
    """Run it; what `sys.exit` was told, or 1 after an exception, whose traceback is printed."""
    try:
        execute()
    except SystemExit as exit:
        code: int | str | None = exit.code
        return code
    except BaseException as error:
        sys.stdout.flush()
        traceback = _own_part(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _own_part(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback from the script's first line on, without our frames and those of runpy."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return traceback
        traceback = traceback.tb_next
    return None


def _why_nothing_ran(compile_transformers: bool) -> str:
    others = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if others:
        return f"{others} graphs were compiled by another backend that the script names."
    if compile_transformers:
        return "The script called no transformer of diffusers, and torch.compile nowhere."
    return "The script did not run code from torch.compile; try --compile-transformers."
