"""HTTPClient against servers that are broken, or mean it: each costs a bounded time and memory, and
ends in an error that says so. What is odd but harmless is in test_http.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from typing import Any, NamedTuple

import pytest

from celery_influx.errors import QueryError, SendError
from celery_influx.options import DatabaseOptions
from celery_influx.transports import bounded
from celery_influx.transports.answers import rejected_lines, retry_after
from celery_influx.transports.http import HTTPClient

pytestmark = [pytest.mark.once, pytest.mark.timeout(30)]

#: ``http_timeout`` where the server is slow, and where it is not.
SHORT, LONG = 0.1, 10.0
#: What is read of an answer to a query, at most.
MOST = 1_000_000
#: Bytes that may be held at once: the answer and what is made of it, and the server's own.
MEMORY = 20_000_000
BODY = b"m f=1"


class Server:
    """Does to each connection what it is told."""

    def __init__(self, behave: Callable[[socket.socket], None]) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._serve)]
        self._connections: list[socket.socket] = []

    def client(self, **options: Any) -> HTTPClient:
        given = {"host": "127.0.0.1", "http_port": self._listener.getsockname()[1]}
        given |= {"query_bytes": MOST, "query_rows": 1_000, **options}
        return HTTPClient(DatabaseOptions(name="m", **given))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._handle, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            self._behave(connection)

    def __enter__(self) -> Server:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        # An error that is at hand keeps its connection open.
        for each in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


# -- how they behave ---------------------------------------------------------------------------

Behaviour = Callable[[socket.socket], None]


def read_request(connection: socket.socket) -> None:
    """Its head and its body."""
    received = b""
    length = None
    while length is None or len(received) < length:
        piece = connection.recv(65_536)
        if not piece:
            raise OSError
        received += piece
        head, end, _ = received.partition(b"\r\n\r\n")
        if end:
            found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            length = len(head + end) + (int(found[1]) if found else 0)


def wait(connection: socket.socket) -> None:
    """For the client to hang up."""
    while connection.recv(65_536):
        pass


def saying(
    *pieces: bytes | Iterable[bytes], pause: float = 0.0, then: Behaviour = wait
) -> Behaviour:
    """Say ``pieces``, of which the last may be endless."""

    def behave(connection: socket.socket) -> None:
        read_request(connection)
        for piece in itertools.chain.from_iterable(
            [each] if isinstance(each, bytes) else each for each in pieces
        ):
            connection.sendall(piece)
            if pause:
                time.sleep(pause)
        then(connection)

    return behave


def hang_up(connection: socket.socket) -> None:
    """At once."""


def reset(connection: socket.socket) -> None:
    """In the way of a crash."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def head(status: int = 200, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Word", *headers, "", ""]).encode()


def bomb(content: bytes) -> tuple[bytes, Iterator[bytes]]:
    """An endless stream that unpacks to ``content`` again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    first = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
    assert len(block) < len(content) / 50
    return first, itertools.repeat(block * max(1, 4_096 // len(block)))


def answer_before_reading(connection: socket.socket) -> None:
    """And read nothing at all."""
    connection.sendall(head(413, "Content-Length: 0", "Connection: close"))
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.05)


def never_read(connection: socket.socket) -> None:
    """Nor say anything."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    time.sleep(3 * SHORT)


ROWS = b"[1,2],"
CHUNKED = head(200, "Transfer-Encoding: chunked")
PACKED = head(200, "Content-Encoding: gzip")
NESTED = b'{"results":[{"series":[{"values":['

LOST = r"the connection failed: \w+ \(connection\); is this InfluxDB's HTTP port"
SLOW = r"came so slowly that it took more than 0\.1 s \(timeout\)"
SLOW_REST = r"came so slowly that it took more than 1 s \(timeout\)"
STALLED = r"no answer within 0\.1 s \(timeout\)"
LONGER = r"^the answer is longer than 1,000,000 bytes; ask for less"
MANY = r"^the answer is of more than 1,000 rows; ask for less"
NO_API = r"expected 204, got 200.*; is this InfluxDB's HTTP API"
UNPACKABLE = r"the answer cannot be unpacked: .* \(connection\)"
NO_JSON = r"expected JSON, got no content type: ''; is this InfluxDB's HTTP API"


class Row(NamedTuple):
    """How a server behaves, and what the client says: to writes and pings, and to queries.

    None: it has nothing to complain of.
    """

    name: str
    behave: Behaviour
    texts: str | tuple[str | None, str]
    timeout: float = LONG


TABLE = [
    # Endless.
    Row("body", saying(head(), itertools.repeat(b" " * 65_536)), (NO_API, LONGER)),
    Row("rows", saying(head(), NESTED, itertools.repeat(ROWS * 9_999)), (NO_API, MANY)),
    Row("rows with blanks", saying(head(), NESTED, itertools.repeat(b"[] , " * 9_999)), (NO_API, LONGER)),
    Row("a string", saying(head(), b'{"', itertools.repeat(b'\\"],[' * 9_999)), (NO_API, LONGER)),
    Row("gzip bomb", saying(PACKED, *bomb(b" " * MOST)), (NO_API, LONGER)),
    Row("gzip bomb of rows", saying(PACKED, *bomb(ROWS * 50_000)), (NO_API, MANY)),
    Row("tiny chunks", saying(CHUNKED, itertools.repeat(b"1\r\n \r\n" * 999)), (NO_API, SLOW_REST), SHORT),
    Row("chunk", saying(CHUNKED, b"ffffffffff\r\n", itertools.repeat(b" " * 65_536)), (NO_API, LONGER)),
    Row("size of a chunk", saying(CHUNKED, itertools.repeat(b"0" * 65_536)), (NO_API, LOST)),
    Row(
        "trailers",
        saying(CHUNKED, b"0\r\n", itertools.repeat(b"a: b\r\n" * 999)),
        (NO_API, SLOW_REST),
        SHORT,
    ),
    Row("headers", saying(b"HTTP/1.1 200 OK\r\n", itertools.repeat(b"a: b\r\n" * 99)), LOST),
    Row("header", saying(b"HTTP/1.1 200 OK\r\na: ", itertools.repeat(b"b" * 65_536)), LOST),
    Row("status line", saying(b"HTTP/1.1 200 ", itertools.repeat(b"b" * 65_536)), LOST),
    Row("nonsense", saying(itertools.repeat(b"\n\r\0\xff" * 999)), LOST),
    Row("100", saying(itertools.repeat(head(100) * 999)), SLOW, SHORT),
    Row("100 with headers", saying(itertools.repeat(head(100, *["a: b"] * 99))), SLOW, SHORT),
    Row("103", saying(itertools.repeat(head(103) * 999)), "expected 20[04], got 103; is this"),
    Row(
        "body of a redirect",
        saying(head(307, "Location: /x"), itertools.repeat(b" " * 65_536)),
        r"expected 20[04], got 307, which points to /x; redirects are not followed",
    ),
    Row(
        "gzip bomb of a redirect",
        saying(head(301, "Location: http://[", "Content-Encoding: gzip"), *bomb(b" " * MOST)),
        r"expected 20[04], got 301, which points to no URL; redirects are not followed",
    ),
    Row("error", saying(head(500), itertools.repeat(b"x" * 65_536)), r"got 500: x{499}…; the log"),
    # Slow: a byte or a line in each 0.02 s.
    Row("slow status line", saying(itertools.repeat(b"H"), pause=0.01), SLOW, SHORT),
    Row("slow headers", saying(b"HTTP/1.1 200 OK\r\n", itertools.repeat(b"a: b\r\n"), pause=0.01), SLOW, SHORT),
    Row("slow 100", saying(itertools.repeat(head(100)), pause=0.01), SLOW, SHORT),
    Row(
        "slow body",
        saying(head(200, "Content-Length: 999"), itertools.repeat(b" "), pause=0.01),
        (NO_API, SLOW_REST),
        SHORT,
    ),
    Row("slow chunks", saying(CHUNKED, itertools.repeat(b"1\r\n \r\n"), pause=0.01), (NO_API, SLOW_REST), SHORT),
    Row("nothing", saying(), STALLED, SHORT),
    Row("half a head", saying(head()[:-2]), SLOW, SHORT),
    Row("half a body", saying(head(200, "Content-Length: 9"), b"{"), (NO_API, STALLED), SHORT),
    # Broken off.
    Row("hung up at once", hang_up, LOST + r"|\((ECONNRESET|EPIPE)\)"),
    Row("hung up after the request", saying(then=hang_up), LOST),
    Row("reset", saying(then=reset), r"\(ECONNRESET\)"),
    Row("reset in the head", saying(head()[:9], then=reset), r"\(ECONNRESET\)"),
    Row("reset in the body", saying(head(), b"{", then=reset), (NO_API, r"\(ECONNRESET\)")),
    Row("end of the head is missing", saying(head()[:-2], then=hang_up), (NO_API, NO_JSON)),
    Row("end of the body is missing", saying(head(200, "Content-Length: 9"), b"{", then=hang_up), (NO_API, LOST)),
    Row("last chunk is missing", saying(CHUNKED, b"1\r\n{\r\n", then=hang_up), (NO_API, LOST)),
    Row("end of the gzip is missing", saying(PACKED, b"\x1f\x8b\x08", then=hang_up), (NO_API, UNPACKABLE)),
    # Lies and mistakes.
    Row("chunk of no size", saying(CHUNKED, b"zz\r\n", then=hang_up), (NO_API, LOST)),
    Row("chunk of a negative size", saying(CHUNKED, b"-5\r\nabcde\r\n0\r\n\r\n", then=hang_up), (NO_API, LOST)),
    Row("chunk without its end", saying(CHUNKED, b"1\r\n{}}}}\r\n0\r\n\r\n", then=hang_up), (NO_API, LOST)),
    Row("two lengths", saying(head(200, "Content-Length: 1", "Content-Length: 2")), LOST + "|" + NO_API),
    Row("a negative length", saying(head(204, "Content-Length: -1")), (None, "expected 200, got 204; is this")),
    Row("no number for a length", saying(head(204, "Content-Length: x")), (None, "expected 200, got 204; is this")),
    Row("false gzip", saying(head(200, "Content-Encoding: gzip"), b"{}", then=hang_up), (NO_API, UNPACKABLE)),
    Row("false zlib", saying(head(200, "Content-Encoding: br"), b"{}", then=hang_up), (NO_API, UNPACKABLE)),
    Row("zlib of no body", saying(head(204, "Content-Encoding: br")), (None, "expected 200, got 204; is this")),
    Row("chunks of no body", saying(head(204, "Transfer-Encoding: chunked"), then=hang_up), (None, "expected 200, got 204; is this")),
    Row("another protocol", saying(b"+OK POP3 ready\r\n"), LOST),
    Row("HTTP 9", saying(b"HTTP/9.9 200 OK\r\n\r\n"), LOST),
    Row("status 1000", saying(b"HTTP/1.1 1000 OK\r\n\r\n"), LOST),
    Row("status 7", saying(b"HTTP/1.1 007 OK\r\n\r\n"), LOST),
    Row("status 999", saying(head(999, "Content-Length: 0")), r"expected 20[04], got 999; is this"),
    Row("a header that is none", saying(b"HTTP/1.1 204 OK\r\n\0\xff\r\n\r\n"), (None, "expected 200, got 204; is this")),
    Row(
        "words for a terminal",
        saying(head(500, "Content-Length: 9"), b"a\x1b[2J\x07b\x9b\r"),
        r"got 500: a\\x1b\[2J\\x07b\ufffd; the log",
    ),
    Row("answered before it was asked", answer_before_reading, r"got 413; lower|\((ECONNRESET|EPIPE)\)"),
]  # fmt: skip


@pytest.mark.parametrize("call", ["write", "ping", "query"])
@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_a_server_like_that_costs_little_and_ends_in_an_error_that_says_so(
    row: Row, call: str
) -> None:
    texts = row.texts if isinstance(row.texts, tuple) else (row.texts, row.texts)
    text = texts[call == "query"]
    given = {"write": BODY, "ping": None, "query": "SHOW DATABASES"}[call]

    with Server(row.behave) as server, server.client(http_timeout=row.timeout) as client:
        tracemalloc.start()
        started = time.monotonic()
        try:
            if text is None:
                getattr(client, call)(given)
            else:
                with pytest.raises((SendError, QueryError)) as caught:
                    getattr(client, call)(given)
            seconds = time.monotonic() - started
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert held < MEMORY
    # Its head, its rest, and a busy machine.
    assert seconds < (12 * SHORT + 2 if row.timeout == SHORT else LONG / 2)
    if text is not None:
        assert re.search(text, str(caught.value))
        assert caught.value.__context__ is None


def test_a_server_that_takes_nothing_is_left_after_the_timeout() -> None:
    with Server(never_read) as server, server.client(http_timeout=SHORT) as client:
        started = time.monotonic()
        with pytest.raises(SendError, match=STALLED):
            client.write(b"m f=1\n" * 2_000_000)

        assert time.monotonic() - started < 10 * SHORT


def test_a_slow_proxy_ends_in_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drip = saying(b"HTTP/1.1 200 OK\r\n", itertools.repeat(b"a: b\r\n"), pause=0.01)
    with Server(drip) as server:
        proxy = server.client().address.removesuffix("/m")
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for secure in (False, True):
            options = DatabaseOptions(host="influx.invalid", http_timeout=SHORT, secure=secure)
            started = time.monotonic()
            with HTTPClient(options) as client, pytest.raises(SendError) as caught:
                client.ping()

            assert caught.value.cause == "timeout"
            assert time.monotonic() - started < 10 * SHORT


def test_after_a_mere_sign_of_life_nothing_more_is_asked_on_that_connection() -> None:
    """What comes on it later is the answer to the question before."""
    answers = iter([head(103), head(204)])

    def behave(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(next(answers))
        wait(connection)

    with Server(behave) as server, server.client(http_timeout=1.0) as client:
        with pytest.raises(SendError, match="got 103"):
            client.write(BODY)

        assert client.write(BODY) == 0


# -- Retry-After -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1000000000000", 1e9),
        ("9" * 60_000, None),
        ("-5", 0.0),
        ("1e9", None),
        ("nan", None),
        ("", None),
        ("\xb2", None),
        (formatdate(253402300799, usegmt=True), 1e9),
        (formatdate(1, usegmt=True), 0.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        ("Fri, 99 Foo 2020", None),
    ],
)
def test_a_wish_to_wait_is_bounded_whatever_its_form(value: str, seconds: float | None) -> None:
    answer = saying(head(503, f"Retry-After: {value}", "Content-Length: 0"))

    with (
        Server(answer) as server,
        server.client() as client,
        pytest.raises(SendError, match="got 503") as caught,
    ):
        client.write(BODY)

    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("value", ["0", "9" * 4_000, *"٣²½", "Mon", ", ".join("0" * 99), "\x00"])
def test_any_wish_to_wait_is_understood_or_left_alone(value: str) -> None:
    found = retry_after(value)

    assert found is None or 0 <= found <= 1e9


# -- words about lines -------------------------------------------------------------------------


def test_quotes_of_lines_that_were_not_sent_take_no_time() -> None:
    payload = b"\n".join(b"m f=%d" % number for number in range(5_000))
    quotes = "\n".join(["unable to parse 'x': y"] * 300_000)
    started = time.monotonic()

    assert rejected_lines(f"partial write: {quotes} dropped=0", payload) == 5_000

    assert time.monotonic() - started < 2


def test_a_number_of_lines_that_is_none_is_no_number() -> None:
    body = json.dumps({"error": f"partial write: points beyond dropped={'9' * 5_000}"}).encode()
    answer = saying(head(400, f"Content-Length: {len(body)}"), body)

    with Server(answer) as server, server.client() as client, pytest.raises(SendError) as caught:
        client.write(BODY)

    assert caught.value.cause == "400"


@pytest.mark.parametrize("late", [SHORT / 2, 2 * SHORT])
def test_who_says_nothing_is_not_called_slow_by_who_had_no_time_to_look(late: float) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(SHORT)
        pieces = bounded._Pieces(socket.SocketIO(one, "r"), one)
        pieces._end -= late  # so long the machine let others run
        with pytest.raises(TimeoutError) as caught:
            pieces.read(1)

    assert type(caught.value) is TimeoutError


def test_who_never_stops_sending_is_left_though_no_piece_was_waited_for() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(SHORT)
        pieces = bounded._Pieces(socket.SocketIO(one, "r"), one)
        started = time.monotonic()
        with pytest.raises(bounded.TooSlowError):
            while time.monotonic() < started + 10:
                other.send(b"x")  # there before it is asked for
                pieces.read(1)

        assert one.gettimeout() == SHORT


def test_who_stops_right_after_a_beginning_is_called_slow() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(SHORT)
        other.send(b"H")
        pieces = bounded._Pieces(socket.SocketIO(one, "r"), one)
        assert pieces.read(1) == b"H"

        with pytest.raises(bounded.TooSlowError):
            pieces.read(1)
