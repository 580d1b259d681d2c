"""How fast one database sends to a real influxd over HTTP, and what gzip costs and saves.

Lines are encoded before the clock starts and then queued, in portions: measured is the way from
the buffer to the server's last answer, and that every line is stored. influxd works on the same
machine and wants most of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.table import Table, ratios, rotated, verdict
from celery_influx import Database, Point, encode
from celery_influx.options import DatabaseOptions
from tests.servers import Influxd

VARIANTS = {"HTTP": {}, "HTTP, gzip": {"gzip": True}}
PORTION = 1_000


def run(rounds: int = 5, size: int = 500_000) -> None:
    """Measure and print; ``size`` points for each variant and round."""
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    costs: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Influxd(folder))
        databases = {}
        for name, options in VARIANTS.items():
            databases[name] = Database(
                DatabaseOptions(
                    transport="http",
                    host="127.0.0.1",
                    http_port=server.http_port,
                    database="celery",
                    queue_size=size + 1,
                    queue_bytes=1 << 30,
                    http_timeout=60,
                    **options,
                )
            )
            stack.callback(databases[name].close)
            databases[name].send_data(Point("warm", {"f": 1}))
        for turn in range(rounds + 1):
            for name in rotated(list(VARIANTS), turn):
                measurement = f"{name.replace(', ', '_')}_{turn}"
                portions = list(_lines(measurement, size))
                seconds, cpu = _send(databases[name], portions)
                rates[name].append(size / seconds)
                costs[name].append(cpu / size * 1e6)
                stored = databases[name].query(f'SELECT count(runtime) FROM "{measurement}"')
                count = stored.series[0].values[0][1] if stored.series else 0
                if count != size:
                    raise RuntimeError(f"{name}: {count:,} of {size:,} points are stored")
                databases[name].post(f'DROP MEASUREMENT "{measurement}"')
    rate = Table("influxd over HTTP, one connection: rate", "points/s", "this / HTTP")
    cost = Table("influxd over HTTP: CPU of a line, our side", "µs", "this / HTTP")
    for name in VARIANTS:
        rate.add(name, rates[name][1:], ratios(rates[name][1:], rates["HTTP"][1:]))
        cost.add(name, costs[name][1:], ratios(costs[name][1:], costs["HTTP"][1:]))
    rate.notes.append(verdict("points/s over HTTP", rates["HTTP"][1:], 250_000, least=True))
    rate.show()
    cost.show()


def _lines(measurement: str, size: int) -> Iterator[list[bytes]]:
    first = time.time_ns() - size * 1_000
    for start in range(0, size, PORTION):
        yield [
            encode(
                Point(
                    measurement,
                    {"runtime": (i * 7919 % 10_007) / 1e4, "size": i, "note": "ok"},
                    {"path": f"/shop/{i % 16}", "method": "GET", "status": "200", "zone": "eu"},
                    first + i * 1_000,
                )
            )
            for i in range(start, min(start + PORTION, size))
        ]


def _send(database: Database, portions: list[list[bytes]]) -> tuple[float, float]:
    """Seconds, and seconds of CPU, until the server has taken all."""
    began, cpu = time.perf_counter(), time.process_time()
    for lines in portions:
        database.send_lines(lines)
    if not database.flush(120):
        raise RuntimeError(f"not all went out: {database.stats()}")
    return time.perf_counter() - began, time.process_time() - cpu
