"""The option "strict": attention that was to be sparse and stays dense is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...ops.dispatch import UnsupportedError
from ..sites.decision import Decision


def refuse_dense(decisions: Sequence[Decision], backend: Callable[..., Any]) -> None:
    """Raise if attention stays dense for a reason that nobody chose.

    Chosen is what a policy or a preset keeps dense, what is too short to gain, and cross-attention,
    which nearly every model has and sparsity is not meant for.

    Raises:
        UnsupportedError: names each such site and why it stays dense.
    """
    failed = [d for d in decisions if not d.replaced and not d.expected]
    if not failed:
        return
    lines = "".join(f"\n  {d.module or '(top level)'}: {d.reason}" for d in failed)
    error = UnsupportedError(
        f"strict=True, and {len(failed)} of {len(decisions)} attention sites stay dense:{lines}\n"
        "Where that is meant, give the module the policy pisa.DENSE."
    )
    raise _both_errors()(backend, error, None)


def _both_errors() -> type[Exception]:
    """A class that users catch as what the documents name, and that Dynamo does not wrap."""
    from torch._dynamo.exc import BackendCompilerFailed

    class StrictError(UnsupportedError, BackendCompilerFailed):
        pass

    return StrictError
