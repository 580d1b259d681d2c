"""How fast one database sends to a real influxd over HTTP, and what gzip costs and saves.

Lines are encoded before the clock starts and then queued, in portions: measured is the way from
the buffer to the server's last answer, and that every line is stored. influxd works on the same
machine and wants most of it: so beside it, request bodies that were made before, by the standard
library's own client on one connection, which is as fast as influxd takes them. Tags are in the
order of their names, since influxd sorts those of each line that are not.
"""

from __future__ import annotations

import http.client
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

from benchmarks.table import Table, ratios, rotated, verdict
from celery_influx import Database, Point, encode
from celery_influx.options import DatabaseOptions
from celery_influx.queries import quote_ident
from tests.servers import Influxd

VARIANTS = {"HTTP": {}, "HTTP, gzip": {"gzip": True}}
READY = "http.client, bodies made before"
PORTION = 1_000


def run(rounds: int = 5, size: int = 500_000) -> None:
    """Measure and print; ``size`` points for each variant and round."""
    names = [*VARIANTS, READY]
    rates: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
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
            for name in rotated(names, turn):
                measurement = f"{name.replace(', ', '_')}_{turn}"
                portions = list(_lines(measurement, size))
                database = databases.get(name, databases["HTTP"])
                if name == READY:
                    seconds, cpu = _post(server.http_port, portions)
                else:
                    seconds, cpu = _send(database, portions)
                rates[name].append(size / seconds)
                costs[name].append(cpu / size * 1e6)
                stored = database.query(f"SELECT count(runtime) FROM {quote_ident(measurement)}")
                count = stored.series[0].values[0][1] if stored.series else 0
                if count != size:
                    raise RuntimeError(f"{name}: {count:,} of {size:,} points are stored")
                database.post(f"DROP MEASUREMENT {quote_ident(measurement)}")
    rate = Table("influxd over HTTP, one connection: rate", "points/s", "this / HTTP")
    cost = Table("influxd over HTTP: CPU of a line, our side", "µs", "this / HTTP")
    for name in names:
        rate.add(name, rates[name][1:], ratios(rates[name][1:], rates["HTTP"][1:]))
        cost.add(name, costs[name][1:], ratios(costs[name][1:], costs["HTTP"][1:]))
    of_ready = ratios(rates["HTTP"][1:], rates[READY][1:])
    rate.notes += [
        verdict("points/s over HTTP", rates["HTTP"][1:], 250_000, least=True),
        f"Of the rate with bodies made before: {statistics.median(of_ready):.3f}",
    ]
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
                    {"method": "GET", "path": f"/shop/{i % 16}", "status": "200", "zone": "eu"},
                    first + i * 1_000,
                )
            )
            for i in range(start, min(start + PORTION, size))
        ]


def _post(port: int, portions: list[list[bytes]]) -> tuple[float, float]:
    """The same of bodies that are as long as the database's batches."""
    lines = [line for portion in portions for line in portion]
    size = DatabaseOptions().batch_size
    bodies = [b"\n".join(lines[start : start + size]) for start in range(0, len(lines), size)]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began, cpu = time.perf_counter(), time.process_time()
    for body in bodies:
        connection.request("POST", "/write?db=celery&precision=ns", body)
        answer = connection.getresponse()
        answer.read()
        if answer.status != HTTPStatus.NO_CONTENT:
            raise RuntimeError(f"influxd answered {answer.status}")
    spent = time.perf_counter() - began, time.process_time() - cpu
    connection.close()
    return spent


def _send(database: Database, portions: list[list[bytes]]) -> tuple[float, float]:
    """Seconds, and seconds of CPU, until the server has taken all."""
    began, cpu = time.perf_counter(), time.process_time()
    for lines in portions:
        database.send_lines(lines)
    if not database.flush(120):
        raise RuntimeError(f"not all went out: {database.stats()}")
    return time.perf_counter() - began, time.process_time() - cpu
