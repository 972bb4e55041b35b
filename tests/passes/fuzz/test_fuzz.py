"""Random spellings with random changes compute what they say, whatever the passes make of them."""

from __future__ import annotations

import pytest

from .__main__ import fuzz, report


@pytest.mark.parametrize(
    ("first", "cases", "inner"),
    [
        (0, 100, "eager"),
        (100, 100, "aot_eager"),
        pytest.param(1000, 10_000, "eager", marks=pytest.mark.slow),
    ],
)
def test_random_spellings_are_equal_to_eager(first: int, cases: int, inner: str) -> None:
    counts, failed = fuzz(first, cases, inner)
    assert not failed, "\n".join(report(seed, inner) for seed in failed[:5])
    # Else nothing is tested.
    kinds = {kind: sum(n for (_, k), n in counts.items() if k == kind) for _, kind in counts}
    assert kinds["replaced"] > cases / 5
    assert kinds.get("invalid", 0) < cases / 3
