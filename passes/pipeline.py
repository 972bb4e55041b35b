"""The ordered list of rewrites, and the walk over a graph that applies them."""

from __future__ import annotations

import logging
from collections import Counter

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..annotation import erase_marks, policies_around
from ..policy import Policy, resolve
from .fake import example, four_sizes, sizes
from .flex import FlexAttention
from .grouped import without_copies
from .handwritten import HandWrittenAttention
from .opaque import expand, inline, inputs_of, is_opaque
from .regions import common_operands, separate
from .rewrite import AttentionRewrite, GraphFacts
from .sdpa import ScaledDotProductAttention
from .site import AttentionSite, Decision, NearMiss, module_stack

log = logging.getLogger("pisa_compile")

REWRITES: tuple[AttentionRewrite, ...] = (
    ScaledDotProductAttention(),
    HandWrittenAttention(),
    FlexAttention(),
)


def rewrite_attention(
    gm: fx.GraphModule, options: Policy, *, inference: bool = False
) -> list[Decision]:
    """Replace every eligible attention of a graph, in place, and of the graphs inside it.

    Args:
        gm: a graph with fake-tensor metadata, from Dynamo, export or make_fx.
        options: the policy of the compile call, for sites without one of their own.
        inference: whether gradients are out of the question, as in an exported program.

    Returns:
        A decision for every attention that was found, in graph order. A graph that is called
        several times gives its decisions (the same objects) once per call.
    """
    decisions = _Walk(options).graph(gm, GraphFacts.of(gm.graph, False if inference else None))
    _log_summary(decisions)
    return decisions


class _Walk:
    """One walk over a graph and the graphs inside it."""

    def __init__(self, options: Policy) -> None:
        self.options = options
        self.done: dict[int, list[Decision]] = {}

    def graph(self, gm: fx.GraphModule, facts: GraphFacts) -> list[Decision]:
        erase_marks(gm.graph)
        separate(gm)
        decisions = []
        for node in list(gm.graph.nodes):
            if not node._erased:
                decisions += self.node(gm, node, facts)
        gm.graph.lint()
        gm.recompile()
        return decisions

    def node(self, gm: fx.GraphModule, node: fx.Node, facts: GraphFacts) -> list[Decision]:
        # Checkpointing, nested compiled regions and control flow keep their bodies as children.
        if node.op == "get_attr" and isinstance(child := _attribute(gm, node), fx.GraphModule):
            if id(child) not in self.done:
                inner = GraphFacts.of(child.graph, facts.gradients)
                for call, source, input_ in common_operands(gm, node, child):
                    facts.masks.hand_down(source, call, inner.masks, input_)
                self.done[id(child)] = self.graph(child, inner)
            return self.done[id(child)]
        if is_opaque(node):
            return self.opaque(node, facts)
        for rewrite in REWRITES:
            site = rewrite.match(node, facts)
            if site is not None:
                return [_apply(rewrite, site, self.options, facts)]
        return []

    def opaque(self, node: fx.Node, facts: GraphFacts) -> list[Decision]:
        expanded = expand(node)
        if expanded is None:
            return []
        gradients = facts.gradients
        if gradients is None:  # the node's graph is traced without them
            outputs = tree_leaves(example(node))
            gradients = any(isinstance(x, Tensor) and x.requires_grad for x in outputs)
        inner = GraphFacts.of(expanded.graph, gradients)
        for input_, source in inputs_of(node, expanded):
            facts.masks.hand_down(source, node, inner.masks, input_)
        decisions = self.graph(expanded, inner)
        if any(decision.replaced for decision in decisions):
            inline(node, expanded)
        return decisions


def _apply(
    rewrite: AttentionRewrite, site: AttentionSite | NearMiss, options: Policy, facts: GraphFacts
) -> Decision:
    policy = resolve(policies_around(site.node), options)
    if isinstance(site, AttentionSite):
        site = without_copies(site, facts.writes)
    reason = site.reason if isinstance(site, NearMiss) else rewrite.check(site, policy, facts)
    decision = _decision(site, policy, reason)
    if isinstance(site, AttentionSite) and reason is None:
        rewrite.rewrite(site, policy, facts)
    log.debug(
        "%s %s: %s (%s)",
        decision.module or "attention",
        list(decision.query_shape),
        "replaced" if decision.replaced else "stays dense",
        decision.policy if decision.replaced else decision.reason,
    )
    return decision


def _decision(site: AttentionSite | NearMiss, policy: Policy, reason: str | None) -> Decision:
    modules = module_stack(site.node)
    if isinstance(site, NearMiss):
        shapes = [four_sizes(example(x)) for x in (site.query, site.key, site.value)]
    else:
        shapes = [sizes(x.example()) for x in (site.query, site.key, site.value)]
    return Decision(
        module=modules[-1][1] if modules else "",
        modules=modules,
        query_shape=shapes[0],
        key_shape=shapes[1],
        value_shape=shapes[2],
        dtype=example(site.node).dtype,
        replaced=reason is None,
        reason=reason or "eligible",
        policy=policy,
    )


def _attribute(gm: fx.GraphModule, node: fx.Node) -> object:
    value: object = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _log_summary(decisions: list[Decision]) -> None:
    if not decisions:
        return
    kept = Counter(decision.reason for decision in decisions if not decision.replaced)
    reasons = "; ".join(f"{count} stay dense: {reason}" for reason, count in kept.items())
    log.info(
        "replaced %d of %d attention sites%s",
        len(decisions) - kept.total(),
        len(decisions),
        f" ({reasons})" if reasons else "",
    )
