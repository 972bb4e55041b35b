"""How much an error at a site and a step matters to the final result.

The squared relative error of the result is taken to be a sum over sites and steps,
`sum of a[site] * b[step] * e[site, step]`, with e the squared relative error of the attention
itself. The factors are fitted to whole generations in which only one site, or only one group of
steps, was sparse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 200


def fit_factors(
    error: Tensor, groups: Tensor, by_site: Sequence[float], by_group: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The factors of sites and of groups of steps that explain measured errors of the result.

    Args:
        error: [sites, steps], squared relative error of the attention in those generations.
        groups: group number of each step, [steps].
        by_site: squared relative error of the result with one site sparse, for each.
        by_group: the same with one group of steps sparse.

    Returns:
        a [sites] and b [groups], by alternating fits; both kinds of measurement count the same.
    """
    count = int(groups.max()) + 1
    grouped = torch.zeros(error.shape[0], count, dtype=torch.float64)
    grouped.index_add_(1, groups, error.double())
    wanted_site = torch.tensor(by_site, dtype=torch.float64)
    wanted_group = torch.tensor(by_group, dtype=torch.float64)
    # The two sets of runs do not quite agree, for errors interact; only proportions are compared.
    wanted_group = wanted_group * (wanted_site.sum() / wanted_group.sum().clamp(min=1e-300))
    a = torch.ones(error.shape[0], dtype=torch.float64)
    b = torch.ones(count, dtype=torch.float64)
    for _ in range(_ROUNDS):
        a = a * (wanted_site / (grouped @ b * a).clamp(min=1e-300))
        b = b * (wanted_group / (a @ grouped * b).clamp(min=1e-300))
    return a, b


def step_groups(steps: int, count: int) -> Tensor:
    """Contiguous groups of about equal size: the number of the group of each step."""
    return torch.arange(steps) * min(count, steps) // steps
