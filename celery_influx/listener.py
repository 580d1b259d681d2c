"""A small UDP and HTTP line-protocol server for development and tests, as strict as influxd.

What influxd 1.6.7 refuses it refuses, in the same words. Simpler than influxd: it has one
database and keeps it in memory, in shards of a week; there is no authentication and no InfluxQL;
each datagram is written by itself, where influxd writes those of a moment together; and a
measurement or field key that is no UTF-8 is always refused, where influxd, in a shard that exists,
takes it and cannot open the shard when it starts again.

Run it: ``python -m celery_influx.listener``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery_influx.line_reader import parse
from celery_influx.point import Point

VERSION = "1.6.7"
MAX_BODY_BYTES = 25_000_000
_UNITS = {
    "u": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_TYPE_WORDS = {float: "float", int: "integer", str: "string", bool: "boolean"}
# Reasons with which influxd fails in storing and loses the whole batch.
_FATAL = ("proto", "engine")
_REFUSED_KEPT = 1000
_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")
_TOO_OLD = "points beyond retention policy"
_CONFLICT = "field type conflict"
_DAY = 86_400 * 10**9


@dataclass
class Received:
    """What has arrived so far. ``lines`` counts refused ones too, but no comments or blanks."""

    datagrams: int = 0
    requests: int = 0
    bytes: int = 0
    lines: int = 0


class Listener:
    """Listens from ``start()`` to ``close()``, or as a context manager.

    Args:
        host: The address to listen on.
        udp_port: 0 takes a free one.
        http_port: 0 takes a free one.
        database: The name of its one database.
        udp_precision: The unit in which the times of datagrams are read: "", which is "ns",
            "u", "ms" or "s".
        retention: Points that are older than this many seconds when they come are dropped, as
            by a retention policy; ``None``: none are. What was stored stays.
        verbose: Print each point and each refusal.
        max_points: Keep this many points at most, the newest; ``None``: all.

    Attributes:
        received: Counters of what has arrived.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        udp_port: int = 0,
        http_port: int = 0,
        database: str = "celery",
        *,
        udp_precision: str = "",
        retention: float | None = None,
        verbose: bool = False,
        max_points: int | None = None,
    ) -> None:
        self.host = host
        self.database = database
        self.received = Received()
        self._ports = (udp_port, http_port)
        self._udp_unit = _UNITS.get(udp_precision, 1)
        self._retention = None if retention is None else round(retention * 1_000_000_000)
        self._verbose = verbose
        self._max_points = max_points
        self._refused: deque[str] = deque(maxlen=_REFUSED_KEPT)
        self._rows: dict[tuple[str, frozenset[tuple[str, str]], int], dict[str, Any]] = {}
        #: By shard, of which each has types of its own.
        self._types: dict[int, dict[tuple[str, str], type]] = {}
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._udp: socket.socket | None = None
        self._http: _HTTPServer | None = None
        self._closed = False

    def start(self) -> Listener:
        """Take the ports and begin to listen. Raises OSError where a port is taken."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            # The kernel grants what its rmem_max allows; a burst waits there until it is read.
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024 * 1024)
            udp.bind((self.host, self._ports[0]))
            udp.setblocking(False)
            self._http = _HTTPServer((self.host, self._ports[1]), family, self)
        except OSError:
            udp.close()
            raise
        self._udp = udp
        self._ports = (udp.getsockname()[1], self._http.server_address[1])
        self._threads = [
            threading.Thread(target=self._serve_udp, args=(udp,), name="listener-udp", daemon=True),
            threading.Thread(target=self._http.run, name="listener-http", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Stop listening; what was received stays readable. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._udp is None or self._http is None:
            return
        with contextlib.suppress(OSError):
            self._udp.shutdown(socket.SHUT_RDWR)  # wakes its thread, on Linux
        self._http.shutdown()
        for thread in self._threads:
            thread.join(5)
        self._http.server_close()
        self._udp.close()

    def __enter__(self) -> Listener:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.udp_url} {self.http_url}"
        return (
            f"<Listener {self.database!r} {state} points={len(self._rows)}"
            f" refused={len(self._refused)}>"
        )

    @property
    def udp_port(self) -> int:
        """The UDP port it listens on."""
        return self._ports[0]

    @property
    def http_port(self) -> int:
        """The TCP port it listens on."""
        return self._ports[1]

    @property
    def udp_url(self) -> str:
        """For ``influx_databases``."""
        return f"udp://{self._address}:{self.udp_port}"

    @property
    def http_url(self) -> str:
        """For ``influx_databases``, and for ``POST /write``."""
        return f"http://{self._address}:{self.http_port}"

    @property
    def _address(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def refused(self) -> list[str]:
        """Why lines, points or requests were refused; the newest 1,000."""
        with self._changed:
            return list(self._refused)

    def points(self, measurement: str | None = None) -> list[Point]:
        """All points, or those of one measurement, in the order in which they first came.

        Timestamps are nanoseconds. As in InfluxDB, two writes of the same measurement, tags and
        timestamp are one point with the fields of both, the later value of each.
        """
        with self._changed:
            return [
                Point(name, dict(fields), dict(sorted(tags)) or None, timestamp)
                for (name, tags, timestamp), fields in self._rows.items()
                if measurement is None or name == measurement
            ]

    def count(self, measurement: str, field: str | None = None) -> int:
        """How many points ``measurement`` has; with ``field``, how many of them have it."""
        points = self.points(measurement)
        return len(points) if field is None else sum(field in point.fields for point in points)

    def wait_for(
        self, predicate_or_count: Callable[[], object] | int, timeout: float = 5.0
    ) -> None:
        """Wait until there are that many points, or the predicate is true.

        Raises:
            TimeoutError: It did not come true within ``timeout`` seconds.
        """
        wanted = predicate_or_count
        predicate = wanted if callable(wanted) else lambda: len(self._rows) >= wanted
        with self._changed:
            if not self._changed.wait_for(predicate, timeout):
                refused = "".join(f"\n  {text[:300]}" for text in list(self._refused)[-5:])
                what = "the condition" if callable(wanted) else f"{wanted} points"
                raise TimeoutError(f"{what}: not within {timeout} s; {self!r}{refused}")

    # -- UDP -----------------------------------------------------------------------------------

    def _serve_udp(self, udp: socket.socket) -> None:
        """Empty the kernel's buffer first; only when it is empty, read what came.

        One thread on purpose: with a second one that parses, each recv() waits for the
        interpreter's lock, and of a burst of 20,000 datagrams a fifth was lost.
        """
        waiting: deque[bytes] = deque()
        while not self._closed:
            try:
                waiting.append(udp.recv(65536))
            except BlockingIOError:
                if waiting:
                    self._take(waiting.popleft())
                else:
                    select.select([udp], [], [], 0.2)
            except OSError:
                break

    def _take(self, datagram: bytes) -> None:
        points, reasons = parse(datagram, self._udp_unit)
        fatal = [text for text in reasons if text.startswith(("unable to parse", *_FATAL))]
        with self._changed:
            self.received.datagrams += 1
            self._count(datagram, points, reasons)
            if fatal:
                lost = f"the whole datagram is dropped, {len(points)} good points with it"
                self._refuse(f"{fatal[0]}; {lost}")
            else:
                for reason in reasons + self._store(points, self._udp_unit):
                    self._refuse(reason)
            self._changed.notify_all()

    # -- HTTP ----------------------------------------------------------------------------------

    def write(self, body: bytes, precision: str = "", policy: str = "") -> tuple[int, str]:
        """What ``POST /write`` does with its body: the status and the error, "" if none."""
        # influxd takes a precision it does not know as nanoseconds.
        unit = _UNITS.get(precision, 1)
        points, reasons = parse(body, unit)
        with self._changed:
            self.received.requests += 1
            self._count(body, points, reasons)
            status, error = self._write(points, reasons, unit, policy)
            if error:
                self._refuse(error)
            self._changed.notify_all()
            return status, error

    def _write(
        self, points: list[Point], reasons: list[str], unit: int, policy: str
    ) -> tuple[int, str]:
        unparsed = [text for text in reasons if text.startswith("unable to parse")]
        broken = [text for text in reasons if text.startswith(_FATAL)]
        dropped = [text for text in reasons if text.startswith(("invalid", "field type"))]
        if unparsed and not points and not broken and not dropped:
            return 400, "\n".join(unparsed)
        if policy not in ("", "autogen") and (points or broken or dropped):
            return 500, f"retention policy not found: {policy}"
        if broken:
            return 500, broken[0]
        dropped += self._store(points, unit)
        if _CONFLICT in dropped:
            return 400, _CONFLICT
        # influxd first parts the points by their age, and says that last.
        dropped = [text for text in dropped if text != _TOO_OLD] or dropped
        if dropped:
            return 400, f"partial write: {dropped[0]} dropped={len(dropped)}"
        if unparsed:
            return 400, f"partial write: {chr(10).join(unparsed)} dropped=0"
        return 204, ""

    def refuse(self, reason: str) -> None:
        """Note why a request was refused before its body was looked at."""
        with self._changed:
            self.received.requests += 1
            self._refuse(reason)
            self._changed.notify_all()

    # -- both, under the lock ------------------------------------------------------------------

    def _count(self, payload: bytes, points: list[Point], reasons: list[str]) -> None:
        self.received.bytes += len(payload)
        self.received.lines += len(points) + len(reasons)

    def _store(self, points: list[Point], unit: int) -> list[str]:
        """Store the points; why some were dropped."""
        now = time.time_ns()
        dropped = []
        shards: dict[int, list[tuple[int, Point]]] = {}
        for point in points:
            ticks = point.timestamp if isinstance(point.timestamp, int) else now // unit
            if self._retention is not None and ticks * unit < now - self._retention:
                dropped.append(_TOO_OLD)
            else:
                week = (ticks * unit + 3 * _DAY) // (7 * _DAY)  # they begin on Mondays
                shards.setdefault(week, []).append((ticks * unit, point))
        for shard, rows in shards.items():
            old = shard in self._types
            types = self._types.setdefault(shard, {})
            reasons = self._store_in(types, rows)
            # influxd tries again what fails, but not the attempt that makes the shard.
            if old and reasons == [_CONFLICT]:
                reasons = self._store_in(types, rows)
            dropped += reasons
        return dropped

    def _store_in(
        self, types: dict[tuple[str, str], type], rows: list[tuple[int, Point]]
    ) -> list[str]:
        """Store in one shard: nothing, where points differ in the type of a new field."""
        conflicts = [_type_conflict(types, point) for _, point in rows]
        kept = [row for row, conflict in zip(rows, conflicts, strict=True) if not conflict]
        rows[: len(kept)] = kept  # as influxd does, for its second attempt
        for _, point in kept:
            for field, value in point.fields.items():
                if types.setdefault((point.measurement, field), type(value)) is not type(value):
                    return [_CONFLICT]
        for timestamp, point in kept:
            key = (point.measurement, frozenset((point.tags or {}).items()), timestamp)
            self._rows.setdefault(key, {}).update(point.fields)
            if self._max_points is not None and len(self._rows) > self._max_points:
                del self._rows[next(iter(self._rows))]
            if self._verbose:
                _say(_readable(point, timestamp))
        return [conflict for conflict in conflicts if conflict]

    def _refuse(self, reason: str) -> None:
        self._refused.append(reason)
        if self._verbose:
            _say(f"REFUSED {reason}")


def _type_conflict(types: dict[tuple[str, str], type], point: Point) -> str:
    for field, value in point.fields.items():
        known = types.get((point.measurement, field), type(value))
        if known is not type(value):
            return (
                f'field type conflict: input field "{field}" on measurement'
                f' "{point.measurement}" is type {_TYPE_WORDS[type(value)]}, already exists as'
                f" type {_TYPE_WORDS[known]}"
            )
    return ""


class _HTTPServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], family: socket.AddressFamily, listener: Listener
    ) -> None:
        self.address_family = family
        self.listener = listener
        super().__init__(address, _Handler)

    def run(self) -> None:
        self.serve_forever(poll_interval=0.02)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is none of a test's business."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _TooLargeError(Exception):
    """The body is longer than influxd's default ``max-body-size``."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer goes in two writes, the second of which would wait 40 ms for its peer.
    disable_nagle_algorithm = True
    server: _HTTPServer

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
        """Say nothing; the listener prints what matters."""

    def _route(self, method: str) -> None:
        self._params = {
            key: values[-1]
            for key, values in parse_qs(urlsplit(self.path).query, keep_blank_values=True).items()
        }
        try:
            body = self._body()
        except _TooLargeError:
            self.close_connection = True
            return self._answer(413, {"error": "Request Entity Too Large"})
        except (zlib.error, EOFError):
            return self._answer(400, {"error": "unexpected EOF"})
        path = urlsplit(self.path).path
        if path == "/ping" and method in ("GET", "HEAD"):
            return self._answer(204)
        if path == "/write":
            if method != "POST":
                return self._answer(405)
            return self._write(body)
        if path == "/query" and method in ("GET", "POST"):
            if body and self.headers.get("Content-Type", "").startswith("application/x-www-form"):
                form = parse_qs(body.decode("utf-8", "replace"))
                self._params |= {key: values[-1] for key, values in form.items()}
            return self._query()
        return self._answer(404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                if len(body) + size > MAX_BODY_BYTES:
                    raise _TooLargeError
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
        else:
            length = int(self.headers.get("Content-Length") or 0)
            if length > MAX_BODY_BYTES:
                raise _TooLargeError
            body = self.rfile.read(length)
        if body and self.headers.get("Content-Encoding") == "gzip":
            inflater = zlib.decompressobj(wbits=31)
            body = inflater.decompress(body)
            if not inflater.eof:
                raise EOFError
        return body

    def _write(self, body: bytes) -> None:
        listener = self.server.listener
        database = self._params.get("db", "")
        if database != listener.database:
            missing = f'database not found: "{database}"'
            return self._refuse(*((404, missing) if database else (400, "database is required")))
        precision, policy = self._params.get("precision", ""), self._params.get("rp", "")
        status, error = listener.write(body, precision, policy)
        return self._answer(status, {"error": error} if error else None)

    def _refuse(self, status: int, error: str) -> None:
        self.server.listener.refuse(error)
        self._answer(status, {"error": error})

    def _query(self) -> None:
        name = self.server.listener.database
        statement = self._params.get("q", "").strip().rstrip(";")
        if re.fullmatch(r"(?i)show\s+databases", statement):
            series = {"name": "databases", "columns": ["name"], "values": [[name]]}
            return self._answer(200, {"results": [{"statement_id": 0, "series": [series]}]})
        created = re.fullmatch(r'(?i)create\s+database\s+"?(.+?)"?', statement)
        if created and created[1] == name:
            return self._answer(200, {"results": [{"statement_id": 0}]})
        error = (
            "this is celery_influx's development listener: it has one database,"
            f" {name!r}, and answers no InfluxQL but SHOW DATABASES; got {statement[:200]!r}"
        )
        return self._answer(400, {"error": error})

    def _answer(self, status: int, document: dict[str, Any] | None = None) -> None:
        body = b"" if document is None else json.dumps(document).encode() + b"\n"
        self.send_response(status)
        self.send_header("X-Influxdb-Version", VERSION)
        if document is not None:
            self.send_header("Content-Type", "application/json")
            if "error" in document:
                # Bytes go as they are, but in one line; and not more of them than of influxd.
                header = document["error"].encode()[:1024].translate(_ONE_LINE).decode("latin-1")
                self.send_header("X-Influxdb-Error", header.strip(" \t"))
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _say(text: str) -> None:
    print(text, flush=True)


def _readable(point: Point, timestamp: int) -> str:
    clock = datetime.fromtimestamp(timestamp // 1_000_000_000, timezone.utc)
    when = f"{clock:%Y-%m-%d %H:%M:%S}.{timestamp % 1_000_000_000:09}"
    tags = "".join(f" {key}={value}" for key, value in sorted((point.tags or {}).items()))
    fields = " ".join(f"{key}={value!r}" for key, value in point.fields.items())
    return f"{when} {point.measurement}{tags} | {fields}"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m celery_influx.listener``: listen and print until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m celery_influx.listener",
        description="Listen as InfluxDB 1.x does and print each point, or why it is refused.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--udp-port", type=int, default=8089, help="default: %(default)s")
    parser.add_argument("--http-port", type=int, default=8086, help="default: %(default)s")
    parser.add_argument("--database", default="celery", help="default: %(default)s")
    options = parser.parse_args(arguments)
    stop = threading.Event()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    listener = Listener(
        options.host,
        options.udp_port,
        options.http_port,
        options.database,
        verbose=True,
        max_points=10_000,
    )
    try:
        listener.start()
    except OSError as error:
        parser.exit(
            1,
            f"cannot listen on {options.host}, UDP {options.udp_port} and TCP"
            f" {options.http_port}: {error}. Is InfluxDB running? Choose other ports\n",
        )
    with contextlib.closing(listener):
        where = f"{listener.udp_url} and {listener.http_url}"
        _say(f"database {listener.database!r} at {where}; end with Ctrl-C")
        stop.wait()
    received = listener.received
    _say(f"{received.lines} lines in {received.datagrams} datagrams, {received.requests} requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
