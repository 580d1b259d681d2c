"""Half a million hostile points through ``send_data``; and the list of what is refused is what the code does."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.conformance.hostile import REFUSALS, SEED, report, sent

pytestmark = pytest.mark.once


def test_half_a_million_hostile_points_never_raise_and_never_break_a_neighbour() -> None:
    seeds = [SEED + number for number in range(10)]
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(2) as pool:
        for counts in pool.map(sent, [50_000] * 10, seeds):
            total += counts

    # A neighbour stands before and after every 16.
    assert total["points"] == 500_000 + 2 * 500_000 // 16
    assert total["points"] == total["lines"] + total["rejected"]
    assert total["rejected"] > 20_000


def test_refusals_md_is_fresh() -> None:
    assert REFUSALS.read_text(encoding="utf-8") == report(), (
        "write it anew: python -m tests.conformance.hostile"
    )
