"""The `pisa` command: one file per subcommand, listed in `app`.

Nothing here is imported by the package itself, and nothing but this file without the `cli` extra.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

_NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 for success, 1 where a check failed, 2 for a mistake in the arguments; `pisa run`
    exits as the script does.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"pisa: the command line needs {' and '.join(missing)}; "
            "pip install 'pisa-compile[cli]'\n"
        )
        sys.exit(2)
    from .app import app
    from .common.errors import UserError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="pisa")
    except UserError as error:
        sys.stderr.write(f"pisa: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # `pisa ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
