"""No-op tasks through a real worker with the threads pool: what the plugin costs it."""

from __future__ import annotations

from benchmarks.worker import VARIANTS
from benchmarks.worker import run as run_pool


def run(rounds: int = 20, size: int = 1_000) -> None:
    """Measure and print; ``size`` tasks a round."""
    run_pool(rounds, size, pool="threads", variants=VARIANTS[:3])
