"""Leading a tensor from one more input of a graph to nodes in it and in the graphs inside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..graph.fake import example
from .regions import OPEN_CALLS


class Threading(ABC):
    """Leads one tensor through a graph. Subclasses say what reads it and what bodies get."""

    name: str

    def __init__(self) -> None:
        self._done: set[fx.GraphModule] = set()

    @abstractmethod
    def reads(self, node: fx.Node) -> bool:
        """Whether `node` reads the tensor."""

    @abstractmethod
    def read(self, node: fx.Node, given: fx.Node) -> None:
        """Let `node` read the tensor, which is `given` in its graph."""

    def operand(self, body: fx.Node, call: fx.Node, given: fx.Node) -> fx.Node:
        """What `call` passes to its `body`: the tensor itself, or a part of it."""
        return given

    def lead(self, gm: fx.GraphModule, tensor: Tensor) -> None:
        """Make `tensor`, a fake one, the last input of `gm`, and lead it to all that read it."""
        given = self._input(gm, tensor)
        for node in list(gm.graph.nodes):
            if self.reads(node):
                self.read(node, given)
            elif child := self._child(gm, node):
                body = node.args[0]
                assert isinstance(body, fx.Node)
                operand = self.operand(body, node, given)
                node.args = (*node.args, operand)
                if child not in self._done:
                    self._done.add(child)
                    self.lead(child, example(operand))
        gm.recompile()

    def _child(self, gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
        """The graph that `node` calls, if anything in it reads the tensor."""
        if node.target not in OPEN_CALLS:
            return None
        body = node.args[0]
        assert isinstance(body, fx.Node)
        child = gm.get_submodule(str(body.target))
        assert isinstance(child, fx.GraphModule)
        wanted = child in self._done or any(map(self.reads, nodes_of(child)))
        return child if wanted else None

    def _input(self, gm: fx.GraphModule, tensor: Tensor) -> fx.Node:
        inputs = gm.graph.find_nodes(op="placeholder")
        first = next(iter(gm.graph.nodes))
        place = gm.graph.inserting_after(inputs[-1]) if inputs else gm.graph.inserting_before(first)
        with place:
            node = gm.graph.placeholder(self.name)
        node.meta["example_value"] = tensor
        # AOTAutograd asks where in the user's frame an input comes from: from nowhere.
        node._dynamo_source = None
        return node


def nodes_of(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and of all graphs inside it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def empty_like_on(node: fx.Node, *shape: int, dtype: torch.dtype) -> Tensor:
    """A fake tensor on the device of what `node` computes."""
    value = example(node)
    with value.fake_mode:
        return torch.empty(*shape, dtype=dtype, device=value.device)
