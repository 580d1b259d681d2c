"""What the spool costs the thread that sends: a batch of 5,000 lines, by the clock on the wall.

The server is a function that takes everything, so what is left is Delivery's work and the disk's.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

from benchmarks.batcher import LINES
from benchmarks.table import Table, ratios, rotated
from celery_influx.counters import Counters
from celery_influx.delivery import Delivery
from celery_influx.errors import SendError
from celery_influx.report import Report
from celery_influx.spool import Spool


class Nobody:
    """A server that takes everything, or is away."""

    confirms = True
    address = "http://nobody"
    max_bytes, burst = 1_048_576, 1
    away = False

    def write(self, *_: bytes) -> int:
        """Take it at once."""
        if self.away:
            raise SendError("away", "ECONNREFUSED")
        return 0

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        """Nor is this."""


class Way:
    """A delivery with a spool of this kind."""

    def __init__(self, folder: Path, *, spools: bool = True, first: bool, fsync: bool) -> None:
        report, counters = Report(logging.getLogger(__name__)), Counters(1).row(0)
        report.warn = lambda *_, **__: None  # type: ignore[method-assign]
        spool = (
            Spool("b", "here", str(folder), 10**9, counters, report, fsync=fsync)
            if spools
            else None
        )
        self.server = Nobody()
        self.delivery = Delivery(
            "b", self.server, counters, report, retry_age=3_600, spool=spool, spool_first=first
        )
        self.delivery.open()

    def measure(self, size: int) -> float:
        """Milliseconds for a batch that the server takes."""
        began = time.perf_counter()
        for _ in range(size):
            self.delivery.deliver(LINES)
        return (time.perf_counter() - began) / size * 1e3


class Outage(Way):
    """The same while the server is away."""

    def measure(self, size: int) -> float:
        """Milliseconds for a batch that goes to disk."""
        self.server.away = True
        self.delivery.deliver(LINES)
        while not self.delivery.wait:
            self.delivery.catch_up()
        found = super().measure(size)
        self.catch_up(size)
        return found

    def catch_up(self, size: int) -> float:
        """Milliseconds for one that comes from there."""
        self.server.away = False
        self.delivery.hurry(at_once=True)
        began = time.perf_counter()
        while self.delivery.catch_up():
            pass
        return (time.perf_counter() - began) / (size + 1) * 1e3


class Return(Outage):
    """The way back from the disk."""

    def measure(self, size: int) -> float:
        """Milliseconds for a batch that comes from disk."""
        self.server.away = True
        self.delivery.deliver(LINES)
        for _ in range(size):
            self.delivery.deliver(LINES)
        return self.catch_up(size)


def run(rounds: int = 20, size: int = 10) -> None:
    """Measure and print; ``size`` batches per variant and round."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        place = Path(folder)
        ways = {
            "no spool": Way(place / "0", spools=False, first=False, fsync=False),
            "failed": Way(place / "1", first=False, fsync=False),
            "always": Way(place / "2", first=True, fsync=False),
            "always, fsync": Way(place / "3", first=True, fsync=True),
            "outage": Outage(place / "4", first=False, fsync=False),
            "outage, fsync": Outage(place / "5", first=False, fsync=True),
            "catching up": Return(place / "6", first=False, fsync=False),
        }
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name in rotated(list(ways), turn):
                figures[name].append(ways[name].measure(size))
        for way in ways.values():
            way.delivery.close()
    table = Table("`spool`: a batch of 5,000 lines, 650 kB", "ms", "this / no spool")
    for name, found in figures.items():
        table.add(name, found[1:], ratios(found[1:], figures["no spool"][1:]))
    table.show()
