"""What numbers that are added to scores do to a softmax.

A row's softmax does not see what all its keys share, so only differences count: keys with the
highest number of their row take part, and the others must lie so far below that they have no
weight. A row of padding alone, all of it at a finite number, is therefore not empty. What dense
attention makes of it depends on how that number rounds the scores that it is added to:

- Next to 0, or to -10000 in float32, the scores survive (they are multiples of 0.001 afterwards),
  and the row is an ordinary softmax over all its keys.
- Next to -1e9 in float32, or to the lowest number of a data type, they do not: all keys weigh the
  same, and the row is the average of the values. (This is so while no score of the row exceeds half
  the distance of numbers there: 32 next to -1e9, 16 next to the lowest number of float16.)
- In between, as next to -10000 in float16, scores become multiples of 8: such masks are refused.

Scores that are *replaced* by a finite number are all equal in such a row, in any data type: an
average. Scores of -inf have no weight, and a row of them is the undefined 0 / 0. It gives zeros, as
from `F.scaled_dot_product_attention` with boolean and additive masks; a softmax that is written out
gives NaN there.

`F.scaled_dot_product_attention` adds masks in float32, or in float64 if its inputs are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from .domain import Values, spacing

NEGLIGIBLE = -4900.0
"""A key this far below another one of its row has no weight.

This is right while the scores of a row differ by less than 4,800, since e**-100 is nothing in
float32. Models use -10000, at times halved together with the scores, -1e9 and the lowest number of
a data type. What lies above, such as -100 or -1000, is a bias that large scores outweigh."""

# A distance of scores that a softmax hardly sees, and one that swallows them.
_FINE, _COARSE = 2.0**-7, 32.0


@dataclass(frozen=True)
class Levels:
    """Numbers that a mask adds, each far below the one before.

    Attributes:
        finite: from the highest down.
        removes: whether -inf is among them.
        averaged: the highest number next to which all keys of a row weigh the same, if any.
    """

    finite: tuple[float, ...]
    removes: bool
    averaged: float | None

    @property
    def is_plain(self) -> bool:
        """Whether they are 0, -inf or both: no row of finite numbers is padding alone."""
        return self.finite in ((), (0.0,)) and self.averaged is None


def levels_of(values: Values, dtype: torch.dtype) -> Levels | str:
    """The levels of a mask that adds `values` to scores of `dtype`, or why it does more."""
    finite = tuple(sorted(filter(math.isfinite, values), reverse=True))
    gaps = [low - high for high, low in itertools.pairwise(finite)]
    if math.inf in values or any(gap > NEGLIGIBLE for gap in gaps):
        added = sorted(value for value in values if value != 0.0)
        return f"its mask adds {added} to the logits; add -inf to remove a key"
    coarse = [value for value in finite if spacing(value, dtype) >= _COARSE]
    for value in finite:
        distance = spacing(value, dtype)
        if value > 0.0 and distance > _FINE:
            return (
                f"its mask adds {value:g} in {dtype} to keys that take part, which rounds their "
                "scores; add 0 to them, and -inf to the others"
            )
        if _FINE < distance < _COARSE:
            return (
                f"its mask adds {value:g} in {dtype}, which rounds the scores of a row without any "
                f"other key to multiples of {distance:g}; use a boolean mask or add -inf"
            )
    return Levels(finite, -math.inf in values, max(coarse, default=None))


def scores_dtype(added_in: torch.dtype | None, site: torch.dtype) -> torch.dtype:
    """What a mask is added in: in `added_in`, or in what SDPA computes in for inputs of `site`."""
    return added_in or torch.promote_types(site, torch.float32)
