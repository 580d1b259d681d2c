"""Half a million hostile points through ``send_data`` of a database that is not strict."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.conformance.hostile import SEED, sent

pytestmark = pytest.mark.long


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
