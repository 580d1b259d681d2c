"""How many points a real influxd stores of those that one database sends it by UDP, at even rates.

UDP says nothing of what arrived: so after each run it is counted what is stored. Lines are encoded
before the clock starts, and queued in portions when their time has come. influxd works on the same
machine, with a `read-buffer` of 8 MiB.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.influxd import PORTION, _lines
from benchmarks.table import Table, verdict
from celery_influx import Database, Point
from celery_influx.options import DatabaseOptions
from celery_influx.queries import quote_ident
from tests.servers import Influxd

RATES = (50_000, 100_000, 200_000, 300_000)
SECONDS = 6


def run(rounds: int = 5, size: int = SECONDS) -> None:
    """Measure and print; ``size`` seconds for each rate and round."""
    stored: dict[int, list[float]] = {rate: [] for rate in RATES}
    spent: dict[int, list[float]] = {rate: [] for rate in RATES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Influxd(folder))
        database = Database(
            DatabaseOptions(
                host="127.0.0.1",
                udp_port=server.udp_port,
                http_port=server.http_port,
                database="celery",
                queue_size=10_000_000,
                queue_bytes=1 << 31,
                bytes_per_second=1_000_000_000,
            )
        )
        stack.callback(database.close)
        database.send_data(Point("warm", {"f": 1}))
        for turn in range(rounds):
            for rate in RATES:
                measurement = f"udp_{rate}_{turn}"
                portions = list(_lines(measurement, rate * size))
                seconds = _send(database, portions, rate)
                spent[rate].append(rate * size / seconds)
                count = _count(database, measurement)
                stored[rate].append(count / (rate * size) * 100)
                database.post(f"DROP MEASUREMENT {quote_ident(measurement)}")
    table = Table("influxd by UDP: stored of what was sent", "%", "")
    for rate in RATES:
        table.add(f"{rate:,} points/s for {size} s", stored[rate])
    fastest = RATES[-1]
    table.notes = [
        verdict(
            f"% stored at {fastest:,} points/s, the worst", [min(stored[fastest])], 100, least=True
        ),
        f"Sent at {min(spent[fastest]):,.0f} points/s at least in the fastest.",
    ]
    table.show()


def _send(database: Database, portions: list[list[bytes]], rate: int) -> float:
    """Send them evenly; seconds."""
    began = time.perf_counter()
    for number, lines in enumerate(portions):
        due = began + number * PORTION / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        database.send_lines(lines)
    if not database.flush(120):
        raise RuntimeError(f"not all went out: {database.stats()}")
    return time.perf_counter() - began


def _count(database: Database, measurement: str) -> int:
    """How many are stored, when influxd has come to an end with what it has."""
    count, until = -1, time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(1)
        found = database.query(f"SELECT count(runtime) FROM {quote_ident(measurement)}")
        now = found.series[0].values[0][1] if found.series else 0
        if now == count:
            break
        count = now
    return count
