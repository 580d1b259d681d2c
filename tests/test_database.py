"""Database: what it accepts, that its account is exact, and forks, closes and hung servers."""

from __future__ import annotations

import contextlib
import errno
import gc
import inspect
import logging
import os
import resource
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast
from unittest import mock

import pytest

from celery_influx.batcher import Batcher
from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.errors import PointError
from celery_influx.line_reader import decode
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.relay import Relay, RelayEnd
from celery_influx.runs import Runs
from celery_influx.speedups import extension
from celery_influx.stamps import Stamps, make_stamps, python_stamps
from celery_influx.transports.http import HTTPClient
from tests.conftest import TimeIsUp, run_python
from tests.servers import Influxd, free_port, wait_for
from tests.test_relay import exit_code, fork, open_files

T0 = 1_700_000_000_000_000_000


class Server:
    """A UDP server that keeps every line it gets."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_388_608)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(0.05)
        self.port = self.socket.getsockname()[1]
        self.datagrams: list[bytes] = []
        self._ended = False
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while not self._ended:
            try:
                self.datagrams.append(self.socket.recv(65_536))
            except TimeoutError:
                pass

    @property
    def lines(self) -> list[bytes]:
        return [line for datagram in list(self.datagrams) for line in datagram.split(b"\n") if line]

    def points(self, count: int) -> list[Point]:
        wait_for(lambda: len(self.lines) >= count, 10, f"{count} lines")
        return [decode(line) for line in self.lines]

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self.socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Database]]:
    made: list[Database] = []

    def one(**arguments: Any) -> Database:
        own = {"strict", "enabled", "tags", "settle", "upstream"}
        options = {"name": "m", "host": "127.0.0.1", "udp_port": server.port}
        options |= {key: value for key, value in arguments.items() if key not in own}
        rest = {key: value for key, value in arguments.items() if key in own}
        made.append(Database(DatabaseOptions(**options), **rest))
        return made[-1]

    yield one
    for database in made:
        database.close(0)


def account(database: Database) -> dict[str, int]:
    """The counters that tell what became of points; checked to add up."""
    stats = database.stats()
    names = ("points", "sent", "dropped", "lost", "rejected", "queued")
    found = {name: stats[name] for name in names if stats[name]}
    assert stats["points"] == sum(stats[name] for name in names[1:])
    return found


# -- what it accepts ---------------------------------------------------------------------------


def client_point(precision: str) -> Any:
    from influxdb_client import Point as ClientPoint

    ticks = {"ns": T0, "us": T0 // 10**3, "ms": T0 // 10**6, "s": T0 // 10**9}[precision]
    return ClientPoint("m").tag("t", "v").field("f", 1).time(ticks, precision)


class Measured(NamedTuple):
    """To be iterated, as a pydantic model is, and yet one point."""

    value: int

    def to_line_protocol(self) -> str:
        return f"m,t=v f={self.value}i {T0}"


WHOLE = Point("m", {"f": 1}, {"t": "v"}, T0)
FORMS: dict[str, Callable[[], object]] = {
    "a Point": lambda: WHOLE,
    "a mapping": lambda: {"measurement": "m", "fields": {"f": 1}, "tags": {"t": "v"}, "time": T0},
    "a mapping with a datetime": lambda: {
        "measurement": "m",
        "fields": {"f": 1},
        "tags": {"t": "v"},
        "time": datetime.fromtimestamp(T0 // 10**9, timezone.utc),
    },
    **{
        f"influxdb-client's, {word}": partial(client_point, word)
        for word in ("ns", "us", "ms", "s")
    },
    "a tuple with a line of its own": lambda: Measured(1),
    "a list": lambda: [WHOLE],
    "a tuple": lambda: (WHOLE,),
    "an iterator": lambda: iter([WHOLE]),
    "a generator": lambda: (point for point in [WHOLE]),
    "a Point's subclass": lambda: type("Mine", (Point,), {})(*WHOLE),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_point_is_sent_as_the_same_line(form: str, make, server: Server) -> None:
    database = make(strict=True)

    database.send_data(FORMS[form]())

    assert database.flush(5)
    assert server.points(1) == [WHOLE]
    assert account(database) == {"points": 1, "sent": 1}


def test_a_point_without_a_time_gets_the_present_one_unlike_any_other(make, server: Server) -> None:
    database = make(strict=True)
    from influxdb_client import Point as ClientPoint

    before = time.time_ns()
    for _ in range(300):
        database.send_data(Point("m", {"f": 1}))
        database.send_data({"measurement": "m", "fields": {"f": 1}, "time": None})
        database.send_data(ClientPoint("m").field("f", 1))
    assert database.flush(5)

    stamps = [point.timestamp for point in server.points(900)]
    assert len(set(stamps)) == 900
    assert before - 1_000 < min(stamps)
    assert max(stamps) < time.time_ns() + 1_000_000
    assert {stamp % 1_000 for stamp in stamps} == {os.getpid() % 1_000}


def test_many_points_at_once_each_count(make, server: Server) -> None:
    database = make()

    database.send_data([Point("m", {"f": i}) for i in range(500)])
    database.send_data(Point("m", {"f": i}) if i % 2 else {"oops": i} for i in range(500))
    database.flush(5)

    assert len(server.points(750)) == 750
    assert account(database) == {"points": 1_000, "sent": 750, "rejected": 250}


@pytest.mark.long
def test_a_million_points_leave_the_memory_as_it_was(make, server: Server) -> None:
    database = make(bytes_per_second=10_000_000_000)

    def send(count: int) -> None:
        for number in range(count):
            database.send_data(
                Point("m", {"f": number / 7, "i": number}, {"host": "a", "n": str(number % 50)})
            )
            if number % 10_000 == 9_999:
                assert database.flush(30)
                server.datagrams.clear()
        assert database.flush(30)

    send(500_000)
    before = rss()
    send(1_000_000)
    grown = rss() - before
    print(f"{grown:,} bytes more")

    assert grown < 1_000_000
    assert account(database)["sent"] == 1_500_000


def test_constant_tags_are_on_every_point_and_its_own_win(make, server: Server) -> None:
    database = make(tags={"host": "a", "region": "eu"})

    database.send_data(Point("m", {"f": 1}))
    database.send_data(Point("m", {"f": 1}, {"host": "b", "region": None}))
    database.flush(5)

    assert [point.tags for point in server.points(2)] == [
        {"host": "a", "region": "eu"},
        {"host": "b"},
    ]


def test_a_constant_tag_with_a_backslash_is_written_and_keeps_nobody_from_starting(
    make, server: Server
) -> None:
    database = make(tags={"dir": "c:\\x"})
    database.start()

    database.send_data(Point("m", {"f": 1}))
    assert database.flush(5)

    assert server.points(1) == [
        Point("m", {"f": 1}, {"dir": "c:\\x"}, server.points(1)[0].timestamp)
    ]


@pytest.mark.parametrize(
    ("precision", "length"), [("ns", 1), ("u", 10**3), ("ms", 10**6), ("s", 10**9)]
)
def test_times_are_sent_in_the_precision_set(
    precision: str, length: int, make, server: Server
) -> None:
    database = make(precision=precision)

    database.send_data(WHOLE)
    database.flush(5)

    assert server.points(1)[0].timestamp == T0 // length


def test_fields_that_are_not_finite_are_left_out_counted_and_said(
    make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    database = make()

    database.send_data(Point("m", {"f": 1, "nan": float("nan"), "inf": float("-inf")}))
    database.flush(5)

    assert server.points(1)[0].fields == {"f": 1}
    assert database.stats()["left_out"] == 2
    assert caplog.messages == [
        "m: left out 2 fields that were NaN or infinite: InfluxDB cannot store them"
    ]


# -- what it refuses ---------------------------------------------------------------------------


class Raises:
    """Raises whatever is done to it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error

    def __repr__(self) -> str:
        raise self.error


class RaisingMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class HostileKey(str):
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")


class Iterates:
    def __iter__(self) -> Iterator[object]:
        raise RuntimeError("not to be iterated")


class Unbound:
    """As a lazy object or a proxy, such as Celery's, whose function raises."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("no object")


def failing_generator() -> Iterator[Point]:
    yield Point("m", {"good": 1})
    raise RuntimeError("in the middle")


class BadLine:
    def __init__(self, line: object, precision: object = "ns") -> None:
        self.line = line
        self.write_precision = precision

    def to_line_protocol(self) -> object:
        if isinstance(self.line, Exception):
            raise self.line
        return self.line


#: What each of them raises, in strict mode, is in test_error_texts.py.
REFUSED: list[Callable[[], object]] = [
    lambda: None,
    lambda: "m f=1",
    lambda: b"m f=1",
    dict,
    lambda: {"measurement": "m", "field": {"f": 1}},
    lambda: Point("m", {}),
    lambda: Point("m", {"f": float("nan")}),
    lambda: Point(5, {"f": 1}),  # type: ignore[arg-type]
    lambda: Point("m", {"f": object}),
    lambda: Point("m", {"f": 1}, None, "yesterday"),  # type: ignore[arg-type]
    lambda: {"measurement": "m", "fields": {"f": 1}, "time": 1.5},
    lambda: BadLine(""),
    lambda: BadLine(KeyError("x")),
    lambda: BadLine("m f=1\nm f=2"),
    lambda: BadLine("m f="),
    lambda: BadLine(b"m f=1"),
    lambda: BadLine("m f=1", "fortnight"),
    RaisingMapping,
    lambda: Raises(RuntimeError("odd")),
    Iterates,
    Unbound,
    lambda: {HostileKey("fields"): 1},
]


@pytest.mark.parametrize("given", REFUSED, ids=range(len(REFUSED)))
def test_a_point_that_cannot_be_stored_is_counted_and_said_and_raises_only_if_strict(
    given: Callable[[], object],
    make,
    server: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lenient, strict = make(tags={"host": "a"}), make(strict=True, tags={"host": "a"})

    lenient.send_data(given())
    lenient.send_data([given(), WHOLE])
    with pytest.raises(PointError) as caught:
        strict.send_data(given())

    assert lenient.flush(5)
    assert account(lenient) == {"points": 3, "sent": 1, "rejected": 2}
    assert account(strict) == {"points": 1, "rejected": 1}
    said = [message for message in caplog.messages if "left out" not in message]
    assert said == [f"m: rejected a point: {caught.value}"]


def test_a_generator_that_fails_in_the_middle_costs_what_it_did_not_give(
    make, server: Server
) -> None:
    database = make()

    database.send_data(failing_generator())
    database.send_data(WHOLE)
    database.flush(5)

    assert [point.fields for point in server.points(2)] == [{"good": 1}, {"f": 1}]
    assert account(database) == {"points": 3, "sent": 2, "rejected": 1}


def test_a_list_in_a_list_is_rejected_and_its_neighbours_are_not(make, server: Server) -> None:
    database = make()
    endless: list[object] = [WHOLE]
    endless.append(endless)

    database.send_data(endless)
    database.flush(5)

    assert account(database) == {"points": 2, "sent": 1, "rejected": 1}


class Slow:
    def __str__(self) -> str:
        raise TimeIsUp


@pytest.mark.parametrize(
    "given",
    [
        Point("m", {"f": 1}, {"t": Slow()}),
        {"measurement": "m", "fields": {"f": 1}, "tags": {"t": Slow()}},
        (Point("m", {"f": 1}, {"t": Slow()}) for _ in range(1)),
    ],
)
def test_the_end_of_a_tasks_time_is_not_taken_for_a_bad_point(
    make, given: object, time_is_up: None
) -> None:
    database = make()

    with pytest.raises(TimeIsUp):
        database.send_data(given)

    assert account(database) == {}


@pytest.mark.parametrize(
    "given",
    [
        Point("m", {"f": TimeIsUp()}),
        Point("m", {"f": 1}, None, TimeIsUp()),  # type: ignore[arg-type]
        Point(TimeIsUp(), {"f": 1}),  # type: ignore[arg-type]
        TimeIsUp(),
    ],
)
def test_who_sends_the_end_of_a_tasks_time_has_sent_a_bad_point(
    make, given: object, time_is_up: None
) -> None:
    database = make()

    database.send_data(given)

    assert account(database) == {"points": 1, "rejected": 1}


def test_a_thousand_bad_points_are_said_once_a_minute(
    make, caplog: pytest.LogCaptureFixture
) -> None:
    database = make()

    for _ in range(1_000):
        database.send_data({"nothing": 1})

    assert account(database) == {"points": 1_000, "rejected": 1_000}
    assert len(caplog.messages) == 1


# -- what wakes it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"batch_size": 100}, 100),
        ({"batch_bytes": 1_024}, 110),
        ({"queue_size": 50}, 25),
        ({"queue_bytes": 2_048}, 110),
    ],
)
def test_enough_lines_or_bytes_are_sent_without_waiting_for_the_interval(
    options: dict[str, int], points: int, make, server: Server
) -> None:
    database = make(flush_interval=3_600.0, **options)

    for number in range(points):
        database.send_data(Point("m", {"f": number}, None, number))

    wait_for(lambda: account(database).get("queued", 0) < points, 10)
    assert server.points(1)
    assert database.stats()["dropped"] == 0


def test_a_single_point_is_sent_within_the_interval(make, server: Server) -> None:
    database = make(flush_interval=0.05)

    database.send_data(WHOLE)

    assert server.points(1) == [WHOLE]


def test_a_small_queue_is_emptied_before_it_is_full(make, server: Server) -> None:
    """A batch longer than the queue would never be reached, and the queue overflow."""
    database = make(flush_interval=3_600.0, queue_size=1_000, batch_size=5_000)

    for number in range(5_000):
        database.send_data(Point("m", {"f": number}, None, number))
        if number % 100 == 0:
            wait_for(lambda: len(database._buffer) < 800, 10)
    database.flush(5)

    assert account(database) == {"points": 5_000, "sent": 5_000}


def test_a_line_longer_than_a_datagram_is_rejected_and_counted(
    make, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    database = make(datagram_bytes=100)

    database.send_data([WHOLE, Point("m", {"g": "x" * 200}), WHOLE])
    assert database.flush(5) is False

    assert account(database) == {"points": 3, "sent": 2, "rejected": 1}
    assert "1 lines are longer than the 100 bytes of one payload to udp://127.0.0.1" in caplog.text


# -- the account -------------------------------------------------------------------------------


def test_the_account_of_many_threads_is_exact(make, server: Server) -> None:
    database = make(queue_size=2_000, batch_size=500)
    per_thread = 5_000

    def send(number: int) -> None:
        for i in range(per_thread):
            database.send_data(Point("m", {"f": i} if i % 10 else {}, {"t": str(number)}))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.flush(10)

    found = account(database)
    assert found["points"] == 6 * per_thread
    assert found["rejected"] == 6 * per_thread // 10
    assert "queued" not in found
    wait_for(lambda: len(server.lines) == found["sent"], 10)


def test_the_first_points_of_many_threads_at_once_are_all_counted_and_sent(
    make, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_stamps(slot: int) -> Stamps:
        time.sleep(0.005)  # so that the others come while the first one sets out
        return make_stamps(slot)

    monkeypatch.setattr("celery_influx.database.make_stamps", slow_stamps)
    for round_ in range(20):
        database = make(flush_interval=3_600.0)
        start = threading.Barrier(8)
        failed: list[Exception] = []

        def send(
            database: Database = database,
            start: threading.Barrier = start,
            failed: list[Exception] = failed,
        ) -> None:
            start.wait()
            try:
                database.send_data(WHOLE)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert failed == []
        assert database.flush(5)
        assert account(database) == {"points": 8, "sent": 8}
        wait_for(lambda n=round_: len(server.lines) == 8 * (n + 1), 10)
        database.close(1)


def test_a_refused_port_is_counted_as_lost_and_sending_resumes(make, server: Server) -> None:
    port = free_port()
    database = make(udp_port=port)

    database.send_data([WHOLE] * 3)
    assert database.flush(5) is False
    assert account(database) == {"points": 3, "lost": 3}
    assert database.stats()["errors"] == 1

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", port))
        database.send_data(WHOLE)
        assert database.flush(5) is True
    assert account(database) == {"points": 4, "lost": 3, "sent": 1}


class Failing(socket.socket):
    """A socket like any other, but that ``send`` fails while there is a ``code``."""

    code = 0

    def send(self, data: bytes, *flags: int) -> int:  # type: ignore[override]
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().send(data, *flags)


@pytest.mark.parametrize("name", ["ENOBUFS", "EHOSTUNREACH", "ENETUNREACH", "EMSGSIZE"])
def test_what_the_network_refuses_is_counted_as_lost_said_once_and_sending_resumes(
    name: str,
    make,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(socket, "socket", Failing)
    database = make(flush_interval=60)
    database.send_data(WHOLE)
    assert database.flush(5) is True

    monkeypatch.setattr(Failing, "code", getattr(errno, name))
    for points in ([WHOLE] * 2, [WHOLE], [WHOLE] * 4):
        database.send_data(points)
        assert database.flush(5) is False
    assert account(database) == {"points": 8, "sent": 1, "lost": 7}
    assert database.stats()["errors"] == 3

    monkeypatch.setattr(Failing, "code", 0)
    database.send_data([WHOLE] * 2)
    assert database.flush(5) is True
    assert account(database) == {"points": 10, "sent": 3, "lost": 7}
    assert database.stats()["errors"] == 3
    assert len(server.points(3)) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    address = f"m: udp://127.0.0.1:{server.port} did not take the datagram ({name}: "
    assert said.startswith(address)
    assert said.endswith("; 2 lines lost")


# -- open and closed ---------------------------------------------------------------------------


def test_nothing_is_started_or_opened_before_the_first_point(make) -> None:
    threads, files = threading.active_count(), open_files()

    database = make()
    database.stats()
    repr(database)
    assert database.flush(1) is True
    assert database.close(1) is True

    assert threading.active_count() == threads
    assert open_files() == files


def test_disabled_it_does_nothing_at_all(make, server: Server) -> None:
    database = make(enabled=False)
    threads, files = threading.active_count(), open_files()

    database.send_data(WHOLE)
    database.send_data(object())
    database.start()

    assert database.flush(1) is True
    assert account(database) == {}
    assert threading.active_count() == threads
    assert open_files() == files
    assert database.close(1) is True
    assert server.lines == []


def test_closed_it_opens_again_at_the_next_point_and_flushes_as_before(
    make, server: Server
) -> None:
    database = make()

    for number in range(5):
        database.send_data([WHOLE] * 10)
        begin = time.monotonic()
        assert database.flush(5) is True
        assert time.monotonic() - begin < 2
        database.send_data(WHOLE)
        assert database.close(5) is True
        assert account(database)["sent"] == 11 * (number + 1)

    assert len(server.points(55)) == 55


def test_points_sent_while_it_closes_are_neither_lost_nor_uncounted(make, server: Server) -> None:
    database = make(flush_interval=3_600.0)
    stop = threading.Event()
    sent = [0] * 4

    def send(number: int) -> None:
        while not stop.is_set():
            database.send_data(Point("m", {"f": 1}))
            sent[number] += 1
            time.sleep(0.0001)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        database.close(5)
    stop.set()
    for thread in threads:
        thread.join()
    assert database.flush(5)

    assert account(database) == {"points": sum(sent), "sent": sum(sent)}
    wait_for(lambda: len(server.lines) == sum(sent), 10)
    batchers = [t for t in threading.enumerate() if t.name == "celery_influx m"]
    assert len(batchers) <= 1


def test_a_point_sent_in_the_last_moment_of_closing_is_sent_all_the_same(
    make, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make(flush_interval=0.05)
    database.send_data(WHOLE)
    real = Batcher.close

    def close(batcher: Batcher, timeout: float) -> bool:
        closed = real(batcher, timeout)
        database.send_data(WHOLE)
        return closed

    with monkeypatch.context() as patched:
        patched.setattr(Batcher, "close", close)
        assert database.close(5) is True

    wait_for(lambda: account(database) == {"points": 2, "sent": 2}, 10)


def test_two_hundred_rounds_of_opening_and_closing_leave_no_thread_and_no_file(
    make, server: Server
) -> None:
    database = make()
    threads, files = threading.active_count(), open_files()

    for _ in range(200):
        database.send_data(WHOLE)
        assert database.close(5) is True

    assert threading.active_count() == threads
    assert open_files() == files
    assert account(database) == {"points": 200, "sent": 200}


class Hung:
    """A TCP server that takes connections and never answers."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.socket.getsockname()[1]


@pytest.fixture
def hung() -> Iterator[Hung]:
    made = Hung()
    yield made
    made.socket.close()


@pytest.mark.alone
def test_closed_while_the_server_hangs_it_ends_in_time_and_opens_anew(
    make, hung: Hung, server: Server
) -> None:
    options = {"transport": "http", "http_port": hung.port, "http_timeout": 2.0, "retry_age": 0.0}
    database = make(**options, batch_size=1)
    database.send_data([WHOLE] * 3)
    wait_for(lambda: account(database).get("queued", 0) == 3 and len(database._buffer) == 2, 5)

    begin = time.monotonic()
    assert database.close(0.2) is False
    assert time.monotonic() - begin < 0.6

    assert account(database) == {"points": 3, "dropped": 2, "queued": 1}
    first = database._transport
    database.send_data(WHOLE)
    assert database._transport is not first
    assert isinstance(database._transport, HTTPClient)
    wait_for(lambda: account(database).get("queued", 0) == 0, 10)
    assert account(database) == {"points": 4, "dropped": 2, "lost": 2}


def test_what_a_server_that_is_away_did_not_take_it_has_when_it_is_back(
    make, tmp_path: Path
) -> None:
    """The batch that was tried first, and of the others the newest that found room."""
    server = Influxd(tmp_path)
    database = make(
        transport="http",
        http_port=server.http_port,
        database=server.udp_database,
        queue_size=50,
        batch_size=10,
    )
    points = [Point("away", {"number": number}, None, T0 + number) for number in range(200)]
    database.send_data(points[:10])
    assert database.flush(0.3) is False
    assert account(database) == {"points": 10, "queued": 10}
    for point in points[10:]:
        database.send_data(point)
    assert database.flush(0.1) is False
    assert account(database) == {"points": 200, "dropped": 140, "queued": 60}

    with server:
        assert database.flush(20)

        assert account(database) == {"points": 200, "dropped": 140, "sent": 60}
        stored = [row["number"] for row in server.rows("away")]
        assert stored == [*range(10), *range(150, 200)]
        assert database.stats()["errors_no_answer"] > 0


def test_closed_while_the_server_is_away_it_tries_at_once_and_counts_what_it_could_not_send(
    make, tmp_path: Path
) -> None:
    server = Influxd(tmp_path)
    database = make(
        transport="http",
        http_port=server.http_port,
        database=server.udp_database,
        batch_size=10,
    )
    database.send_data([WHOLE] * 25)
    assert database.flush(0.1) is False
    errors = database.stats()["errors"]

    begin = time.monotonic()
    assert database.close(0.5) is False
    assert time.monotonic() - begin < 5
    found = account(database)
    assert found["points"] == found["lost"] + found["dropped"] == 25
    assert found["lost"] >= 10
    assert database.stats()["errors"] > errors

    database.send_data(WHOLE)
    assert database.flush(0.1) is False
    with server:
        assert database.close(20)
        assert account(database) == {**found, "points": 26, "sent": 1}


NO_THREAD = RuntimeError("can't start new thread")


@contextlib.contextmanager
def no_thread_starts(
    monkeypatch: pytest.MonkeyPatch, error: Exception = NO_THREAD
) -> Iterator[None]:
    """As at the end of the interpreter, or at a user's limit, or by a signal meanwhile."""

    def refuse(thread: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        yield


def test_where_no_thread_can_be_started_points_wait_and_it_is_said(
    make, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = make()

    with no_thread_starts(monkeypatch):
        database.send_data([WHOLE] * 3)
        assert database.flush(0.1) is False
    assert caplog.messages == ["m: points wait unsent: can't start new thread"]
    assert account(database) == {"points": 3, "queued": 3}

    database.send_data(WHOLE)
    assert database.flush(5) is True
    assert account(database) == {"points": 4, "sent": 4}


def test_a_tasks_time_may_end_while_the_thread_is_started(
    make, server: Server, monkeypatch: pytest.MonkeyPatch, time_is_up: None
) -> None:
    database = make()

    with no_thread_starts(monkeypatch, TimeIsUp()), pytest.raises(TimeIsUp):
        database.send_data(WHOLE)

    database.send_data(WHOLE)
    assert database.flush(5) is True
    assert account(database) == {"points": 2, "sent": 2}


def test_close_drops_counts_and_says_what_waits_where_no_thread_can_be_started(
    make, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = make()

    with no_thread_starts(monkeypatch):
        database.send_data([WHOLE] * 3)
        assert database.close(0.1) is False
        assert database.close(0.1) is True
    assert account(database) == {"points": 3, "dropped": 3}
    assert caplog.messages[-1] == (
        "m: 3 lines were dropped at the end: no thread could be started to send them"
    )


def test_a_finaliser_that_sends_while_it_starts_does_not_start_a_second_batcher(
    make, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make()
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "celery_influx m":
            database.send_data(WHOLE)
        real(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        database.send_data(WHOLE)

    assert database.flush(5)
    assert account(database) == {"points": 2, "sent": 2}
    assert len([t for t in threading.enumerate() if t.name == "celery_influx m"]) == 1


@pytest.mark.parametrize("transport", ["udp", "http"])
def test_the_repr_tells_where_it_sends_and_no_secret(transport: str, make) -> None:
    database = make(
        transport=transport,
        host="influx.example",
        udp_port=8089,
        database="d",
        username="u",
        password="hunter2",
        token="hunter2",
    )

    address = {"udp": "udp://influx.example:8089", "http": "http://influx.example:8086/d"}
    assert repr(database) == f"<Database 'm' {address[transport]} started=False>"


# -- forks -------------------------------------------------------------------------------------


def test_who_has_kept_the_method_that_sends_may_use_it_after_a_close_and_a_fork(
    make, server: Server
) -> None:
    database = make()
    for round_ in range(2):
        database.send_data(point=WHOLE)  # by which it starts
        send = database.send_data
        send(WHOLE)
        send(point=WHOLE)
        send((WHOLE, WHOLE, WHOLE, WHOLE))
        assert database.close(5)
        send(WHOLE)
        assert database.flush(5)
        assert account(database) == {"points": 8 * (round_ + 1), "sent": 8 * (round_ + 1)}
    database.send_data(WHOLE)
    send = database.send_data

    def be_child() -> None:
        send(WHOLE)
        assert account(database)["points"] == 1
        assert database.close(5)
        assert account(database) == {"points": 1, "sent": 1}

    assert exit_code(fork(be_child)) == 0
    assert database.flush(5)
    assert account(database) == {"points": 17, "sent": 17}
    assert server.points(18) == [WHOLE] * 18


class Watched(Database):
    """A user's own, that looks at each point on its way."""

    seen: ClassVar[list[object]] = []

    def send_data(self, point: object) -> None:
        self.seen.append(point)
        super().send_data(point)


class Subclassed(Point):
    """A user's own."""


def test_send_data_is_a_method_like_any_other(make, server: Server) -> None:
    """With the extension, too, where it is called before anything of Python's is."""
    assert str(inspect.signature(Database.send_data)) == "(self, point: 'object') -> 'None'"
    assert inspect.isroutine(Database.send_data)
    assert weakref.ref(Database.send_data)() is Database.send_data
    assert Database.send_data.__qualname__ == "Database.send_data"
    assert (Database.send_data.__doc__ or "").startswith("Queue ``point`` for the next batch.")
    database = make()
    database.send_data(WHOLE)  # by which it starts
    for call in (
        lambda: database.send_data(point=WHOLE),
        lambda: Database.send_data(database, WHOLE),
        lambda: Database.send_data(database, point=WHOLE),
        lambda: database.send_data(Subclassed(*WHOLE)),
        lambda: methodcaller("send_data", WHOLE)(database),
        partial(database.send_data, WHOLE),
    ):
        assert call() is None
    assert database.flush(5)
    assert server.points(7) == [WHOLE] * 7
    for wrong in (
        partial(database.send_data),
        lambda: database.send_data(WHOLE, WHOLE),
        lambda: database.send_data(points=WHOLE),
        lambda: Database.send_data(WHOLE),
    ):
        with pytest.raises(TypeError, match=r"send_data\(\)"):
            wrong()
    with pytest.raises(AttributeError, match="_accept"):
        Database.send_data(cast("Database", WHOLE), WHOLE)


def test_send_data_may_be_patched_wrapped_and_overridden(make, server: Server) -> None:
    database = make()
    database.send_data(WHOLE)
    with mock.patch.object(Database, "send_data") as patched:
        database.send_data(WHOLE)
        patched.assert_called_once_with(WHOLE)
    with mock.patch.object(database, "send_data", autospec=True) as patched:
        with pytest.raises(TypeError, match="too many"):
            database.send_data(WHOLE, WHOLE)
        database.send_data(WHOLE)
        patched.assert_called_once_with(WHOLE)
        assert database.close(5)  # and it stays patched
        database.send_data(WHOLE)
        assert patched.call_count == 2
    database.send_data(WHOLE)
    assert database.flush(5)
    assert account(database) == {"points": 2, "sent": 2}
    watched = Watched(database.options)
    try:
        for _ in range(3):
            watched.send_data(WHOLE)
        assert watched.flush(5)
    finally:
        watched.close(5)
    assert Watched.seen == [WHOLE] * 3
    assert server.points(5) == [WHOLE] * 5


@pytest.mark.skipif(extension is None, reason="without the extension it is Python's")
def test_a_point_is_sent_with_no_python_of_ours(make) -> None:
    database = make()
    database.send_data(WHOLE)
    ran: list[str] = []
    sys.setprofile(
        lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None
    )
    try:
        for _ in range(3):
            database.send_data(WHOLE)
    finally:
        sys.setprofile(None)
    assert ran == []


def test_a_forked_child_does_not_send_the_parents_points_again(influxd: Influxd, make) -> None:
    influxd.query('DROP SERIES FROM "forked"')
    database = make(udp_port=influxd.udp_port, flush_interval=3_600.0, strict=True)
    for number in range(100):
        database.send_data(Point("forked", {"f": number}, {"of": "parent"}))
    assert account(database) == {"points": 100, "queued": 100}

    def be_child() -> None:
        assert account(database) == {}
        for number in range(50):
            database.send_data(Point("forked", {"f": number}, {"of": "child"}))
        assert database.flush(10)
        assert account(database) == {"points": 50, "sent": 50}
        assert database.close(5)

    assert exit_code(fork(be_child)) == 0
    assert database.flush(10)
    assert account(database) == {"points": 100, "sent": 100}

    wait_for(lambda: influxd.count("forked", "f") >= 150, 20)
    time.sleep(0.2)  # what is sent twice would come now
    rows = influxd.rows("forked")
    assert len(rows) == 150
    for who, count in (("parent", 100), ("child", 50)):
        assert sorted(row["f"] for row in rows if row["of"] == who) == list(range(count))


@pytest.mark.once
def test_a_forked_child_closes_none_of_the_numbers_it_inherited_later_on(
    make, server: Server, tmp_path
) -> None:
    database = make()
    database.send_data(WHOLE)
    assert database.flush(5)
    sockets = [sock.fileno() for sock in database._transport._sockets]
    gc.collect()  # what earlier tests left: it would close numbers in the child

    def be_child() -> None:
        # The numbers were free at once; they are another file's from now on.
        opened: list[int] = []
        while not opened or opened[-1] < max(sockets):
            opened.append(os.open(tmp_path / "mine", os.O_CREAT | os.O_RDWR))
        assert set(sockets) <= set(opened)
        gc.collect()
        database.send_data(WHOLE)
        assert database.flush(5)
        assert database.close(5)
        gc.collect()
        for number in opened:
            os.fstat(number)

    assert exit_code(fork(be_child)) == 0
    assert (tmp_path / "mine").read_bytes() == b""
    database.send_data(WHOLE)
    assert database.flush(5)
    assert len(server.points(3)) == 3


@pytest.mark.once
def test_what_a_forked_child_inherited_over_http_is_never_closed_by_a_finaliser(
    influxd: Influxd, make, tmp_path
) -> None:
    database = make(transport="http", http_port=influxd.http_port, database="celery")
    database.send_data(WHOLE)
    assert database.flush(5)
    database.ping()
    gc.collect()  # what earlier tests left: it would close numbers in the child

    def be_child() -> None:
        os.closerange(3, 256)  # as beat does
        opened = [os.open(tmp_path / "mine", os.O_CREAT | os.O_RDWR) for _ in range(100)]
        gc.collect()
        database.send_data(WHOLE)
        assert database.flush(5)
        database.ping()
        assert database.close(5)
        gc.collect()
        for number in opened:
            os.fstat(number)

    assert exit_code(fork(be_child)) == 0
    assert (tmp_path / "mine").read_bytes() == b""
    database.ping()
    database.send_data(WHOLE)
    assert database.flush(5)


def locks_of(database: Database) -> list[Any]:
    """Those that it may hold at a fork; the extension's buffer has none."""
    locks = (database._starting, getattr(database._buffer, "_lock", None), database._report._lock)
    return [lock for lock in locks if lock]


@pytest.mark.once
def test_children_forked_while_threads_send_and_flush_can_send_and_flush(
    make, server: Server
) -> None:
    database = make(flush_interval=0.01)
    held, stop = threading.Event(), threading.Event()
    threads = []

    def send() -> None:
        while not stop.is_set():
            database.send_data(Point("m", {"f": 1}, {"of": "parent"}))
            time.sleep(0.0005)

    def flush() -> None:
        while not stop.is_set():
            database.flush(1)

    def hold() -> None:
        """As a thread that the fork caught in the middle of it all."""
        while not stop.is_set():
            with contextlib.ExitStack() as stack:
                for lock in locks_of(database):
                    stack.enter_context(lock)
                held.set()
                time.sleep(0.003)
            held.clear()
            time.sleep(0.001)

    database.send_data(WHOLE)
    for work in (send, send, flush, hold):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    caught = 0
    try:
        for number in range(50):
            locks = tuple(locks_of(database))
            assert held.wait(10)

            def be_child(number: int = number, locks: tuple[Any, ...] = locks) -> None:
                were_held = not any(lock.acquire(blocking=False) for lock in locks)
                for i in range(3):
                    database.send_data(Point("m", {"f": i}, {"of": f"child{number}"}))
                assert database.flush(10)
                assert account(database) == {"points": 3, "sent": 3}
                os._exit(7 if were_held else 8)

            code = exit_code(fork(be_child))
            assert code in (7, 8)
            caught += code == 7
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert caught > 10
    assert database.flush(5)
    total = account(database)["sent"] + 150
    wait_for(lambda: len(server.lines) == total, 10)
    children = [line for line in server.lines if b"of=child" in line]
    assert len(children) == len(set(children)) == 150


def test_a_pool_child_hands_its_lines_to_the_worker_and_starts_nothing(
    make, server: Server
) -> None:
    database = make()
    counters = Counters(1, rows=2)
    relay = Relay(
        lambda _, lines: database.send_lines(lines), lambda _: None, Runs(lambda *_: None)
    )
    parent = os.getpid()

    def settle() -> None:
        row = 0 if os.getpid() == parent else 1
        database.begin(
            counters.row(0, row),
            lambda: counters.total(0),
            python_stamps(row),
            {},
            relay.end_for(0) if row else None,
        )

    database._settle = settle
    relay.start()

    def be_pool_child() -> None:
        relay.after_fork()
        for number in range(100):
            database.send_data(Point("m", {"f": number}))
        database.send_data({"oops": 1})
        assert database.flush(1)
        assert threading.active_count() == 1
        assert database._transport is None

    assert exit_code(fork(be_pool_child)) == 0
    assert relay.sync(5)
    assert database.flush(5)

    assert account(database) == {"points": 101, "sent": 100, "rejected": 1}
    assert len(server.points(100)) == 100
    assert relay.close(5)


# -- a server that does not keep up ------------------------------------------------------------


def rss() -> int:
    """Bytes of memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_with_a_server_that_hangs_memory_stays_within_the_limit_and_the_caller_is_not_held_up(
    make, hung: Hung, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    database = make(
        transport="http",
        http_port=hung.port,
        http_timeout=60.0,
        queue_size=50_000,
        queue_bytes=4_000_000,
    )
    point = Point("m", {"value": 1.5, "text": "x" * 40}, {"task": "shop.tasks.resize"})
    for _ in range(60_000):
        database.send_data(point)
    before = rss()
    clock = time.perf_counter_ns
    slow, slowest = 0, 0

    for _ in range(940_000):
        begin = clock()
        database.send_data(point)
        took = clock() - begin
        slow += took > 50_000
        slowest = max(slowest, took)

    assert rss() - before < 8_000_000
    assert database._buffer.bytes <= 4_000_000
    assert len(database._buffer) <= 50_000
    assert slow < 9_400, f"more than 1 % took longer than 50 µs; the slowest {slowest} ns"
    found = account(database)
    assert found["points"] == 1_000_000
    assert found["dropped"] > 900_000
    assert found["dropped"] + found["queued"] == 1_000_000


def test_flush_in_a_pool_child_says_if_the_worker_did_not_take_a_line(make) -> None:
    answers = iter([True, False, True])
    relay = RelayEnd(lambda line, begun: next(answers), pipe=-1, database=0)
    counters = Counters(1)
    database = make(
        settle=lambda: database.begin(
            counters.row(0),
            lambda: counters.total(0),
            python_stamps(1),
            {},
            relay=relay,
        )
    )

    database.send_data(WHOLE)
    first = database.flush()
    database.send_data([WHOLE, WHOLE])

    assert first
    assert not database.flush()
    assert database.flush()
    assert database.stats()["dropped"] == 1


def test_at_the_end_of_the_interpreter_what_waits_is_sent_without_a_plugin_too(
    server: Server,
) -> None:
    code = f"""
        from celery_influx.database import Database
        from celery_influx.options import DatabaseOptions
        from celery_influx.point import Point

        options = {{"host": "127.0.0.1", "udp_port": {server.port}, "flush_interval": 3_600}}
        kept = [Database(DatabaseOptions(name=name, **options)) for name in "ab"]
        for database in kept:
            database.send_data(Point("m", {{"f": 1}}, {{"database": database.name}}))
    """

    run = run_python(code)

    assert (run.returncode, run.stderr) == (0, "")
    assert {point.tags["database"] for point in server.points(2) if point.tags} == {"a", "b"}


def test_so_is_what_a_database_has_that_nobody_knows_any_more(server: Server) -> None:
    code = f"""
        import gc

        from celery_influx.database import Database
        from celery_influx.options import DatabaseOptions
        from celery_influx.point import Point

        options = {{"host": "127.0.0.1", "udp_port": {server.port}, "flush_interval": 3_600}}
        Database(DatabaseOptions(name="a", **options)).send_data(Point("m", {{"f": 1}}))
        gc.collect()
    """

    run = run_python(code)

    assert (run.returncode, run.stderr) == (0, "")
    assert server.points(1)
