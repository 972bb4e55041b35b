"""Trace a function as the backend would, rewrite it, and look at the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pisa_compile.passes import Decision, rewrite_attention
from pisa_compile.policies.policy import Policy

SPARSITY_ZERO = Policy(sparsity=0.0, min_tokens=0, impl="reference")
OPS = (torch.ops.pisa.attention.default,)


@dataclass
class Rewritten:
    """What became of a function: decisions, graphs after the rewrite, and its output."""

    decisions: list[Decision] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    output: Any = None
    expected: Any = None

    @property
    def ops(self) -> list[fx.Node]:
        """The nodes that run our op, those in child graphs included."""
        return [node for graph in self.graphs for node in _all_nodes(graph) if node.target in OPS]

    @property
    def reasons(self) -> list[str]:
        return [decision.reason for decision in self.decisions if not decision.replaced]

    @property
    def error(self) -> float:
        """Largest difference to eager, relative to the largest value; NaN is infinitely far."""
        pairs = zip(_tensors(self.output), _tensors(self.expected), strict=True)
        return max(_error(out, expected) for out, expected in pairs)


def rewrite(
    function: Callable[..., Any],
    *inputs: Any,
    policy: Policy = SPARSITY_ZERO,
    dynamic: bool | None = None,
    dynamic_dims: tuple[int, ...] = (),
    fullgraph: bool = True,
    grad: bool = False,
) -> Rewritten:
    """Run `function` in eager mode and rewritten."""
    result = Rewritten()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        result.decisions += rewrite_attention(gm, policy)
        result.graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    with torch.set_grad_enabled(grad):
        result.expected = function(*_copies(inputs))
        copies = _copies(inputs)
        for tensor in copies if dynamic_dims else ():
            torch._dynamo.maybe_mark_dynamic(tensor, dynamic_dims)
        result.output = compiled(*copies)
    return result


def check_metadata(gm: fx.GraphModule, *inputs: Any) -> None:
    """Run a graph and compare the shape, strides and dtype of every node with its metadata."""

    class Checker(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            fake = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(value, Tensor) and isinstance(fake, Tensor):
                assert value.shape == fake.shape, node.format_node()
                assert value.dtype == fake.dtype, node.format_node()
                assert value.stride() == fake.stride(), node.format_node()
            return value

    with torch.no_grad():
        Checker(gm).run(*inputs)


def _all_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return [node for module in modules for node in module.graph.nodes]


def _copies(inputs: Any) -> list[Any]:
    # In-place code must not see what another run left.
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [x for x in output if x is not None]


def _error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    error = (out.double() - expected.double()).abs().max()
    return float(error / expected.double().abs().max()) if error.isfinite() else float("inf")
