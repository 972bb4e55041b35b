"""The ordered list of rewrites, and the walk over a graph that applies them."""

from __future__ import annotations

import logging
from collections import Counter

from torch import fx

from ..annotation import policies_around
from ..policy import Policy, resolve
from .rewrite import AttentionRewrite
from .sdpa import ScaledDotProductAttention
from .site import AttentionSite, Decision, example, module_stack, sizes

log = logging.getLogger("pisa_compile")

REWRITES: tuple[AttentionRewrite, ...] = (ScaledDotProductAttention(),)


def rewrite_attention(gm: fx.GraphModule, options: Policy) -> list[Decision]:
    """Replace every eligible attention of a graph, in place, and of the graphs inside it.

    Args:
        gm: a Dynamo graph with fake-tensor metadata.
        options: the policy of the compile call, for sites without one of their own.

    Returns:
        A decision for every attention that was found, in graph order.
    """
    decisions = _rewrite_graph(gm, options)
    _log_summary(decisions)
    return decisions


def _rewrite_graph(gm: fx.GraphModule, options: Policy) -> list[Decision]:
    decisions = []
    for node in list(gm.graph.nodes):
        # Checkpointing, nested compiled regions and control flow keep their bodies as children.
        if node.op == "get_attr" and isinstance(child := _attribute(gm, node), fx.GraphModule):
            decisions += _rewrite_graph(child, options)
        for rewrite in REWRITES:
            site = rewrite.match(node)
            if site is not None:
                decisions.append(_apply(rewrite, site, options))
                break
    if any(decision.replaced for decision in decisions):
        gm.graph.lint()
        gm.recompile()
    return decisions


def _apply(rewrite: AttentionRewrite, site: AttentionSite, options: Policy) -> Decision:
    policy = resolve(policies_around(site.node), options)
    modules = module_stack(site.node)
    query, key, value = example(site.query), example(site.key), example(site.value)
    reason = rewrite.check(site, policy)
    decision = Decision(
        module=modules[-1][1] if modules else "",
        modules=modules,
        query_shape=sizes(query),
        key_shape=sizes(key),
        value_shape=sizes(value),
        dtype=example(site.node).dtype,
        replaced=reason is None,
        reason=reason or "eligible",
        policy=policy,
    )
    if reason is None:
        rewrite.rewrite(site, policy)
    log.debug(
        "%s %s: %s (%s)",
        decision.module or "attention",
        list(decision.query_shape),
        "replaced" if decision.replaced else "stays dense",
        decision.policy if decision.replaced else decision.reason,
    )
    return decision


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
