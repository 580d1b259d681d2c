"""Half a million hostile points; and the list of what is refused is what the code does."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.conformance.hostile import REFUSALS, SEED, outcomes, report


def test_half_a_million_hostile_points_raise_nothing_but_point_errors() -> None:
    seeds = [SEED + number for number in range(10)]
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(2) as pool:
        for counts in pool.map(outcomes, [50_000] * 10, seeds):
            total += counts

    assert total.total() == 500_000
    assert total["encoded"] > 300_000


def test_refusals_md_is_fresh() -> None:
    assert REFUSALS.read_text(encoding="utf-8") == report(), (
        "write it anew: python -m tests.conformance.hostile"
    )
