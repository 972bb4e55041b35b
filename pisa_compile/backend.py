"""The Dynamo backend: rewrite attention, then let Inductor compile the graph.

`torch.compile(model, backend="pisa")` finds `pisa` through the `torch_dynamo_backends` entry point;
nothing needs to be imported.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from .caller import following_caller, tokens_of_caller
from .caller.module import traced_module
from .compiled import stepwise
from .options import CompileOptions, parse
from .passes import (
    add_density_input,
    copied,
    has_schedules,
    reads_caller,
    refuse_dense,
    rewrite_attention,
)
from .policies.presets import Presets, class_names
from .report.recording import recorded


def pisa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Replace the attention of a Dynamo graph by piecewise sparse attention and compile it.

    Args:
        gm: the traced graph; it is rewritten in place.
        example_inputs: its inputs, fake or real.
        mode: an Inductor mode such as "reduce-overhead".
        options: fields of `Policy`, "policy" (a policy file, or policies by module name), "preset"
            ("auto", None or the name of a model class), "strict" (True makes it an error where
            attention stays dense for no choice of the user's), "inner" ("inductor", "aot_eager" or
            "eager"), and options of Inductor.

    Raises:
        ValueError, TypeError: an option is unknown or has a bad value.
        UnsupportedError: a policy asks for what cannot be done.
    """
    settings = parse(mode, options)
    module = traced_module()
    _check_names(settings, module)
    presets = Presets(settings.preset, () if module is None else class_names(type(module)))
    # A schedule may want a dense variant too, and an input that Dynamo must not see on its graph.
    scheduled = any(policy.schedule is not None for policy in settings.named.values())
    scheduled = scheduled or has_schedules(gm, settings.policy, presets)
    graph = copied(gm) if scheduled else gm
    caller = tokens_of_caller()
    decisions = rewrite_attention(
        graph,
        settings.policy,
        caller=caller,
        presets=presets,
        named=settings.named,
        scheduled="input",
    )
    if settings.strict:
        refuse_dense(decisions, pisa)
    density = add_density_input(graph)
    if density is None:
        return recorded(compile_inner(graph, example_inputs, settings), decisions)
    inputs, dense = list(example_inputs), None
    if any(row.schedule.has_dense_steps for row in density.rows):
        kept = rewrite_attention(
            gm,
            settings.policy,
            caller=caller,
            presets=presets,
            named=settings.named,
            scheduled="dense",
        )
        dense = recorded(compile_inner(gm, example_inputs, settings), kept)
    if density.table is not None:
        inputs.append(density.table)
    sparse = recorded(compile_inner(graph, inputs, settings), decisions)
    return stepwise(sparse, dense, density.rows, density.width, density.device)


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


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileOptions
) -> Callable[..., Any]:
    """Compile a rewritten graph with the compiler that the options name."""
    compiled: Any
    follows = reads_caller(gm)
    if settings.inner == "eager":
        compiled = gm.forward
    elif settings.inner == "aot_eager":
        from functorch.compile import aot_module_simplified, make_boxed_func

        def boxed(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return make_boxed_func(graph.forward)

        compiled = aot_module_simplified(gm, example_inputs, fw_compiler=boxed)
    else:
        from torch._inductor.compile_fx import compile_fx

        # Settings go along as patches of this call; Inductor's global configuration stays as is.
        compiled = compile_fx(gm, example_inputs, config_patches=settings.inductor)
    function: Callable[..., Any] = compiled
    return following_caller(function) if follows else function
