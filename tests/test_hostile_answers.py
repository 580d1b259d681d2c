"""Whatever a server answers: nothing is raised, nothing hangs, every line is accounted for."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from celery_influx.batcher import Batcher
from celery_influx.buffer import make_buffer
from celery_influx.counters import POINTS, Counters
from celery_influx.delivery import Delivery
from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions
from celery_influx.report import Report
from celery_influx.spool import Spool
from celery_influx.transports.http import HTTPClient
from celery_influx.transports.servers import SERVERS
from tests.servers import wait_for

pytestmark = pytest.mark.once

#: Seconds, where only what comes of an answer is looked at, and where its time is.
TIMEOUT, PATIENCE = 0.05, 1.0
#: Timeouts of an attempt: one to connect, one for the head of the answer, two for its rest
#: (``Answer._read``: no piece is waited for once one is over, and ``bounded`` ends the last).
MOST_TIMEOUTS = 4
#: Seconds that all else of an attempt may take on a busy machine.
NOISE = 2.0
STATUSES = [204, 200, 400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 301, 307, 100, 101, 999, 0]
RETRY_AFTER = ["1", "-1", "0.5", "9" * 40, "1e300", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "²", ""]
BODIES = [
    b"",
    b"{}",
    b"[" * 50_000,
    b"\xff\xfe\x00" * 100,
    b'{"error": 5}',
    b'{"error": {"error": [null]}}',
    b'{"error": "partial write: points beyond retention policy dropped=1"}',
    b'{"error": "partial write: dropped=99999999999999999999999999"}',
    b'{"error": "partial write: unable to parse \'m\': missing fields dropped=-4"}',
    b'{"error": "field type conflict"}',
    b'{"code": "invalid", "message": "partial write", "line": 1e999}',
    b'{"error": "' + b"x" * 300_000 + b'"}',
    b"null",
    b'"text"',
    b"1" * 10_000,
]


def answer(chance: random.Random) -> bytes:
    """Like one of a server's, or a proxy's, or nobody's."""
    body = chance.choice(BODIES)
    headers = {
        "Content-Type": chance.choice(["application/json", "text/html", "", "a/b; charset=utf-99"])
    }
    if chance.random() < 0.3:
        headers["Retry-After"] = chance.choice(RETRY_AFTER)
    if chance.random() < 0.2:
        headers["X-Influxdb-Error"] = chance.choice(["é", "words", "partial write: dropped=1"])
    if chance.random() < 0.2:
        headers["Location"] = chance.choice(["/", "http://elsewhere.invalid/", "\x01", "file:///"])
    if chance.random() < 0.2:
        headers["Content-Encoding"] = chance.choice(["gzip", "deflate", "br", "x"])
        if chance.random() < 0.5:
            body = gzip.compress(body)
    way = chance.random()
    if way < 0.6:
        headers["Content-Length"] = str(len(body))
    elif way < 0.7:
        headers["Content-Length"] = chance.choice(
            ["-1", "x", "5, 6", str(len(body) // 2), "9" * 30]
        )
    elif way < 0.9:
        headers["Transfer-Encoding"] = "chunked"
        size = chance.choice([f"{len(body):x}", "zz", "-1", "f" * 20, ""])
        body = f"{size}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    if chance.random() < 0.3:
        headers["Connection"] = "close"
    head = f"HTTP/1.{chance.choice('01')} {chance.choice(STATUSES)} words\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in headers.items()
    )
    whole = bytearray(head.encode("latin-1", "replace") + b"\r\n" + body)
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        place = chance.randrange(min(len(whole), 300))
        change = chance.random()
        if change < 0.5:
            whole[place] = chance.randrange(256)
        elif change < 0.75:
            del whole[place : place + chance.randrange(20)]
        else:
            whole[place:place] = chance.randbytes(chance.randrange(1, 20))
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(2_000))
    if chance.random() < 0.05:
        return bytes(whole[: chance.randrange(len(whole))])
    return bytes(whole)


class Hostile:
    """A server that reads a request and answers as its dice say, until it is ``good``.

    One that is ``slow`` never hangs up: from a place on that its dice say, be it in the head or the
    body or behind them, its answer comes byte by byte, for ever, or nothing comes.
    """

    def __init__(self, seed: str, *, slow: bool = False) -> None:
        self.answered = 0
        self.good = False
        self.stored: list[bytes] = []
        self._slow = slow
        self._chance = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(5)
            try:
                while (body := self._read(client)) is not None:
                    self.answered += 1
                    if self.good:
                        self.stored += body.split(b"\n")
                        client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                        continue
                    if self._slow:
                        self._dawdle(client)
                        return
                    client.sendall(answer(self._chance))
                    if self._chance.random() < 0.5:
                        return
                    if self._chance.random() < 0.005:
                        time.sleep(2 * TIMEOUT)
            except OSError:
                return

    def _dawdle(self, client: socket.socket) -> None:
        whole = answer(self._chance)
        place = self._chance.choice([self._chance.randrange(200), len(whole)])
        drips = self._chance.random() < 0.5
        client.sendall(whole[:place])
        client.settimeout(PATIENCE / 5)
        rest = itertools.chain(whole[place:], itertools.repeat(32))
        while True:
            try:
                if not client.recv(1):
                    return  # it has hung up
            except TimeoutError:
                if drips:
                    client.sendall(bytes([next(rest)]))

    def _read(self, client: socket.socket) -> bytes | None:
        """The body of a request; None: there is no more."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = client.recv(65_536)
            if not more:
                return None
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        (length,) = [
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ] or [0]
        while len(body) < length:
            body += client.recv(65_536)
        return body


@pytest.fixture
def hostile(request: pytest.FixtureRequest) -> Iterator[Hostile]:
    server = Hostile(request.node.name)  # answers of its own
    yield server
    server.close()


LONG = [pytest.mark.long, pytest.mark.timeout(1_800)]


def options(server: Hostile, api: str, timeout: float = TIMEOUT) -> DatabaseOptions:
    return DatabaseOptions(
        transport="http",
        host="127.0.0.1",
        http_port=server.port,
        http_timeout=timeout,
        api=api,
        organization="acme",
        token="t",
    )


@pytest.mark.parametrize("answers", [150, pytest.param(10_000, marks=LONG)])
@pytest.mark.parametrize("api", ["1", "2", "3"])
def test_no_answer_breaks_delivery(
    hostile: Hostile, answers: int, api: str, tmp_path: Path
) -> None:
    now = [0.0]
    counters = Counters(1)
    report = Report(logging.getLogger("tests.hostile"), clock=lambda: now[0])
    client = HTTPClient(options(hostile, api))
    row = counters.row(0)
    delivery = Delivery(
        "metrics",
        client,
        row,
        report,
        retry_age=600,
        retry_tries=3,
        spool=Spool("metrics", "here", str(tmp_path), 10_000_000, row, report),
        clock=lambda: now[0],
    )
    delivery.open()
    given, longest = 0, 0.0
    while hostile.answered < answers:
        before = time.monotonic()
        now[0] += delivery.wait
        if delivery.held:
            delivery.retry()
        elif hostile.answered % 2 or not delivery.catch_up():
            lines = [b"m n=%di" % number for number in range(given, given + 5)]
            given += len(lines)
            delivery.deliver(lines)
        longest = max(longest, time.monotonic() - before)
    for _ in range(200):
        if delivery.held:
            now[0] += delivery.wait
            delivery.retry()
    assert not delivery.held
    client.close()

    found = counters.total(0)
    settled = sum(found[name] for name in ("sent", "dropped", "lost", "rejected"))
    in_spool = 0
    spool = delivery._spool
    assert spool
    while (lines_there := spool.head()) is not None:
        in_spool += len(lines_there)
        spool.pop()
    assert settled + in_spool == given
    assert longest < MOST_TIMEOUTS * TIMEOUT + NOISE
    print(
        f"{hostile.answered:,} answers; the longest attempt took {longest:.2f} s; "
        + json.dumps({name: count for name, count in found.items() if count})
    )
    delivery.close()


@pytest.mark.alone
@pytest.mark.parametrize("answers", [100, pytest.param(10_000, marks=LONG)])
def test_no_answer_takes_longer_than_the_timeouts_of_an_attempt(answers: int) -> None:
    server = Hostile("slow", slow=True)
    apis = list(SERVERS)

    def attempt(number: int) -> float:
        with HTTPClient(options(server, apis[number % len(apis)], PATIENCE)) as client:
            before = time.monotonic()
            with contextlib.suppress(SendError):
                client.write(b"m n=1i")
            return time.monotonic() - before

    # Nearly all of them only wait.
    with ThreadPoolExecutor(50) as pool:
        took = list(pool.map(attempt, range(answers)))
    server.close()

    assert server.answered >= answers
    slow = [seconds for seconds in took if seconds > PATIENCE * 0.9]
    print(f"{len(slow):,} of {answers:,} answers were waited for, at most {max(took):.2f} s")
    assert len(slow) > answers // 4  # about half of them, as the dice fall
    assert max(took) < MOST_TIMEOUTS * PATIENCE + NOISE


@pytest.mark.parametrize("answers", [60, pytest.param(10_000, marks=LONG)])
@pytest.mark.parametrize("api", list(SERVERS))
def test_no_answer_breaks_the_thread_above_a_spool(
    hostile: Hostile, answers: int, api: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]

    def sleep(sleeper: threading.Lock, timeout: float) -> None:
        """An hour is over in a moment, if nobody wakes it."""
        if not sleeper.acquire(timeout=0.001):
            now[0] += timeout

    def clock() -> float:
        return now[0]

    counters = Counters(1)
    report = Report(logging.getLogger("tests.hostile"))
    buffer, row = make_buffer(100_000, 10_000_000), counters.row(0)
    delivery = Delivery(
        "metrics",
        HTTPClient(options(hostile, api)),
        row,
        report,
        retry_age=600,
        retry_tries=3,
        spool=Spool("metrics", "here", str(tmp_path), 10_000_000, row, report, clock=clock),
        clock=clock,
    )
    batcher = Batcher(
        "metrics",
        buffer,
        delivery,
        row,
        report,
        batch_size=10,
        flush_interval=60,
        clock=clock,
        sleep=sleep,
    )

    def put(lines: list[bytes]) -> None:
        row[POINTS] += len(lines)
        buffer.put(lines)
        batcher.wake()

    def queued() -> int:
        return counters.total(0)["queued"]

    while (answered := hostile.answered) < answers:
        put([b"m n=%di" % number for number in range(row[POINTS], row[POINTS] + 15)])
        wait_for(lambda: hostile.answered > answered, 30, "an attempt is made")
    hostile.good = True
    while before := queued():  # it has become used to single lines, so they may be many requests
        wait_for(lambda: queued() < before, 30, "the fate of more lines is known")
    put([b"m n=-1i"])
    wait_for(lambda: b"m n=-1i" in hostile.stored, 30, "a good server gets the next point")
    wait_for(lambda: not queued(), 30, "and has said so")

    assert batcher._thread.is_alive()
    assert batcher.close(5)
    found = counters.total(0)
    settled = sum(found[name] for name in ("sent", "dropped", "lost", "rejected"))
    assert settled == found["points"]
    assert found["spooled"] > 0
    assert found["adopted"] == found["dropped"] == 0
    assert not [text for text in caplog.messages if "unexpectedly" in text]
    print(
        f"{hostile.answered:,} answers; "
        + json.dumps({name: count for name, count in found.items() if count})
    )


def test_the_thread_lives_on(hostile: Hostile) -> None:
    counters = Counters(1)
    report = Report(logging.getLogger("tests.hostile"))
    buffer, row = make_buffer(100_000, 10_000_000), counters.row(0)
    delivery = Delivery("metrics", HTTPClient(options(hostile, "1")), row, report)
    delivery.LONGEST_WISH = 0.01  # a wish to wait for an hour would be obeyed
    batcher = Batcher("metrics", buffer, delivery, row, report, batch_size=10, flush_interval=3_600)
    for number in range(500):
        buffer.put([b"m n=%di" % number])
    all_went_out = batcher.flush(60)

    found = counters.total(0)
    assert sum(found[name] for name in ("sent", "lost", "rejected")) == 500
    assert 0 < found["sent"] < 500
    assert not all_went_out
    hostile.good = True

    def one_goes_out() -> bool:
        buffer.put([b"m n=-1i"])
        return batcher.flush(10)

    wait_for(one_goes_out, 30, "a good server gets the next point")
    assert hostile.stored[-1] == b"m n=-1i"
    assert batcher._thread.is_alive()
    batcher.close(5)
