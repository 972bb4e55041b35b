"""Numbers that the elements of a tensor may be: a few of them, or whatever lies between two bounds.

Arithmetic on such sets is that of torch: results are rounded to their data type, integers that
would wrap around are unknown, and so is NaN.
"""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

Values = frozenset[float]
MOST = 8
LONGEST = float(2**31)
"""No tensor dimension is longer: the bound of what counts along a symbolic one."""


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, neither of them infinite."""

    low: float
    high: float


Domain = Values | Interval

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "minimum": min,
    "maximum": max,
}
_LOGIC: dict[str, Callable[[bool, bool], bool]] = {
    "bitwise_and": lambda a, b: a and b,
    "bitwise_or": lambda a, b: a or b,
}
_BITS: dict[str, Callable[[int, int], int]] = {
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
}
_UNARY: dict[str, Callable[[float], float]] = {
    "negative": operator.neg,
    "abs": abs,
    "log": lambda a: math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan),
}
BINARY = frozenset({*_COMPARISONS, *_ARITHMETIC, *_LOGIC, "div"})
UNARY = frozenset({*_UNARY, "bitwise_not"})


def combined(name: str, first: Domain, second: Domain, dtype: torch.dtype) -> Domain | None:
    """What an operation of `BINARY` with a result of `dtype` makes of two operands."""
    if isinstance(first, frozenset) and isinstance(second, frozenset):
        return _each(name, first, second, dtype)
    one, other = _bounds(first), _bounds(second)
    if one is None or other is None:
        return None
    if name in _COMPARISONS:
        return _compared(name, one, other)
    if name not in _ARITHMETIC:
        return None
    corners = [
        _ARITHMETIC[name](a, b) for a in (one.low, one.high) for b in (other.low, other.high)
    ]
    return fitted(Interval(min(corners), max(corners)), dtype)


def changed(name: str, domain: Domain, dtype: torch.dtype) -> Domain | None:
    """What an operation of `UNARY` with a result of `dtype` makes of its operand."""
    if isinstance(domain, Interval):
        if name == "negative":
            return fitted(Interval(-domain.high, -domain.low), dtype)
        if name == "abs":
            ends = abs(domain.low), abs(domain.high)
            low = 0.0 if domain.low <= 0.0 <= domain.high else min(ends)
            return fitted(Interval(low, max(ends)), dtype)
        return None
    if name == "bitwise_not":
        logical = dtype == torch.bool
        return fitted(frozenset(float(not a) if logical else -1.0 - a for a in domain), dtype)
    return fitted(frozenset(map(_UNARY[name], domain)), dtype)


def fitted(domain: Domain, dtype: torch.dtype) -> Domain | None:
    """The numbers as elements of `dtype`; None if one is NaN or does not fit, or if there are more
    than are worth following."""
    if isinstance(domain, Interval):
        if domain.low == domain.high:
            return fitted(frozenset((domain.low,)), dtype)
        if dtype == torch.bool:
            holds_zero = domain.low <= 0.0 <= domain.high
            return frozenset((0.0, 1.0)) if holds_zero else frozenset((1.0,))
        ends = rounded(domain.low, dtype), rounded(domain.high, dtype)
        return Interval(*ends) if all(map(math.isfinite, ends)) else None
    numbers = frozenset(rounded(value, dtype) for value in domain)
    if any(map(math.isnan, numbers)):
        return None
    if len(numbers) > MOST:
        return _bounds(numbers)
    return numbers


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as an element of `dtype`; NaN if that is not certain."""
    if dtype == torch.bool:
        return math.nan if math.isnan(value) else float(bool(value))
    if not dtype.is_floating_point:
        if dtype.is_complex or not math.isfinite(value):
            return math.nan
        limits = torch.iinfo(dtype)
        whole = float(math.trunc(value))
        return whole if limits.min <= whole <= limits.max else math.nan
    if dtype == torch.float64 or not math.isfinite(value) or value == 0.0:
        return value
    if dtype == torch.bfloat16:
        return _in_bfloat16(value)
    code = {torch.float32: "<f", torch.float16: "<e"}.get(dtype)
    if code is None:
        return math.nan
    try:
        return float(struct.unpack(code, struct.pack(code, value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance between the numbers of `dtype` that have the magnitude of `value`."""
    _, exponent = math.frexp(value)
    return math.ldexp(torch.finfo(dtype).eps, exponent - 1)


def _in_bfloat16(value: float) -> float:
    single = rounded(value, torch.float32)
    if math.isinf(single):
        return single
    (bits,) = struct.unpack("<I", struct.pack("<f", single))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _each(name: str, first: Values, second: Values, dtype: torch.dtype) -> Domain | None:
    if name == "div":
        if 0.0 in second or not dtype.is_floating_point:
            return None
        function: Callable[[float, float], float] = operator.truediv
    elif name in _COMPARISONS:
        function = _COMPARISONS[name]
    elif name in _ARITHMETIC:
        function = _ARITHMETIC[name]
    elif dtype == torch.bool:
        logic = _LOGIC[name]

        def function(a: float, b: float) -> float:
            return logic(bool(a), bool(b))
    else:
        bits = _BITS[name]

        def function(a: float, b: float) -> float:
            return bits(int(a), int(b))

    return fitted(
        frozenset(float(function(a, b)) for a, b in itertools.product(first, second)), dtype
    )


def _compared(name: str, one: Interval, other: Interval) -> Values:
    """Which answers a comparison of any two numbers of the intervals can have."""
    apart = one.high < other.low or other.high < one.low
    if name in ("eq", "ne"):
        return frozenset((float(name == "ne"),)) if apart else frozenset((0.0, 1.0))
    if name in ("gt", "ge"):
        name, one, other = {"gt": "lt", "ge": "le"}[name], other, one
    below = _COMPARISONS[name]
    if below(one.high, other.low):
        return frozenset((1.0,))
    return frozenset((0.0, 1.0)) if below(one.low, other.high) else frozenset((0.0,))


def _bounds(domain: Domain) -> Interval | None:
    if isinstance(domain, Interval):
        return domain
    low, high = min(domain), max(domain)
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else None
