"""What is known of numbers agrees with what torch computes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pisa_compile.passes.masks.domain import (
    BINARY,
    UNARY,
    Domain,
    Interval,
    changed,
    combined,
    fitted,
    rounded,
    spacing,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
FUNCTIONS = {
    "rsub": torch.rsub,
    "negative": torch.neg,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
numbers = st.sampled_from(
    [
        0.0,
        1.0,
        -1.0,
        2.0,
        3.0,
        0.5,
        -100.0,
        127.0,
        200.0,
        -10000.0,
        -65504.0,
        -1e9,
        -3e38,
        -math.inf,
    ]
)
dtypes = st.sampled_from(DTYPES)


def holds(domain: Domain, value: float) -> bool:
    if isinstance(domain, Interval):
        return domain.low <= value <= domain.high
    return value in domain


@settings(deadline=None)
@given(st.floats(allow_nan=False), st.sampled_from(FLOATS))
def test_rounding_is_that_of_torch(value: float, dtype: torch.dtype) -> None:
    assert rounded(value, dtype) == torch.tensor(value, dtype=torch.float64).to(dtype).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_spacing(dtype: torch.dtype) -> None:
    for value in (1.0, 5.0, -10000.0, torch.finfo(dtype).min):
        here = torch.tensor(value, dtype=dtype)
        below = torch.nextafter(here, torch.zeros_like(here)).double()
        # A power of two has closer neighbours on the side of zero.
        assert spacing(value, dtype) in ((here.double() - below).abs() * x for x in (1, 2))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(BINARY)), st.data())
def test_binary_operations_agree_with_torch(name: str, data: st.DataObject) -> None:
    dtype = data.draw(dtypes)
    sides: list[Domain] = []
    for _ in range(2):
        few = data.draw(st.sets(numbers, min_size=1, max_size=3))
        domain = fitted(frozenset(few), dtype)
        if domain is None:
            return
        ends = sorted(domain) if isinstance(domain, frozenset) else []
        if data.draw(st.booleans()) and math.isfinite(ends[0]) and dtype != torch.bool:
            domain = Interval(ends[0], ends[-1])
        sides.append(domain)
    values = [sorted(x) if isinstance(x, frozenset) else (x.low, x.high) for x in sides]
    function = FUNCTIONS.get(name) or getattr(torch, name)
    try:
        out = function(*(torch.zeros(1, dtype=dtype) for _ in sides)).dtype
    except (RuntimeError, ValueError):  # bool - bool
        return
    found = combined(name, *sides, out)
    if found is None:
        return
    for pair in itertools.product(*values):
        result = function(*(torch.tensor([x], dtype=dtype) for x in pair))
        assert holds(found, float(result)), (dtype, sides, pair)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(UNARY)), dtypes, st.sets(numbers, min_size=1, max_size=3))
def test_unary_operations_agree_with_torch(name: str, dtype: torch.dtype, few: set[float]) -> None:
    domain = fitted(frozenset(few), dtype)
    assert domain is None or isinstance(domain, frozenset)
    function = FUNCTIONS.get(name) or getattr(torch, name)
    if domain is None:
        return
    try:
        out = function(torch.zeros(1, dtype=dtype)).dtype
    except (RuntimeError, TypeError):
        return
    found = changed(name, domain, out)
    if found is None:
        return
    for value in domain:
        assert holds(found, float(function(torch.tensor([value], dtype=dtype))))


def test_logic_of_numbers_differs_from_that_of_their_bits() -> None:
    one, two = frozenset((1.0,)), frozenset((2.0,))
    assert combined("bitwise_and", one, two, torch.bool) == {1.0}  # logical_and
    assert combined("bitwise_and", one, two, torch.int64) == {0.0}
    assert changed("bitwise_not", one, torch.bool) == {0.0}
    assert changed("bitwise_not", one, torch.int64) == {-2.0}


def test_what_is_not_known() -> None:
    few = frozenset((0.0, 1.0))
    assert fitted(frozenset((math.nan,)), torch.float32) is None
    assert combined("mul", few, frozenset((math.inf,)), torch.float32) is None  # 0 * inf
    assert combined("div", few, few, torch.float32) is None
    assert combined("sub", few, few, torch.uint8) is None  # -1 wraps
    assert combined("mul", Interval(0, 200), Interval(0, 200), torch.int8) is None
    many = frozenset(map(float, range(20)))
    assert fitted(many, torch.int64) == Interval(0, 19)
    assert fitted(Interval(1, 5), torch.bool) == frozenset((1.0,))
    assert fitted(Interval(3, 3), torch.int64) == frozenset((3.0,))
