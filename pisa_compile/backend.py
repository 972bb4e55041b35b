"""The Dynamo backend: rewrite attention, then let Inductor compile the graph.

`torch.compile(model, backend="pisa")` finds `pisa` through the `torch_dynamo_backends` entry point;
nothing needs to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .options import CompileOptions, parse
from .passes import rewrite_attention
from .recording import recorded


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
        options: fields of `Policy`, "inner" ("inductor", "aot_eager" or "eager"), and options of
            Inductor.

    Raises:
        ValueError, TypeError: an option is unknown or has a bad value.
    """
    settings = parse(mode, options)
    decisions = rewrite_attention(gm, settings.policy)
    return recorded(compile_inner(gm, example_inputs, settings), decisions)


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileOptions
) -> Callable[..., Any]:
    """Compile a rewritten graph with the compiler that the options name."""
    compiled: Any
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
    return function
