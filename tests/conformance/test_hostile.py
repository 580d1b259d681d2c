"""Hostile points through ``send_data``; and the list of what is refused is what the code does."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.conformance.hostile import REFUSALS, SEED, report, sent

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    "portions",
    [
        pytest.param(1, id="10,000"),
        # More than the usual two minutes, where another works on the machine.
        pytest.param(50, id="half a million", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_hostile_points_never_raise_and_never_break_a_neighbour(portions: int) -> None:
    count, seeds = 10_000 * portions, [SEED + number for number in range(portions)]
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(2) as pool:
        for counts in pool.map(sent, [10_000] * portions, seeds):
            total += counts

    # A neighbour stands before and after every 16.
    assert total["points"] == count + 2 * count // 16
    assert total["points"] == total["lines"] + total["rejected"]
    assert total["rejected"] > count // 25


def test_refusals_md_is_fresh() -> None:
    assert REFUSALS.read_text(encoding="utf-8") == report(), (
        "write it anew: python -m tests.conformance.hostile"
    )
