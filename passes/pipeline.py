"""The ordered list of rewrites, and the walk over a graph that applies them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..kernels.dispatch import UnsupportedError
from ..ops.token_order import NO_CALLER, CallerTokens
from ..policies.annotation import erase_marks, policies_around, policy_keys
from ..policies.policy import Policy, named_policies, resolve
from ..policies.presets import Presets, class_names
from .graph.fake import example, four_sizes, sizes
from .judge.eligibility import is_expected
from .match.external import ExternalKernel
from .match.flex import FlexAttention
from .match.grouped import without_copies
from .match.written import HandWrittenAttention
from .match.opaque import expand, inline, inputs_of, is_opaque
from .match.sdpa import ScaledDotProductAttention
from .match.spelling import AttentionRewrite, GraphFacts
from .replace.regions import as_called, closed_region, common_operands, separate
from .sites.decision import Decision
from .sites.modules import module_stack, place_of
from .sites.site import AttentionSite, NearMiss
from .tokens.plan import plan_tokens

log = logging.getLogger("pisa_compile")

NO_PRESETS = Presets(name=None)
Scheduling = Literal["input", "dense", "steady"]

REWRITES: tuple[AttentionRewrite, ...] = (
    ScaledDotProductAttention(),
    HandWrittenAttention(),
    FlexAttention(),
    ExternalKernel(),
)


def rewrite_attention(
    gm: fx.GraphModule,
    options: Policy,
    *,
    inference: bool = False,
    caller: CallerTokens = NO_CALLER,
    presets: Presets = NO_PRESETS,
    named: Mapping[str, Policy] | None = None,
    scheduled: Scheduling = "steady",
) -> list[Decision]:
    """Replace every eligible attention of a graph, in place, and of the graphs inside it.

    Args:
        gm: a graph with fake-tensor metadata, from Dynamo, export or make_fx.
        options: the policy of the compile call, for sites without one of their own.
        inference: whether gradients are out of the question, as in an exported program.
        caller: what the call of the model that is being compiled says about its tokens.
        presets: where settings come from that neither policies nor options name.
        named: policies by module name or pattern; those on modules go before them.
        scheduled: what becomes of sites whose schedule varies. "input": their ops are marked for
            `add_density_input`; "dense": they stay as they are; "steady": they get the sparsity for
            no known step.

    Returns:
        A decision for every attention that was found, in graph order. A graph that is called
        several times gives its decisions once per call, each under the modules of that call.
    """
    walk = _Walk(options, caller, presets, named or {}, scheduled)
    decisions = walk.graph(gm, GraphFacts.of(gm.graph, False if inference else None))
    _log_summary(decisions)
    return decisions


def has_schedules(gm: fx.GraphModule, options: Policy, presets: Presets) -> bool:
    """Whether any site of a graph that has not been rewritten may have a schedule."""
    if options.schedule is not None:
        return True
    nodes = [node for child in _graphs(gm) for node in child.graph.nodes]
    if any('"schedule"' in key for node in nodes for key in policy_keys(node)):
        return True
    stacks = {id(stack): stack for node in nodes if (stack := node.meta.get("nn_module_stack"))}
    classes = {cls for stack in stacks.values() for _, cls in stack.values()}
    return presets.may_schedule({class_names(cls) for cls in classes})


class _Walk:
    """One walk over a graph and the graphs inside it."""

    def __init__(
        self,
        options: Policy,
        caller: CallerTokens,
        presets: Presets,
        named: Mapping[str, Policy],
        scheduled: Scheduling,
    ) -> None:
        self.options = options
        self.caller = caller
        self.presets = presets
        self.named = named
        self.scheduled: Scheduling = scheduled
        self.closed: str | None = None  # the operator whose body cannot take another input
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
                    inner.tokens.origins.hand_down(source, input_)
                outside, self.closed = self.closed, self.closed or closed_region(node)
                self.done[id(child)] = self.graph(child, inner)
                self.closed = outside
            around = module_stack(node)
            return [as_called(decision, around) for decision in self.done[id(child)]]
        if is_opaque(node):
            return self.opaque(node, facts)
        for rewrite in REWRITES:
            site = rewrite.match(node, facts)
            if site is not None:
                return [self.apply(rewrite, site, facts)]
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
            inner.tokens.origins.hand_down(source, input_)
        decisions = self.graph(expanded, inner)
        if any(decision.replaced for decision in decisions):
            inline(node, expanded)
        return decisions

    def apply(
        self, rewrite: AttentionRewrite, site: AttentionSite | NearMiss, facts: GraphFacts
    ) -> Decision:
        policy, remark = self.policy(site)
        notes: tuple[str, ...] = ()
        if isinstance(site, NearMiss):
            reason: str | None = site.reason
        elif remark is not None and not policy.enabled:
            reason = remark
        else:
            site = without_copies(site, facts.writes)
            reason = rewrite.check(site, policy, facts) or self.schedule_refusal(site, policy)
            if reason is None:
                plan = plan_tokens(site, policy, facts.tokens, self.caller)
                policy, notes = plan.policy, (*plan.notes, *([remark] if remark else []))
        decision = _decision(site, policy, reason, notes)
        if isinstance(site, AttentionSite) and reason is None:
            rewrite.rewrite(site, plan, facts)
        log.debug(
            "%s %s: %s (%s)",
            decision.module or "attention",
            list(decision.query_shape),
            "replaced" if decision.replaced else "stays dense",
            decision.policy if decision.replaced else decision.reason,
        )
        return decision

    def policy(self, site: AttentionSite | NearMiss) -> tuple[Policy, str | None]:
        """The policy of a site, and what a user should know of the preset in it."""
        shape = () if isinstance(site, NearMiss) else sizes(site.query.example())
        place = place_of(site.node, shape[1] if len(shape) == 4 else None)
        preset, remark = self.presets.choose(place)
        paths = [path for _, path in module_stack(site.node)]
        around = [*named_policies(self.named, paths), *policies_around(site.node)]
        policy = resolve(around, self.options, preset)
        if around or not self.options.enabled:
            remark = None  # the user's own word on this layer
        if self.scheduled == "steady" and policy.varying is not None:
            policy = policy.without_schedule()
        return policy, remark

    def schedule_refusal(self, site: AttentionSite, policy: Policy) -> str | None:
        """Why the schedule of a site that could be replaced keeps it dense, or None."""
        schedule = policy.varying
        if schedule is None:
            return None
        heads = sizes(site.query.example())[-3]
        if schedule.heads not in (None, heads):
            raise UnsupportedError(
                f"the schedule lists a sparsity for {schedule.heads} heads, this attention has "
                f"{heads}"
            )
        if self.closed is not None:
            return f"its schedule cannot reach into the body of `{self.closed}`"
        return "it is dense at this step of its schedule" if self.scheduled == "dense" else None


def _decision(
    site: AttentionSite | NearMiss, policy: Policy, reason: str | None, notes: tuple[str, ...]
) -> Decision:
    modules = module_stack(site.node)
    if isinstance(site, NearMiss):
        shapes = [four_sizes(example(x)) for x in (site.query, site.key, site.value)]
        if site.token_first:
            shapes = [(batch, heads, count, width) for batch, count, heads, width in shapes]
        result = example(site.query)
    else:
        shapes = [sizes(x.example()) for x in (site.query, site.key, site.value)]
        result = example(site.node)
    return Decision(
        module=modules[-1][1] if modules else "",
        modules=modules,
        query_shape=shapes[0],
        key_shape=shapes[1],
        value_shape=shapes[2],
        dtype=result.dtype,
        replaced=reason is None,
        reason=reason or "eligible",
        policy=policy,
        notes=notes,
        expected=reason is not None and is_expected(site, policy),
    )


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


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
