"""CPU time of a point from the buffer to the network: taken, joined and sent by the batcher.

All lines are in the buffer before the clock starts. A datagram on loopback is long, one on Ethernet
short; the kernel may cut the short ones out of one call's content (UDP_SEGMENT).
"""

from __future__ import annotations

import logging
import time

import celery_influx.line_protocol
from benchmarks.sink import Sink
from benchmarks.table import Table, ratios, rotated, verdict
from celery_influx.batcher import Batcher
from celery_influx.buffer import Buffer, make_buffer
from celery_influx.counters import Counters
from celery_influx.delivery import Delivery
from celery_influx.options import DatabaseOptions
from celery_influx.report import Report
from celery_influx.transports.udp import UDPPool

#: Lines of unequal length, 130 bytes in the middle.
LINES = [
    b"http_request,host=web-1,service=shop,path=/shop/%d,status=200 "
    b'duration=0.0%d,bytes=1234i,user="%s" 17640000000000%05d'
    % (number % 16, number, b"u" * (number % 40), number)
    for number in range(5_000)
]
BOUNDS = {"60,000 bytes": 0.2, "1,432 bytes": 0.5}


class Way:
    """A buffer, its batcher, and the pool that this sends by."""

    def __init__(
        self, port: int, size: int, *, cut: bool, kind: type[Buffer] = make_buffer
    ) -> None:
        options = DatabaseOptions(
            host="127.0.0.1", udp_port=port, datagram_bytes=size, bytes_per_second=10**9
        )
        pool = UDPPool(options)
        pool.may_cut = cut
        report, self.counters = Report(logging.getLogger(__name__)), Counters(1).row(0)
        self.buffer = kind(2 * len(LINES), 2 * sum(map(len, LINES)))
        self.batcher = Batcher(
            "benchmark",
            self.buffer,
            Delivery("benchmark", pool, self.counters, report),
            self.counters,
            report,
            batch_size=len(LINES),
            flush_interval=3_600,
        )

    def measure(self) -> float:
        """µs of CPU of a point."""
        self.buffer.put(LINES)
        began = time.process_time()
        if not self.batcher.flush(10):
            raise RuntimeError("not all lines were sent, so the figures are wrong")
        return (time.process_time() - began) / len(LINES) * 1e6


def run(rounds: int = 40, size: int = 20) -> None:
    """Measure and print; ``size`` times 5,000 lines per variant and round."""
    sink = Sink()
    sink.drain()
    ways = {
        "60,000 bytes": Way(sink.port, 60_000, cut=False),
        "1,432 bytes": Way(sink.port, 1_432, cut=True),
        "1,432 bytes, a call for each": Way(sink.port, 1_432, cut=False),
    }
    if celery_influx.line_protocol.implementation == "c":
        ways["60,000 bytes, Python only"] = Way(sink.port, 60_000, cut=False, kind=Buffer)
        ways["1,432 bytes, Python only"] = Way(sink.port, 1_432, cut=True, kind=Buffer)
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in rotated(list(ways), turn):
            figures[name].append(sum(ways[name].measure() for _ in range(size)) / size)
    for way in ways.values():
        way.batcher.close(5)
    sink.stop()
    _table({name: found[1:] for name, found in figures.items()}).show()  # the first one warms up


def _table(figures: dict[str, list[float]]) -> Table:
    table = Table("`batcher`: CPU of a point, from buffer to datagram", "µs", "this / one by one")
    yardstick = figures["1,432 bytes, a call for each"]
    for name, found in figures.items():
        table.add(name, found, ratios(found, yardstick))
    table.notes = [verdict(f"µs, {name}", figures[name], most) for name, most in BOUNDS.items()]
    return table
