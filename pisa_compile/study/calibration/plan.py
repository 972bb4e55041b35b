"""What can be chosen, what it costs and what it spoils; and the choice as policies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import cost
from ...kernels.params import AttentionParams
from ...kernels.testing import relative_l2
from ...ops.observation import densities_from
from ...policies.policy import DENSE, Policy
from ...policies.schedule import Schedule
from ...report.names import ModuleNames
from ...steps.clock import current_step
from .allocation import allocate, allocate_error
from .errors import ErrorTable, SiteErrors, measuring
from .progress import Progress
from .runner import Runner
from .sensitivity import fit_factors, step_groups

_PROBE = 0.15  # density of the generations that sensitivity is measured with
_GROUPS = 6


def measured(
    run: Runner, inputs: Sequence[Any], choices: tuple[float, ...], bar: Progress
) -> tuple[ErrorTable, list[Tensor]]:
    table = ErrorTable(choices)
    with measuring(table, run.model, run.base):
        results = [run(input_) for input_ in bar.track(inputs, "measuring attention")]
    if not table.sites:
        raise RuntimeError(
            "no attention of the model could be measured: pisa.explain(model, ...) says why; sites "
            "with a policy of their own, and models that are compiled already, are left alone"
        )
    return table, results


@dataclass
class Plan:
    """Errors and costs of every item, a head of a site at a step, for every choice.

    The last choice is dense. Items are ordered by site, step and head.
    """

    table: ErrorTable
    per_head: bool
    names: list[str]
    error: Tensor  # [items, choices + 1], squared relative error of the site's whole output
    weight: Tensor  # [items]
    cost: Tensor  # [items, choices + 1], seconds, or FLOPs where nothing could be timed
    site: Tensor  # [items]
    step: Tensor  # [items]

    @classmethod
    def of(cls, table: ErrorTable, per_head: bool) -> Plan:
        errors, costs, sites, steps = [], [], [], []
        for number, site in enumerate(table.sites.values()):
            heads = site.work.heads
            seconds = _seconds(site, (*table.densities, 1.0))
            for step in sorted(site.error):
                error = site.relative(step)  # [choices, H]
                error = torch.cat([error, error.new_zeros(1, heads)]).T  # [H, choices + 1]
                spent = (seconds * site.calls[step] / heads).expand(heads, -1)
                if not per_head:
                    error, spent = error.sum(0, keepdim=True), spent.sum(0, keepdim=True)
                errors.append(error)
                costs.append(spent)
                sites += [number] * len(error)
                steps += [step] * len(error)
        error = torch.cat(errors)
        return cls(
            table=table,
            per_head=per_head,
            names=list(table.sites),
            error=error,
            weight=torch.ones(len(error), dtype=torch.float64),
            cost=torch.cat(costs),
            site=torch.tensor(sites),
            step=torch.tensor(steps),
        )

    def weigh(self, run: Runner, input_: Any, dense: Tensor, bar: Progress) -> None:
        """Set the weights from generations in which a part of the model was sparse."""
        steps = self.table.steps
        groups = step_groups(steps, _GROUPS)
        names = ModuleNames(run.model)

        def squared_error(site: str | None, group: int | None) -> float:
            def density(decision: Any, params: AttentionParams) -> Tensor | None:
                now = current_step()
                index = 0 if now is None else now.index
                mine = site in (None, names.of(decision))
                mine = mine and group in (None, int(groups[min(index, steps - 1)]))
                return torch.tensor(_PROBE if mine else 1.0, device=run_device)

            with densities_from(density):
                return relative_l2(run(input_), dense) ** 2

        run_device = next(iter(self.table.sites.values())).device
        count = int(groups.max()) + 1
        task = [(name, None) for name in self.names]
        others: list[tuple[None, int]] = [(None, group) for group in range(count)]
        found = [squared_error(*which) for which in bar.track([*task, *others], "sensitivity")]
        probe = min(
            range(len(self.table.densities)), key=lambda i: abs(self.table.densities[i] - _PROBE)
        )
        error = torch.zeros(len(self.names), steps, dtype=torch.float64)
        error.index_put_((self.site, self.step), self.error[:, probe], accumulate=True)
        a, b = fit_factors(error, groups, found[: len(task)], found[len(task) :])
        self.weight = a[self.site] * b[groups[self.step]]

    def solve(
        self, *, sparsity: float | None, speedup: float | None, max_error: float | None
    ) -> Tensor:
        """Choice of every item, [items]."""
        weighted = self.weight[:, None] * self.error
        if max_error is not None:
            return allocate_error(weighted, self.cost, max_error**2)
        if speedup is not None:
            budget = self.dense_seconds / speedup
        else:
            assert sparsity is not None
            budget = self._uniform_cost(sparsity)
        return allocate(weighted, self.cost, budget)

    def _uniform_cost(self, sparsity: float) -> float:
        return sum(
            float(_seconds(site, (1.0 - sparsity,))) * sum(site.calls.values())
            for site in self.table.sites.values()
        )

    @property
    def dense_seconds(self) -> float:
        return sum(
            _dense_seconds(site) * sum(site.calls.values()) for site in self.table.sites.values()
        )

    def uniform_sparsity(self, chosen: Tensor) -> float:
        """The one sparsity that costs as much in all places, by bisection."""
        low, high, spent = 0.0, 0.999, self.seconds(chosen)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._uniform_cost(middle) > spent else (low, middle)
        return high

    def seconds(self, chosen: Tensor) -> float:
        return float(self.cost.gather(1, chosen[:, None]).sum())

    def predicted_error(self, chosen: Tensor) -> float:
        error = self.error.gather(1, chosen[:, None])[:, 0]
        return float((self.weight * error).sum() ** 0.5)

    def _densities(self, chosen: Tensor) -> Tensor:
        return torch.tensor([*self.table.densities, 1.0])[chosen]

    def mean_density(self, chosen: Tensor) -> float:
        return float(self._densities(chosen).mean())

    def by_site_and_step(self, chosen: Tensor) -> dict[str, list[float]]:
        densities = self._densities(chosen)
        return {
            name: [
                float(densities[(self.site == number) & (self.step == step)].mean())
                for step in self._known_steps(name)
            ]
            for number, name in enumerate(self.names)
        }

    def _known_steps(self, name: str) -> list[int]:
        """For every step the one whose choice holds: itself, or another where the site did not run.

        A cache may skip a site. Then the choice of the last step before holds, or of the first.
        """
        ran = sorted(self.table.sites[name].error)
        return [ran[max(0, bisect_right(ran, step) - 1)] for step in range(self.table.steps)]

    def policies(self, chosen: Tensor, base: Policy) -> dict[str, Policy]:
        densities = self._densities(chosen)
        found = {}
        for number, name in enumerate(self.names):
            entries = []
            for step in self._known_steps(name):
                own = densities[(self.site == number) & (self.step == step)].tolist()
                sparsities = [round(1.0 - density, 6) for density in own]
                entries.append(sparsities[0] if len(set(sparsities)) == 1 else sparsities)
            found[name] = _site_policy(entries, base)
        return found


def _site_policy(entries: list[float | list[float]], base: Policy) -> Policy:
    if all(entry == entries[0] for entry in entries) and isinstance(entries[0], float):
        return DENSE if entries[0] == 0.0 else replace(base, sparsity=entries[0])
    return replace(base, schedule=Schedule(steps=tuple(entries)))  # type: ignore[arg-type]


def _seconds(site: SiteErrors, densities: Sequence[float]) -> Tensor:
    """Predicted time of one call at each density. [densities]"""
    works = [
        replace(site.work, settings=replace(site.work.settings, sparsity=1.0 - density))
        for density in densities
    ]
    profile = _profile(site)
    if profile is None:
        times = [sum(cost.model.sparse_terms(work)[1:3]) for work in works]
    else:
        times = [profile.sparse_seconds(work) for work in works]
    return torch.tensor(times, dtype=torch.float64)


def _dense_seconds(site: SiteErrors) -> float:
    profile = _profile(site)
    if profile is None:
        return cost.model.dense_terms(site.work)[1]
    return profile.dense_seconds(site.work)


def _profile(site: SiteErrors) -> cost.Profile | None:
    return cost.profile_of(site.device, site.dtype, site.work.head_dim, site.work.value_dim)
