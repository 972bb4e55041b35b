"""Context parallelism, ring attention, tensor parallelism and FSDP2 on 2 and 4 gloo ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .launch import run_on_ranks

pytest.importorskip("diffusers")
from .scenarios import SCENARIOS


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """What went wrong on so many ranks, by scenario."""
    known: dict[int, dict[str, str]] = {}

    def of(ranks: int) -> dict[str, str]:
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            known[ranks] = run_on_ranks(ranks, "tests.distributed.scenarios", folder)
        return known[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_result_is_that_of_one_process(
    failures: Callable[[int], dict[str, str]], ranks: int, scenario: str
) -> None:
    assert not failures(ranks)[scenario], failures(ranks)[scenario]
