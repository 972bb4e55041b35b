"""Regions of `torch.compiler.nested_compile_region` that blocks with different policies share.

Dynamo traces such a region once and calls the one graph for every block that looks the same to it.
Policies attached outside of the region, to the blocks, do not show in it: only the calls carry
them. So calls under different policies get graphs of their own here, before the rewrite, and every
call gets decisions that name its own modules.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ...policies.annotation import policy_keys
from ..graph.copies import copied
from ..graph.fake import is_tensor
from ..sites.decision import Decision

_CALL = torch.ops.higher_order.invoke_subgraph
# Operators whose operands stand at the end of their arguments, where there is room for more.
OPEN_CALLS = (_CALL, torch.ops.higher_order.tag_activation_checkpoint)


def separate(gm: fx.GraphModule) -> None:
    """Give the calls of a shared region a graph for each set of policies around them."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=_CALL):
        calls[str(node.args[0].target)].append(node)
    for name, nodes in calls.items():
        # Dynamo traced the body under the policies around its first call.
        traced = policy_keys(nodes[0])
        groups: dict[tuple[str, ...], list[fx.Node]] = defaultdict(list)
        for node in nodes:
            groups[policy_keys(node)].append(node)
        for number, (around, members) in enumerate(groups.items()):
            if around != traced:
                suffix = f"policy_{number}"
                body = gm.get_submodule(name)
                assert isinstance(body, fx.GraphModule)
                region = copied(body, suffix)
                _exchange(region, traced, around)
                gm.add_submodule(f"{name}_{suffix}", region)
                _redirect(members, f"{name}_{suffix}", suffix)


def common_operands(
    gm: fx.GraphModule, body: fx.Node, child: fx.GraphModule
) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """Operands that all calls of a child graph share: `(last call, operand, input of child)`."""
    bodies = gm.graph.find_nodes(op="get_attr", target=body.target)
    calls = sorted({call for node in bodies for call in node.users})
    inputs = child.graph.find_nodes(op="placeholder")
    given: list[tuple[fx.Node, ...]] = []
    for call in calls:
        # What stands before the operands differs: a predicate, bodies, identifiers.
        nodes = [x for x in tree_leaves(call.args) if isinstance(x, fx.Node)]
        given.append(tuple(nodes[len(nodes) - len(inputs) :]))
    if not given or any(len(operands) != len(inputs) for operands in given):
        return []
    return [
        (calls[-1], operands[0], input_)
        for input_, *operands in zip(inputs, *given, strict=True)
        if len(set(operands)) == 1 and is_tensor(operands[0])
    ]


def closed_region(body: fx.Node) -> str | None:
    """The operator, if any, that calls a child graph and takes no more operands."""
    return next((str(call.target) for call in body.users if call.target not in OPEN_CALLS), None)


def as_called(decision: Decision, around: tuple[tuple[str, str], ...]) -> Decision:
    """A decision taken in a shared graph, under the modules `around` one of its calls.

    The graph knows the modules of the call that it was traced for. What is inside of them has the
    same place in the others, and no identity there that the trace would tell.
    """
    traced = decision.modules[: len(around)]
    if traced == around or len(traced) < len(around):
        return decision
    old, new = traced[-1][1], around[-1][1]
    inside = tuple(("", new + path[len(old) :]) for _, path in decision.modules[len(around) :])
    modules = (*around, *inside)
    return replace(decision, modules=modules, module=modules[-1][1])


def _redirect(calls: list[fx.Node], name: str, suffix: str) -> None:
    for call in calls:
        body, identifier, *operands = call.args
        with call.graph.inserting_before(call):
            other = call.graph.get_attr(name)
        other.meta["nn_module_stack"] = call.meta.get("nn_module_stack")
        # The identifier is what later stages take a region for the same by.
        call.args = (other, f"{identifier}_{suffix}", *operands)
        if isinstance(body, fx.Node) and not body.users:
            call.graph.erase_node(body)


def _exchange(gm: fx.GraphModule, traced: tuple[str, ...], around: tuple[str, ...]) -> None:
    """In a graph and those inside, take the policies `around` it for those it was traced under."""
    for module in gm.modules():
        nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
        for node in nodes:
            if policy_keys(node)[: len(traced)] == traced and "custom" in node.meta:
                custom = node.meta["custom"]
                rest = {key: value for key, value in custom.items() if key not in traced}
                node.meta["custom"] = dict.fromkeys(around, "") | rest
