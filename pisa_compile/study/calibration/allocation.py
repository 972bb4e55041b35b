"""Which density for which item, so that the total error is least for what all may cost together.

An item is one head of one site at one step. It takes one of a few densities, each with a cost and
an error. This is the multiple-choice knapsack problem; with thousands of small items, its
Lagrangian relaxation is as good as exact: at a price per unit of cost every item chooses alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100


def allocate(error: Tensor, cost: Tensor, budget: float) -> Tensor:
    """The choice of every item with the least total error within the budget.

    Args:
        error, cost: [items, choices], float64, >= 0.
        budget: total cost that may not be exceeded.

    Returns:
        Index of each item's choice, [items].

    Raises:
        ValueError: even the cheapest choices cost more than the budget.
    """
    cheapest = cost.amin(1).sum()
    if float(cheapest) > budget * (1 + 1e-9):
        raise ValueError(
            f"the cheapest densities cost {float(cheapest):.4g}, more than the budget of "
            f"{budget:.4g}; ask for less speed or allow lower densities"
        )
    low, high = 0.0, 1.0
    while float(_cost(cost, _choice(error, cost, high)).sum()) > budget * (1 + 1e-9):
        high *= 4.0
        if high > 1e300:
            break
    if float(_cost(cost, _choice(error, cost, 0.0)).sum()) <= budget:
        return _choice(error, cost, 0.0)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if float(_cost(cost, _choice(error, cost, middle)).sum()) > budget:
            low = middle
        else:
            high = middle
    return _spend_rest(error, cost, _choice(error, cost, high), budget)


def allocate_error(error: Tensor, cost: Tensor, allowed: float) -> Tensor:
    """The choice of every item with the least total cost within a total error; as `allocate`.

    Raises:
        ValueError: even the most accurate choices have more error than is allowed.
    """
    least = float(error.amin(1).sum())
    if least > allowed * (1 + 1e-9):
        raise ValueError(
            f"the highest densities leave an error of {least:.4g}, more than the allowed "
            f"{allowed:.4g}; allow a larger error"
        )
    return allocate(cost, error, allowed)


def _choice(error: Tensor, cost: Tensor, price: float) -> Tensor:
    return (error + price * cost).argmin(1)


def _cost(cost: Tensor, choice: Tensor) -> Tensor:
    return cost.gather(1, choice[:, None])[:, 0]


def _spend_rest(error: Tensor, cost: Tensor, choice: Tensor, budget: float) -> Tensor:
    """Spend what the common price left over, on the item that gains most per cost, and so on."""
    choice = choice.clone()
    left = budget - float(_cost(cost, choice).sum())
    extra = cost - _cost(cost, choice)[:, None]
    gain = _cost(error, choice)[:, None] - error
    worth = torch.where((extra > 0) & (gain > 0), gain / extra.clamp(min=1e-300), 0.0)
    for flat in worth.flatten().argsort(descending=True).tolist():
        item, option = divmod(flat, cost.shape[1])
        if float(worth[item, option]) <= 0.0:
            break
        more = float(cost[item, option] - cost[item, choice[item]])
        better = float(error[item, choice[item]] - error[item, option])
        if 0.0 < more <= left and better > 0.0:
            left -= more
            choice[item] = option
    return choice
