"""What a user got wrong, told in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the arguments. `main` prints its text and exits with 2."""
