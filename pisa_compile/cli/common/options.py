"""Arguments that several subcommands take, and `--option name=value` as compile options."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ...options import parse
from .errors import UserError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="A module, or a function without arguments that makes one; `file.py:name` too.",
    ),
]
Options = Annotated[
    list[str],
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="An option of the compile call, such as `sparsity=0.9`, `min_tokens=0` or "
        "`exact=(512, 0)`. May be repeated.",
        show_default=False,
    ),
]


def compile_options(texts: Sequence[str]) -> dict[str, Any]:
    """The options as `torch.compile(..., options=...)` takes them.

    Raises:
        UserError: not `name=value`, or not an option, or a bad value.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--option takes name=value, such as sparsity=0.9, got {text!r}")
        options[name.strip()] = _value(value.strip())
    try:
        parse(None, options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--option: {error}") from error
    return options


def _value(text: str) -> Any:
    """A Python literal where it is one, the text itself where it is not."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
