"""Fuzz the passes with random spellings of attention.

python -m tests.passes.fuzz --cases 10000 --seed 0
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from .programs import program
from .run import Outcome, outcome, shrunk


def fuzz(
    first: int, cases: int, inner: str = "eager"
) -> tuple[Counter[tuple[str, str]], list[int]]:
    """Counts by family and kind of outcome, and the seeds that failed."""
    counts: Counter[tuple[str, str]] = Counter()
    failed = []
    for seed in range(first, first + cases):
        drawn = program(seed)
        found = outcome(drawn, inner)
        counts[drawn.family, _kind(found)] += 1
        if found.failure is not None:
            failed.append(seed)
    return counts, failed


def report(seed: int, inner: str = "eager") -> str:
    """A failing program, made small, as text that runs."""
    small = shrunk(program(seed), inner)
    return f"seed {seed}: {outcome(small, inner).failure}\n{small.choices}\n{small.source()}"


def _kind(found: Outcome) -> str:
    if not found.valid:
        return "invalid"
    if found.failure is not None:
        return "failed"
    if found.replaced:
        return "replaced"
    return "refused" if found.found else "no attention"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    arguments = parser.parse_args()
    counts, failed = fuzz(arguments.seed, arguments.cases, arguments.inner)
    kinds = ("replaced", "refused", "no attention", "invalid", "failed")
    print(f"{'':16}" + "".join(f"{kind:>14}" for kind in kinds))
    for family in sorted({family for family, _ in counts}):
        print(f"{family:16}" + "".join(f"{counts[family, kind]:14}" for kind in kinds))
    for seed in failed:
        print("\n" + report(seed, arguments.inner))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
