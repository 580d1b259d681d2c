"""The longest calls of send_data, by two threads at once, while the batcher sends to a slow server.

The server takes every request, and 50 ms for each. Both threads call as fast as they can, so the
interpreter's lock changes hands at its own interval (5 ms): of a call that it comes in the middle
of, that is the length, and no library's doing; the empty function beside it shows how often.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.table import Table, rotated, verdict
from celery_influx import Database, Point
from celery_influx.options import DatabaseOptions
from tests.python_only import python_only


class _Slow(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.05)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def run(rounds: int = 5, size: int = 100_000) -> None:
    """Measure and print; ``size`` calls by each of two threads, for each variant and round."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def open_one() -> Database:
        port = server.server_address[1]
        options = {"transport": "http", "host": "127.0.0.1", "http_port": port}
        database = Database(DatabaseOptions(**options, queue_size=100_000_000, queue_bytes=1 << 30))
        database.send_data(Point("warm", {"f": 1}))
        return database

    ours = open_one()
    with python_only():
        python = open_one()
    variants: dict[str, tuple[Callable[[Point], object], Database | None]] = {
        "an empty function": (lambda _: None, None),
        "celery_influx": (ours.send_data, ours),
        "celery_influx, Python only": (python.send_data, python),
    }
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in rotated(list(variants), turn):
            call, database = variants[name]
            figures[name].append(_percentile(call, size))
            if database and not database.flush(120):
                raise RuntimeError(f"not all went out: {database.stats()}")
    ours.close()
    python.close()
    server.shutdown()
    table = Table("`send_data` by two threads, 99.9th percentile of a call", "µs", "")
    for name, found in figures.items():
        table.add(name, found[1:])
    table.notes = [verdict("µs, 99.9th percentile", figures["celery_influx"][1:], 1_000)]
    table.show()


def _percentile(call: Callable[[Point], object], size: int) -> float:
    """µs that one call of a thousand takes longer than; of two threads' calls."""
    found: list[list[int]] = [[], []]

    def work(into: list[int]) -> None:
        clock = time.perf_counter_ns
        for number in range(size):
            point = Point("m", {"runtime": number / 7, "size": number}, {"host": "web"})
            began = clock()
            call(point)
            into.append(clock() - began)

    threads = [threading.Thread(target=work, args=(each,)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.quantiles([*found[0], *found[1]], n=1000)[-1] / 1_000
