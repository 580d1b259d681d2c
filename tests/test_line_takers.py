"""Other takers of lines than InfluxDB, as strict as their documents are: Telegraf and QuestDB.

None of them was there to be tried. Each rule of a stand-in names where it is written. What they
have in common with InfluxDB, whether a line can be read and as what, is judged by our own
``line_reader``: it is no judge in its own cause, since conformance/test_same_verdict.py proves that
it says the same as the real influxd, of tables of odd lines and of random ones.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_influx.database import Database
from celery_influx.errors import DecodeError
from celery_influx.line_reader import decode, parse
from celery_influx.measurements import MEASUREMENTS
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from tests.servers import wait_for
from tests.test_http import Stub, serving
from tests.test_tcp import Listener

pytestmark = pytest.mark.once

TELLING = {"a b,c=d": "x y,z=w", "plain": "größe ☃", "path": "c:\\temp"}
POINTS = [
    Point("m x,y", {"f": 0.1, "whole": 7.0, "i": -(2**63), "yes": True}, TELLING, 1),
    Point("m", {"s": 'say "so", a=b \\ c', "empty": ""}, None, 2),
    Point("m", {"f": 5e-324}, {"t": "="}, 1_600_000_000_000_000_000),
]
WITH_NEWLINE = Point("m", {"s": 'a\nforged,t=a f=1 5\nb "c"'}, None, 3)


def expected(points: list[Point]) -> list[tuple[Any, ...]]:
    return [(p.measurement, dict(p.fields), dict(p.tags or {}), p.timestamp) for p in points]


def send(options: DatabaseOptions, points: list[Point]) -> dict[str, int]:
    """Through all that is above a transport; the account of it."""
    database = Database(options)
    database.send_data(points)
    assert database.flush(5)
    assert database.close(5)
    return database.stats()


# -- Telegraf's socket_listener ----------------------------------------------------------------
# https://github.com/influxdata/telegraf/tree/master/plugins/inputs/socket_listener


def over_tcp(stream: bytes) -> list[Point]:
    """``splitting_strategy``: split at newlines (default), and each message is parsed by itself."""
    return [point for message in stream.split(b"\n") for point in taken(message)]


def taken(message: bytes) -> list[Point]:
    """A message with anything wrong in it gives no metric at all (plugins/parsers/influx)."""
    points, refused = parse(message)
    return [] if refused else points


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener(0)
    yield made
    made.close()


def test_telegraf_takes_all_points_by_tcp_and_none_that_nobody_sent(listener: Listener) -> None:
    options = DatabaseOptions(
        transport="tcp", host="127.0.0.1", tcp_port=listener.port, http_port=0
    )
    stats = send(options, [*POINTS, WITH_NEWLINE])

    wait_for(lambda: listener.came and listener.came[0].count(b"\n") == len(POINTS), 5)
    assert expected(over_tcp(listener.came[0])) == expected(POINTS)
    assert (stats["sent"], stats["rejected"]) == (len(POINTS), 1)


@pytest.mark.parametrize("transport", ["udp", "unixgram"])
def test_telegraf_takes_all_points_by_datagrams(transport: str, tmp_path: Path) -> None:
    family = {"udp": socket.AF_INET, "unixgram": socket.AF_UNIX}[transport]
    path = str(tmp_path / "telegraf.sock")
    # ``read_buffer_size``, default 64KiB, is also the longest datagram that it reads.
    buffer = 65_536
    many = [Point("m", {"s": "x" * 90, "f": float(at)}, None, at) for at in range(1_000)]
    came: list[bytes] = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(path if transport == "unixgram" else ("127.0.0.1", 0))
        sock.settimeout(5)
        where = (
            {"socket_path": path}
            if transport == "unixgram"
            else {"udp_port": sock.getsockname()[1]}
        )
        options = DatabaseOptions(transport=transport, host="127.0.0.1", http_port=0, **where)

        def read() -> None:
            while sum(len(taken(datagram)) for datagram in came) < len(many) + len(POINTS) + 1:
                came.append(sock.recv(buffer))

        reader = threading.Thread(target=read)
        reader.start()
        stats = send(options, [*POINTS, WITH_NEWLINE, *many])
        reader.join(10)

    points = [point for datagram in came for point in taken(datagram)]
    assert expected(points) == expected([*POINTS, WITH_NEWLINE, *many])
    assert stats["sent"] == len(points)


# -- Telegraf's influxdb_listener --------------------------------------------------------------
# https://github.com/influxdata/telegraf/tree/master/plugins/inputs/influxdb_listener


class TelegrafHTTP:
    """What it takes and answers."""

    def __init__(self, stub: Stub) -> None:
        self.stored: list[bytes] = []
        self.precision = ""
        self.max_body_size = 32 << 20  # the default of its option of that name
        stub.answer = self._answer
        self.options: dict[str, Any] = {
            "transport": "http", "host": "127.0.0.1", "http_port": stub.port,
        }  # fmt: skip

    def _answer(self, handler: Any) -> None:
        path = handler.path.partition("?")[0]
        if path == "/ping":
            handler.reply(204, X_Influxdb_Version="1.0")
        elif (
            path == "/query"
        ):  # "a dummy response … as some clients test availability with a query"
            handler.reply(200, b'{"results":[]}', X_Influxdb_Version="1.0")
        elif path == "/write" and len(handler.body) > self.max_body_size:
            handler.reply(413, b'{"error": "http: request body too large"}')
        elif path == "/write":
            # "precision … one of ns, u, ms, s, m, h. All other parameters are ignored"
            (self.precision,) = handler.query["precision"]
            assert self.precision in ("ns", "u", "ms", "s", "m", "h")
            bad = 0
            for line in handler.body.split(b"\n"):
                try:
                    decode(line)
                    self.stored.append(line)
                except DecodeError:
                    bad += 1  # "Continue parsing metrics even if some are malformed"
            others = f" (and {bad - 1} other parse error{'s' * (bad > 2)})" if bad > 1 else ""
            text = {"error": f'metric parse error: expected field at 1:4: "bad"{others}'}
            handler.reply(400, json.dumps(text).encode()) if bad else handler.reply(204)
        else:
            handler.reply(404, b"404 page not found")


@pytest.fixture
def telegraf() -> Iterator[TelegrafHTTP]:
    with serving() as stub:
        yield TelegrafHTTP(stub)


@pytest.mark.parametrize(
    ("precision", "unit"), [("ns", 1), ("u", 10**3), ("ms", 10**6), ("s", 10**9)]
)
def test_telegraf_takes_all_points_by_http_in_every_precision(
    telegraf: TelegrafHTTP, precision: str, unit: int
) -> None:
    points = [point._replace(timestamp=10**18 + at * unit) for at, point in enumerate(POINTS)]
    stats = send(DatabaseOptions(**telegraf.options, precision=precision), points)

    assert telegraf.precision == precision
    stored = [decode(line, unit) for line in telegraf.stored]
    assert expected([p._replace(timestamp=p.timestamp * unit) for p in stored]) == expected(points)
    assert (stats["sent"], stats["rejected"]) == (len(points), 0)


def test_of_lines_that_telegraf_takes_in_part_the_bad_ones_are_found_and_no_other_is_lost(
    telegraf: TelegrafHTTP,
) -> None:
    lines = [b"m f=%d %d" % (at, at) for at in range(500)]
    bad = {7, 8, 499}
    database = Database(DatabaseOptions(**telegraf.options))
    assert database.ping().version == "1.0"
    database.send_lines([b"bad" if at in bad else line for at, line in enumerate(lines)])
    database.flush(10)

    # It says of none which it was. What it took comes again, which is the same point in a database.
    assert set(telegraf.stored) == {line for at, line in enumerate(lines) if at not in bad}
    stats = database.stats()
    assert (stats["sent"], stats["rejected"], stats["lost"]) == (497, 3, 0)
    assert database.close()


def test_what_is_too_long_for_telegraf_comes_in_parts(telegraf: TelegrafHTTP) -> None:
    lines = [b"m f=%d %d" % (at, at) for at in range(500)]
    telegraf.max_body_size = len(b"\n".join(lines)) // 3
    database = Database(DatabaseOptions(**telegraf.options))
    database.send_lines(lines)
    assert database.flush(10)

    assert telegraf.stored == lines
    stats = database.stats()
    assert (stats["sent"], stats["rejected"]) == (500, 0)
    assert stats["errors_refused"] > 0
    assert database.close()


# -- QuestDB over TCP --------------------------------------------------------------------------

#: https://questdb.com/docs/ingestion/ilp/advanced-settings/ "Name restrictions"
TABLE = re.compile(r'(?!\.)[^\n\r?,”"\\/:)(+*%~\x00-\x1f\x7f]+(?<!\.)')
COLUMN = re.compile(r'[^\n\r?.,”"\\/:)(+\-*%~\x00-\x1f\x7f]+')


class QuestDB:
    """Reads one stream as it does, up to the first line that it does not take."""

    def __init__(self, stream: bytes) -> None:
        self.rows: list[Point] = []
        self.hung_up = False
        # "Each InfluxDB Line Protocol message has to end with a new line": the rest is none yet.
        for line in stream.split(b"\n")[:-1]:
            try:
                self._take(decode(line))
            except (DecodeError, ValueError):
                # line.tcp.disconnect.on.error, by default: "valid lines up to that point" stay.
                # https://questdb.com/docs/configuration/ingestion/
                self.hung_up = True
                return

    def _take(self, point: Point) -> None:
        columns = [*(point.tags or {}), *point.fields]
        good = TABLE.fullmatch(point.measurement) and all(map(COLUMN.fullmatch, columns))
        # "Symbol columns before other columns" and quoted strings are line protocol's as well; a
        # string's own newline would have to be escaped there, and a timestamp is of ns.
        if not good or len(set(columns)) < len(columns):
            raise ValueError(columns)
        self.rows.append(point)


def test_questdb_takes_all_points_and_is_never_given_a_line_that_it_hangs_up_for(
    listener: Listener,
) -> None:
    points = [
        Point("m x", {"f": 0.1, "i": 7, "yes": True, "s": 'say "so", \\'}, {"a b": "x y,z=\\w"}, 1),
        Point("m", {"f": 1.0}, None, 1_600_000_000_000_000_000),
    ]
    options = DatabaseOptions(
        transport="tcp", host="127.0.0.1", tcp_port=listener.port, http_port=0
    )
    stats = send(options, [points[0], WITH_NEWLINE, points[1]])

    wait_for(lambda: listener.came and listener.came[0].count(b"\n") == 2, 5)
    found = QuestDB(listener.came[0])
    assert expected(found.rows) == expected(points)
    assert not found.hung_up
    assert (stats["sent"], stats["rejected"]) == (2, 1)
    # What it would do with the line that was refused.
    assert QuestDB(b'm s="a\nb" 3\nm f=1 4\n').rows == []


def test_questdb_takes_every_name_that_this_package_writes() -> None:
    for measurement in MEASUREMENTS:
        assert TABLE.fullmatch(measurement.name)
        names = [column.name for column in measurement.columns]
        assert all(map(COLUMN.fullmatch, names))
        # A column for the time is there by itself, and names differ by more than their case.
        assert len({name.lower() for name in [*names, "timestamp"]}) == len(names) + 1
