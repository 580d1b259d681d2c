"""CPU time of a point from the buffer to the network: taken, joined and sent by the batcher.

All lines are in the buffer before the clock starts. A datagram on loopback is long, one on Ethernet
short; the kernel may cut the short ones out of one call's content (UDP_SEGMENT). Beside them, long
ones to a socket in the file system.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import celery_influx.line_protocol
from benchmarks.sink import Sink
from benchmarks.table import Table, ratios, rotated, share, spread, verdict
from celery_influx.batcher import Batcher
from celery_influx.buffer import Buffer, make_buffer
from celery_influx.counters import Counters
from celery_influx.delivery import Delivery
from celery_influx.options import DatabaseOptions
from celery_influx.report import Report
from celery_influx.transports import Transport
from celery_influx.transports.udp import UDPPool
from celery_influx.transports.unixgram import UnixDatagrams

#: Lines of unequal length, 130 bytes in the middle.
LINES = [
    b"http_request,host=web-1,service=shop,path=/shop/%d,status=200 "
    b'duration=0.0%d,bytes=1234i,user="%s" 17640000000000%05d'
    % (number % 16, number, b"u" * (number % 40), number)
    for number in range(5_000)
]
#: They cost 0.255 µs where the bounds are from.
DICTS = "the two dicts of a point"
BOUNDS = {"60,000 bytes": 0.2, "1,432 bytes": 0.5}


class Way:
    """A buffer, its batcher, and the transport that this sends by."""

    def __init__(self, transport: Transport, kind: type[Buffer] = make_buffer) -> None:
        report, self.counters = Report(logging.getLogger(__name__)), Counters(1).row(0)
        self.buffer = kind(2 * len(LINES), 2 * sum(map(len, LINES)))
        self.batcher = Batcher(
            "benchmark",
            self.buffer,
            # unixgram's queue may be full: then it is tried again.
            Delivery("benchmark", transport, self.counters, report, retry_age=10),
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


def _udp(port: int, size: int, *, cut: bool) -> UDPPool:
    pool = UDPPool(
        DatabaseOptions(
            host="127.0.0.1", udp_port=port, datagram_bytes=size, bytes_per_second=10**9
        )
    )
    pool.may_cut = cut
    return pool


def _unixgram(path: str) -> UnixDatagrams:
    return UnixDatagrams(
        DatabaseOptions(transport="unixgram", socket_path=path, datagram_bytes=60_000)
    )


def run(rounds: int = 40, size: int = 20) -> None:
    """Measure and print; ``size`` times 5,000 lines per variant and round."""
    with tempfile.TemporaryDirectory() as folder:
        _run(rounds, size, str(Path(folder) / "socket"))


def _run(rounds: int, size: int, path: str) -> None:
    sink, unix_sink = Sink(), Sink(path)
    sink.drain()
    unix_sink.drain()
    ways = {
        "60,000 bytes": Way(_udp(sink.port, 60_000, cut=False)),
        "60,000 bytes, unixgram": Way(_unixgram(path)),
        "1,432 bytes": Way(_udp(sink.port, 1_432, cut=True)),
        "1,432 bytes, a call for each": Way(_udp(sink.port, 1_432, cut=False)),
    }
    if celery_influx.line_protocol.implementation == "c":
        ways["60,000 bytes, Python only"] = Way(_udp(sink.port, 60_000, cut=False), Buffer)
        ways["1,432 bytes, Python only"] = Way(_udp(sink.port, 1_432, cut=True), Buffer)
    measures = {name: way.measure for name, way in ways.items()} | {DICTS: _dicts}
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name in rotated(list(measures), turn):
            figures[name].append(sum(measures[name]() for _ in range(size)) / size)
    for way in ways.values():
        way.batcher.close(5)
    sink.stop()
    unix_sink.stop()
    _table({name: found[1:] for name, found in figures.items()}).show()  # the first one warms up


def _dicts() -> float:
    """µs of CPU of what a user makes for a point: 4 tags and 3 fields."""
    began = time.process_time()
    for number, line in enumerate(LINES):
        _ = (
            {"host": "web-1", "service": "shop", "path": line, "status": "200"},
            {"duration": 0.25, "bytes": number, "user": "u"},
        )
    return (time.process_time() - began) / len(LINES) * 1e6


def _table(figures: dict[str, list[float]]) -> Table:
    table = Table("`batcher`: CPU of a point, from buffer to datagram", "µs", "this / one by one")
    yardstick = figures["1,432 bytes, a call for each"]
    for name, found in figures.items():
        table.add(name, found, ratios(found, yardstick))
    for name, most in BOUNDS.items():
        table.notes.append(verdict(f"µs, {name}", figures[name], most))
        table.notes.append(share(f"of {DICTS}, {name}", figures[name], figures[DICTS], most, 0.255))
    unixgram = ratios(figures["60,000 bytes, unixgram"], figures["60,000 bytes"])
    table.notes.append(f"unixgram / UDP, 60,000 bytes: {spread(unixgram)}")
    return table
