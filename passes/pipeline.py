"""The list of spellings, and the walk over a graph that judges every attention and acts on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..ops.dispatch import UnsupportedError
from ..ops.token_order import NO_CALLER, CallerTokens
from ..policies.annotation import erase_marks, policies_around
from ..policies.policy import Policy, PolicyError, named_policies, resolve
from ..policies.presets import Presets
from .graph.copies import copied
from .graph.fake import example, sizes
from .judge.eligibility import candidate_of, is_expected_near_miss
from .judge.rules import is_expected, refusal
from .masks.padding import Padding
from .match.external import ExternalKernel
from .match.flex import FlexAttention
from .match.grouped import without_copies
from .match.opaque import expand, inline, inputs_of, is_opaque, out_of_reach
from .match.sdpa import ScaledDotProductAttention
from .match.spelling import GraphFacts, Spelling
from .match.written import HandWrittenAttention
from .replace.density_input import DensityInput, add_density_input
from .replace.numbers import mark_body, number_ops
from .replace.regions import as_called, closed_region, common_operands, separate
from .replace.substitute import substitute
from .sites.decision import Decision, decision_on
from .sites.modules import module_stack, place_of
from .sites.site import AttentionSite, NearMiss
from .tokens.plan import TokenPlan, plan_tokens

log = logging.getLogger("pisa_compile")

NO_PRESETS = Presets(name=None)
Scheduling = Literal["input", "dense", "steady"]

SPELLINGS: tuple[Spelling, ...] = (
    ScaledDotProductAttention(),
    HandWrittenAttention(),
    FlexAttention(),
    ExternalKernel(),
)


@dataclass(frozen=True)
class Context:
    """What a site is judged by, besides itself.

    Attributes:
        options: the policy of the compile call, for sites without one of their own.
        named: policies by module name or pattern; those on modules go before them.
        presets: where settings come from that neither policies nor options name.
        caller: what the call of the model that is being compiled says about its tokens.
    """

    options: Policy
    named: Mapping[str, Policy]
    presets: Presets
    caller: CallerTokens


@dataclass(frozen=True)
class Judgement:
    """A decision, and what is needed to act on it where the site is replaced."""

    decision: Decision
    site: AttentionSite | None = None
    padding: Padding | None = None
    plan: TokenPlan | None = None


def rewrite_attention(
    gm: fx.GraphModule,
    options: Policy,
    *,
    named: Mapping[str, Policy] | None = None,
    presets: Presets = NO_PRESETS,
    caller: CallerTokens = NO_CALLER,
    inference: bool = False,
    scheduled: Scheduling = "steady",
) -> list[Decision]:
    """Replace every eligible attention of a graph, in place, and of the graphs inside it.

    Args:
        gm: a graph with fake-tensor metadata, from Dynamo, export or make_fx.
        options, named, presets, caller: as in `Context`.
        inference: whether gradients are out of the question, as in an exported program.
        scheduled: what becomes of sites whose schedule varies. "input": their ops are marked for
            `add_density_input`; "dense": they stay as they are; "steady": they get the sparsity for
            no known step.

    Returns:
        A decision for every attention that was found, in graph order. A graph that is called
        several times gives its decisions once per call, each under the modules of that call.
    """
    walk = _Walk(Context(options, named or {}, presets, caller), scheduled)
    decisions = walk.graph(gm, GraphFacts.of(gm.graph, False if inference else None))
    _log_summary(decisions)
    return decisions


@dataclass(frozen=True)
class Rewritten:
    """A graph of Dynamo's with sparse attention in it, and what it is told at every call.

    Attributes:
        graph: a copy; Dynamo's own stays as it is.
        decisions: as of `rewrite_attention`.
        density: the schedules of its ops, if any varies.
        numbers: a fake example of its last argument, the vector 0, 1, 2, ..., if it takes one.
    """

    graph: fx.GraphModule
    decisions: list[Decision]
    density: DensityInput | None = None
    numbers: Tensor | None = None

    @property
    def inputs(self) -> list[Tensor]:
        """Fake examples of the arguments after the graph's own."""
        table = None if self.density is None else self.density.table
        return [x for x in (table, self.numbers) if x is not None]


class PassError(RuntimeError):
    """A fault of ours: the passes met something that they should have known about."""


def rewritten(gm: fx.GraphModule, context: Context, scheduled: Scheduling) -> Rewritten:
    """Copy a graph, judge every attention in it, and replace those that may be sparse.

    Args:
        scheduled: as of `rewrite_attention`.

    Raises:
        UnsupportedError, PolicyError: a policy asks for what cannot be done.
        PassError: anything else went wrong; its cause tells. `gm` is as it was.
    """
    walk = _Walk(context, scheduled)
    try:
        graph = copied(gm, scheduled)
        decisions = walk.graph(graph, GraphFacts.of(graph.graph, None))
        result = Rewritten(graph, decisions, add_density_input(graph), number_ops(graph))
    except (UnsupportedError, PolicyError):
        raise
    except Exception as error:
        raise PassError(
            f"an unexpected error{walk.place}: {type(error).__name__}: {error}"
        ) from error
    _log_summary(decisions)
    return result


def untouched(gm: fx.GraphModule) -> Rewritten:
    """A graph with nothing replaced; only our own marks, which compute nothing, are erased."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            erase_marks(module.graph)
            module.recompile()
    return Rewritten(gm, [])


class _Walk:
    """One walk over a graph and the graphs inside it."""

    def __init__(self, context: Context, scheduled: Scheduling) -> None:
        self.context = context
        self.scheduled: Scheduling = scheduled
        self.closed: str | None = None  # the operator whose body cannot take another input
        self.done: dict[int, list[Decision]] = {}
        self.at: fx.Node | None = None  # for words about an error

    @property
    def place(self) -> str:
        """Where it is, in words that follow others."""
        if self.at is None:
            return ""
        modules = module_stack(self.at)
        return f" at {modules[-1][1] if modules else self.at.name}"

    def graph(self, gm: fx.GraphModule, facts: GraphFacts, first: int = 0) -> list[Decision]:
        """The decisions of a graph, of which `first` others come before in the one around it."""
        erase_marks(gm.graph)
        separate(gm)
        decisions: list[Decision] = []
        for node in list(gm.graph.nodes):
            if not node._erased:
                decisions += self.node(gm, node, facts, first + len(decisions))
        gm.graph.lint()
        gm.recompile()
        return decisions

    def node(
        self, gm: fx.GraphModule, node: fx.Node, facts: GraphFacts, number: int
    ) -> list[Decision]:
        # Checkpointing, nested compiled regions and control flow keep their bodies as children.
        if node.op == "get_attr" and isinstance(child := _attribute(gm, node), fx.GraphModule):
            return self.body(gm, node, child, facts, number)
        self.at = node
        if is_opaque(node):
            return self.opaque(node, facts, number)
        for spelling in SPELLINGS:
            found = spelling.match(node, facts)
            if found is not None:
                judgement = self.judge(found, facts)
                self.act(judgement, facts, number)
                return [judgement.decision]
        return []

    def body(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        child: fx.GraphModule,
        facts: GraphFacts,
        number: int,
    ) -> list[Decision]:
        if id(child) not in self.done:
            inner = GraphFacts.of(child.graph, facts.gradients)
            for call, source, input_ in common_operands(gm, node, child):
                facts.hand_down(source, call, inner, input_)
            outside, self.closed = self.closed, self.closed or closed_region(node)
            try:
                self.done[id(child)] = self.graph(child, inner)
            finally:
                self.closed = outside
        mark_body(node, number, len(self.done[id(child)]))
        around = module_stack(node)
        return [as_called(decision, around) for decision in self.done[id(child)]]

    def opaque(self, node: fx.Node, facts: GraphFacts, number: int) -> list[Decision]:
        if (near := out_of_reach(node)) is not None:
            return [self.judge(near, facts).decision]
        expanded = expand(node)
        if expanded is None:
            return []
        gradients = facts.gradients
        if gradients is None:  # the node's graph is traced without them
            outputs = tree_leaves(example(node))
            gradients = any(isinstance(x, Tensor) and x.requires_grad for x in outputs)
        inner = GraphFacts.of(expanded.graph, gradients)
        for input_, source in inputs_of(node, expanded):
            facts.hand_down(source, node, inner, input_)
        decisions = self.graph(expanded, inner, number)
        if any(decision.replaced for decision in decisions):
            inline(node, expanded)
        return decisions

    def judge(self, found: AttentionSite | NearMiss, facts: GraphFacts) -> Judgement:
        """What becomes of an attention. Changes nothing."""
        policy, remark = self.policy(found)
        conditional = self.closed is not None
        if isinstance(found, NearMiss):
            expected = is_expected_near_miss(found, policy)
            return Judgement(decision_on(found, policy, found.reason, expected, conditional))
        site: AttentionSite = found
        padding: Padding | str = Padding()
        if policy.enabled:
            site, padding = without_copies(site, facts.writes), facts.masks.padding(site)
        candidate = candidate_of(site, padding, facts.gradients)
        if remark is not None and not policy.enabled:
            reason: str | None = remark
        else:
            reason = refusal(candidate, policy) or self.schedule_refusal(site, policy)
        if reason is not None:
            expected = is_expected(candidate, policy)
            return Judgement(decision_on(site, policy, reason, expected, conditional))
        assert isinstance(padding, Padding)
        plan = plan_tokens(site, policy, facts.tokens, self.context.caller)
        notes = (*plan.notes, *([remark] if remark else []))
        decision = decision_on(site, plan.policy, None, False, conditional, notes)
        return Judgement(decision, site, padding, plan)

    def act(self, judgement: Judgement, facts: GraphFacts, number: int) -> None:
        """Put the op where an attention was, if it is to be replaced."""
        decision = judgement.decision
        if judgement.site is not None and judgement.plan is not None:
            assert judgement.padding is not None
            substitute(judgement.site, judgement.plan, judgement.padding, facts.tokens, number)
        log.debug(
            "%s %s: %s (%s)",
            decision.module or "attention",
            list(decision.query_shape),
            "replaced" if decision.replaced else "stays dense",
            decision.policy if decision.replaced else decision.reason,
        )

    def policy(self, found: AttentionSite | NearMiss) -> tuple[Policy, str | None]:
        """The policy of a site, and what a user should know of the preset in it."""
        context, node = self.context, found.node
        shape = () if isinstance(found, NearMiss) else sizes(found.query.example())
        preset, remark = context.presets.choose(
            place_of(node, shape[1] if len(shape) == 4 else None)
        )
        paths = [path for _, path in module_stack(node)]
        around = [*named_policies(context.named, paths), *policies_around(node)]
        policy = resolve(around, context.options, preset)
        if around or not context.options.enabled:
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
