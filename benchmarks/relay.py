"""What a point costs on its way from a pool child to its worker's buffer: both processes' CPU.

In each round a child is forked that sends points in bursts, as tasks do; the worker reads them in
its relay's thread. Beside it, the same bytes by bare writes and reads of a pipe: less there cannot
be. What encoding and the pauses cost is measured in the same child, and taken off.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import celery_influx.line_protocol
from benchmarks.table import Table, ratios, rotated, share, verdict
from celery_influx.buffer import make_buffer
from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.relay import Relay
from celery_influx.runs import Runs
from celery_influx.stamps import make_stamps
from tests.python_only import python_only

POINT = Point(
    "celery_custom",
    {"seconds": 1.5, "rows": 20, "source": "nightly"},
    {"site": "berlin", "stage": "production", "team": "data", "kind": "import"},
)
#: Points that a child sends at once, and the seconds for which it then does something else.
BURST, PAUSE = 500, 0.005
#: µs that the bare pipe cost where the bounds are from.
PIPE = 0.95


class Cost(NamedTuple):
    """µs of CPU of one point: of the child, of it encoding and pauses; of the worker."""

    child: float
    encoding: float
    worker: float

    def total(self) -> float:
        """Without the encoding."""
        return self.child - self.encoding + self.worker


def run(rounds: int = 60, size: int = 10_000) -> None:
    """Measure and print; ``size`` points per variant and round."""
    variants: dict[str, Callable[[int], Cost]] = {"celery_influx": _relayed, "the pipe": _bare}
    if celery_influx.line_protocol.implementation == "c":
        variants["celery_influx, Python only"] = _relayed_by_python
    figures: dict[str, list[Cost]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in rotated(list(variants), turn):
            figures[name].append(variants[name](size))
    _table({name: found[1:] for name, found in figures.items()}).show()  # the first one warms up


def _relayed_by_python(size: int) -> Cost:
    with python_only():
        return _relayed(size)


def _relayed(size: int) -> Cost:
    buffer = make_buffer(4 * size, 1_000 * size)
    relay = Relay(lambda _, lines: buffer.put(lines), lambda _: None, Runs(lambda *_: None))
    relay.start()

    def set_out() -> tuple[Callable[[], object], Callable[[], object]]:
        relay.after_fork()
        counters = Counters(1)
        database = Database(DatabaseOptions(name="metrics"), settle=lambda: None)
        account, stamps = counters.total, make_stamps(1)
        database.begin(counters.row(0), lambda: account(0), stamps, {}, relay.end_for(0))
        return lambda: database.send_data(POINT), lambda: database.encode(POINT)

    cost = _measure(set_out, lambda: relay.sync(10), size)
    assert len(buffer) == 2 * size, f"{2 * size} points sent, {len(buffer)} came"
    relay.close(10)
    return cost


def _bare(size: int) -> Cost:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 1_048_576)  # as the relay's
    line = celery_influx.line_protocol.encode(POINT)
    frame = struct.pack("<HBB", len(line), 0, 0) + line
    came = threading.Semaphore(0)

    def read() -> None:
        room = memoryview(bytearray(262_144))
        for _ in range(2):
            missing = size * len(frame)
            while missing:
                missing -= os.readv(read_fd, [room])
                time.sleep(Relay.NAP)
            came.release()

    threading.Thread(target=read).start()

    def set_out() -> tuple[Callable[[], object], Callable[[], object]]:
        return lambda: os.write(write_fd, frame), lambda: None

    cost = _measure(set_out, came.acquire, size)
    os.close(read_fd)
    os.close(write_fd)
    return cost


def _measure(
    set_out: Callable[[], tuple[Callable[[], object], Callable[[], object]]],
    read_all: Callable[[], object],
    size: int,
) -> Cost:
    """Fork a child that does the second of the two calls, ``size`` times, and then the first.

    All of it twice, and the second time counts: a fork, and the first touch of memory after it,
    is not what a point costs a pool's child, which lives on.
    """
    orders_fd, order_fd = os.pipe()
    costs_fd, cost_fd = os.pipe()
    child = os.fork()
    if not child:
        try:
            calls = set_out()
            while True:
                (number,) = os.read(orders_fd, 1)
                os.write(cost_fd, struct.pack("d", _repeat(calls[number], size)))
        finally:
            os._exit(1)

    def order(number: int) -> float:
        os.write(order_fd, bytes([number]))
        return struct.unpack("d", os.read(costs_fd, 8))[0] / size * 1e6

    for _ in range(2):
        encoding = order(1)
        before = time.process_time()
        sending = order(0)
        read_all()
        worker = (time.process_time() - before) / size * 1e6
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for fd in (orders_fd, order_fd, costs_fd, cost_fd):
        os.close(fd)
    return Cost(sending, encoding, worker)


def _repeat(call: Callable[[], object], size: int) -> float:
    """Seconds of CPU."""
    began = time.process_time()
    for number in range(size):
        call()
        if number % BURST == 0:
            time.sleep(PAUSE)
    return time.process_time() - began


def _table(figures: dict[str, list[Cost]]) -> Table:
    title = "`relay`: CPU of a point, child and worker, encoding taken off"
    table = Table(title, "µs", "ours / this")
    totals = {name: [cost.total() for cost in costs] for name, costs in figures.items()}
    for name, costs in figures.items():
        table.add(name, totals[name], ratios(totals["celery_influx"], totals[name]))
        table.add(f"{name}: the worker's part", [cost.worker for cost in costs])
    for name, bound in (("celery_influx", 0.7), ("celery_influx, Python only", 1.1)):
        if name in totals:
            found, pipe = totals[name], totals["the pipe"]
            table.notes.append(verdict(f"µs, {name}", found, bound))
            table.notes.append(share("of the pipe", found, pipe, bound, PIPE))
    return table
