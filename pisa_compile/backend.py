"""The Dynamo backend: rewrite attention, then let Inductor compile the graph.

`torch.compile(model, backend="pisa")` finds `pisa` through the `torch_dynamo_backends` entry point;
nothing needs to be imported.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from .caller import tokens_of_caller, traced_module
from .compiled import KeepingTangents, Stepwise, Variant
from .options import CompileOptions, parse
from .passes import (
    Context,
    PassError,
    Rewritten,
    reads_caller,
    refuse_dense,
    rewritten,
    untouched,
)
from .policies.presets import Presets, class_names

log = logging.getLogger("pisa_compile")


def pisa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Replace the attention of a Dynamo graph by piecewise sparse attention and compile it.

    Args:
        gm: the traced graph; it stays as it is.
        example_inputs: its inputs, fake or real.
        mode: an Inductor mode such as "reduce-overhead".
        options: fields of `Policy`, "policy" (a policy file, or policies by module name), "preset"
            ("auto", None or the name of a model class), "strict" (True makes it an error where
            attention stays dense for no choice of the user's), "inner" ("inductor", "aot_eager" or
            "eager"), and options of Inductor.

    Raises:
        ValueError, TypeError: an option is unknown or has a bad value.
        UnsupportedError, PolicyError: a policy asks for what cannot be done.
    """
    settings = parse(mode, options)
    context = _context(settings, traced_module())
    try:
        sparse = rewritten(gm, context, "input")
        has_dense_steps = sparse.density is not None and sparse.density.has_dense_steps
        dense = rewritten(gm, context, "dense") if has_dense_steps else None
    except PassError as error:
        if settings.strict:
            raise
        return _compiled(untouched(gm), example_inputs, settings, _tell(str(error)))
    if settings.strict:
        refuse_dense(sparse.decisions, pisa)
    compiled: Callable[..., Any] = _compiled(sparse, example_inputs, settings)
    if sparse.density is not None:
        at_dense_steps = None if dense is None else _compiled(dense, example_inputs, settings)
        compiled = Stepwise(compiled, at_dense_steps, sparse.density)
    replaced = any(decision.replaced for decision in sparse.decisions)
    return KeepingTangents(compiled, gm.forward) if replaced else compiled


def _context(settings: CompileOptions, module: nn.Module | None) -> Context:
    """What sites are judged by, for a compiled `module` that is known or not."""
    _check_names(settings, module)
    presets = Presets(settings.preset, () if module is None else class_names(type(module)))
    return Context(settings.policy, settings.named, presets, tokens_of_caller())


def _check_names(settings: CompileOptions, module: nn.Module | None) -> None:
    """Policies by name in the options must not be lost because a part of the model is compiled."""
    if not settings.named or module is None:
        return
    names = [name for name, _ in module.named_modules()]
    if not any(fnmatch.filter(names, pattern) for pattern in settings.named):
        raise ValueError(
            f"option 'policy' names modules like {next(iter(settings.named))!r}, and the compiled "
            f"{type(module).__name__} has none of them; where the blocks of a model are compiled, "
            "use pisa.set_policy(model, pisa.load_policy(path)) instead"
        )


def _compiled(
    sparse: Rewritten,
    example_inputs: Sequence[Any],
    settings: CompileOptions,
    note: str | None = None,
) -> Variant:
    compiled = compile_inner(sparse.graph, [*example_inputs, *sparse.inputs], settings)
    follows = reads_caller(sparse.graph)
    patterns = tuple(settings.named)
    return Variant(compiled, sparse.decisions, sparse.numbers, follows, note, patterns)


@functools.cache
def _tell(error: str) -> str:
    """What a user reads of a fault of ours, in the log once."""
    text = (
        f"pisa_compile left a graph as it was, so its attention stays dense, after {error}. Please "
        "report this with the model; strict=True raises it with its traceback"
    )
    log.warning("%s", text)
    return text


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileOptions
) -> Callable[..., Any]:
    """Compile a rewritten graph with the compiler that the options name."""
    compiled: Any
    if settings.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        # Settings go along as patches of this call; Inductor's global configuration stays as is.
        compiled = compile_fx(gm, example_inputs, config_patches=settings.inductor)
    else:
        from torch._dynamo import lookup_backend

        compiled = lookup_backend(settings.inner)(gm, list(example_inputs))
    function: Callable[..., Any] = compiled
    return function
