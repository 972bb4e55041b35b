"""Copies of Dynamo's graphs, to be rewritten."""

from __future__ import annotations

import torch
from torch import fx


def copied(
    gm: fx.GraphModule, name: str, done: dict[int, fx.GraphModule] | None = None
) -> fx.GraphModule:
    """A graph with nodes of its own, and so are the graphs inside; tensors are shared.

    Not `copy.deepcopy`, which would copy parameters that the graph holds, and lose what Dynamo has
    put on graph and inputs for later stages.

    Args:
        name: tells this copy from others of the same graph.
    """
    done = {} if done is None else done
    if id(gm) in done:
        return done[id(gm)]
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, nodes, return_output_node=True)
    assert isinstance(output, tuple)
    result, output_node = output
    graph.output(result).meta.update(output_node.meta)
    for old, new in nodes.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        if new.target is torch.ops.higher_order.invoke_subgraph:
            # By the identifier later stages take the bodies of two calls for the same.
            new.args = (new.args[0], f"{new.args[1]}_{name}", *new.args[2:])
    # Every graph module has a class of its own, made from that of its kind. Dynamo's kind writes
    # its code no sooner than somebody asks for it.
    kind: type[fx.GraphModule] = type(gm).__bases__[0]
    copy = done[id(gm)] = kind(gm, graph)
    copy.meta = dict(gm.meta)
    copy.shape_env = gm.shape_env
    for attribute, value in vars(gm).items():
        vars(copy).setdefault(attribute, value)
    for inside, child in list(copy.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copy, inside, copied(child, name, done))
    return copy
