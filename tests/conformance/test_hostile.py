"""Hostile points through ``send_data``; and the list of what is refused is what the code does."""

from __future__ import annotations

import pytest

from tests.conformance.hostile import REFUSALS, SEED, report, sent

pytestmark = pytest.mark.once


def test_hostile_points_never_raise_and_never_break_a_neighbour() -> None:
    """Half a million of them: ``tests/long``."""
    counts = sent(50_000, SEED)

    # A neighbour stands before and after every 16.
    assert counts["points"] == 50_000 + 2 * 50_000 // 16
    assert counts["points"] == counts["lines"] + counts["rejected"]
    assert counts["rejected"] > 2_000


def test_refusals_md_is_fresh() -> None:
    assert REFUSALS.read_text(encoding="utf-8") == report(), (
        "write it anew: python -m tests.conformance.hostile"
    )
