"""HTTPClient against a small server that gives odd answers; the real ones are in integration/."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from celery_influx.errors import QueryError, SendError
from celery_influx.line_reader import split_lines
from celery_influx.options import DatabaseOptions
from celery_influx.transports import answers, open_transport
from celery_influx.transports import http as http_module
from celery_influx.transports.http import HTTPClient, Ping
from tests.servers import free_port
from tests.test_queries import ATTACKS

#: Long enough for a slow machine, short enough for a test that waits for it.
SHORT = 0.3


class Stub(ThreadingHTTPServer):
    """Answers each request by ``answer(handler)``, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[_Handler], None] = lambda handler: handler.reply(204)
        self.asked: list[_Handler] = []
        self.released = threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def client(self, **options: Any) -> HTTPClient:
        settings = {"host": "127.0.0.1", "http_port": self.port, "transport": "http", **options}
        return HTTPClient(DatabaseOptions(**settings))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.server.asked.append(self)
        self.server.answer(self)

    do_POST = do_GET

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reply_endlessly(self, status: int, piece: bytes, pause: float = 0.0) -> None:
        """Send ``piece`` again and again until the client hangs up."""
        self.send_response(status)
        self.end_headers()
        try:
            while not self.server.released.wait(pause):
                self.wfile.write(piece)
        except OSError:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Stub]:
    """A server at work."""
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as server:
        yield server


def _replying(status: int, body: bytes = b"", **headers: str) -> Callable[[_Handler], None]:
    return lambda handler: handler.reply(status, body, **headers)


def _address(stub: Stub) -> str:
    return f"http://127.0.0.1:{stub.port}/celery"


# -- the client itself ---------------------------------------------------------------------------


def test_importing_the_module_does_not_import_requests_and_load_does() -> None:
    code = (
        "import sys; import celery_influx.transports.http as http;"
        "from celery_influx.options import DatabaseOptions;"
        "http.HTTPClient(DatabaseOptions());"
        "before = 'requests' in sys.modules; http.load();"
        "print(before, 'requests' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.split() == ["False", "True"]


def test_the_registry_makes_the_client_from_options() -> None:
    options = DatabaseOptions(transport="http", batch_bytes=2_000)

    transport = open_transport(options)

    assert isinstance(transport, HTTPClient)
    assert transport.max_bytes == 2_000
    assert transport.address == "http://localhost:8086/celery"


def test_with_gzip_a_body_is_compressed_and_says_so(stub: Stub) -> None:
    payload = b"\n".join(b"requests,host=web-%d runtime=0.%d" % (i % 4, i) for i in range(1_000))

    assert stub.client(gzip=True).write(payload) == 0
    assert stub.client().write(payload) == 0

    compressed, plain = stub.asked
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(compressed.body) == payload
    assert len(compressed.body) < len(payload) / 4
    assert plain.headers["Content-Encoding"] is None
    assert plain.body == payload


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({"host": "::1", "secure": True}, "https://[::1]:8086/celery"),
        ({"database": "a/b c"}, "http://localhost:8086/a%2Fb%20c"),
        ({"username": "u", "password": "hunter2"}, "http://localhost:8086/celery"),
    ],
)
def test_the_address_is_a_url_without_secrets(options: dict, address: str) -> None:
    assert HTTPClient(DatabaseOptions(**options)).address == address


def test_the_repr_shows_state_and_no_secret(stub: Stub) -> None:
    client = stub.client(username="u", password="hunter2")

    assert repr(client) == f"<HTTPClient {_address(stub)} auth=basic open=False>"
    client.ping()
    assert repr(client) == f"<HTTPClient {_address(stub)} auth=basic open=True>"
    assert "auth=token" in repr(stub.client(token="hunter2"))


def test_closing_is_idempotent_and_the_next_request_opens_again(stub: Stub) -> None:
    with stub.client() as client:
        client.close()
        client.ping()
        client.close()
        client.close()

        assert client.write(b"m f=1") == 0


def test_a_connection_is_used_again_after_success_and_after_an_error(stub: Stub) -> None:
    client = stub.client()
    client.write(b"m f=1")
    stub.answer = _replying(503, b"busy")
    with pytest.raises(SendError):
        client.write(b"m f=1")
    stub.answer = _replying(204)
    client.ping()
    client.close()

    assert len({handler.client_address for handler in stub.asked}) == 1


def test_threads_share_a_client(stub: Stub) -> None:
    stub.answer = lambda handler: (
        handler.reply(204)
        if handler.path.startswith("/write")
        else handler.reply(200, b'{"results":[{"statement_id":0}]}')
    )
    client = stub.client()
    failures: list[BaseException] = []

    def work(turn: Callable[[], object]) -> None:
        try:
            for _ in range(20):
                turn()
        except BaseException as error:
            failures.append(error)

    turns = [lambda: client.write(b"m f=1"), lambda: client.query("SHOW DATABASES")] * 3
    threads = [threading.Thread(target=work, args=(turn,)) for turn in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len(stub.asked) == 120


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_opens_its_own_connection_and_leaves_the_parents_alone(stub: Stub) -> None:
    client = stub.client()
    client.ping()

    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.abandon()
            client.write(b"m f=1")
            client.close()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    client.ping()

    assert os.waitstatus_to_exitcode(status) == 0
    parent, of_child, parent_again = (handler.client_address for handler in stub.asked)
    assert parent == parent_again != of_child


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_that_forgot_to_abandon_is_safe_as_well(stub: Stub) -> None:
    client = stub.client()
    client.ping()

    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.close()
            client.ping()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    client.ping()

    assert os.waitstatus_to_exitcode(status) == 0
    assert stub.asked[0].client_address == stub.asked[2].client_address


# -- credentials, proxies, cookies ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({}, None),
        ({"username": "u", "password": "pä:ss"}, "Basic dTpww6Q6c3M="),
        ({"token": "t0k"}, "Token t0k"),
    ],
)
def test_credentials_go_into_the_header_and_netrc_is_not_read(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, header: str | None
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login stranger password wrong\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))

    client = stub.client(**options)
    client.write(b"m f=1")
    # A host that is not loopback by its name reads the environment.
    monkeypatch.setattr(http_module, "_loopback", lambda host: False)
    stub.client(**options).write(b"m f=1")

    assert [handler.headers.get("Authorization") for handler in stub.asked] == [header, header]
    assert "pä" not in stub.asked[0].path


def test_a_proxy_of_the_environment_is_not_used_for_loopback(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    assert stub.client().write(b"m f=1") == 0


def test_a_proxy_of_the_environment_is_used_for_other_hosts(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{stub.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    stub.client(host="influx.invalid", http_port=8086).write(b"m f=1")

    assert stub.asked[0].path.startswith("http://influx.invalid:8086/write?")


def test_a_token_that_no_header_can_hold_is_not_shown(stub: Stub) -> None:
    with pytest.raises(SendError) as caught:
        stub.client(token="hunter2\n").write(b"m f=1")

    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_cookie_of_the_server_is_not_sent_back(stub: Stub) -> None:
    stub.answer = _replying(204, Set_Cookie="a=b")
    client = stub.client()

    client.ping()
    client.ping()

    assert stub.asked[1].headers.get("Cookie") is None


# -- no answer -----------------------------------------------------------------------------------


def test_a_refused_connection_is_named_by_its_errno() -> None:
    port = free_port()
    client = HTTPClient(
        DatabaseOptions(host="127.0.0.1", http_port=port, username="u", password="p")
    )

    for call in (client.ping, lambda: client.write(b"m f=1"), lambda: client.query("SHOW USERS")):
        with pytest.raises(SendError) as caught:
            call()

        assert caught.value.cause == "ECONNREFUSED"
        assert caught.value.__context__ is None


@pytest.mark.parametrize("host", ["a b", "x" * 70, "[", "a/b"])
def test_an_impossible_host_is_a_send_error(host: str) -> None:
    with pytest.raises(SendError):
        HTTPClient(DatabaseOptions(host=host)).ping()


def test_http_timeout_is_the_timeout_where_none_is_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = DatabaseOptions(
            host="127.0.0.1", http_port=silent.getsockname()[1], http_timeout=SHORT
        )

        with pytest.raises(SendError, match=r"no answer within 0\.3 s"):
            HTTPClient(options).write(b"m f=1")


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 10**400])
def test_a_timeout_of_for_ever_is_a_long_one(stub: Stub, timeout: float) -> None:
    assert stub.client().ping(timeout).version is None


def test_something_else_than_http_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        client = HTTPClient(DatabaseOptions(host="127.0.0.1", http_port=server.getsockname()[1]))
        with pytest.raises(SendError) as caught:
            client.ping()
        thread.join()

    assert caught.value.cause == "connection"


def test_https_to_a_plain_port_is_a_tls_error(stub: Stub) -> None:
    with pytest.raises(SendError) as caught:
        stub.client(secure=True).ping()

    assert caught.value.cause == "tls"


# -- write ---------------------------------------------------------------------------------------


def test_a_write_names_database_precision_and_retention_policy(stub: Stub) -> None:
    client = stub.client(database="d/b", precision="u", retention_policy="short")

    assert client.write(b"m f=1 5\nm f=2 6") == 0
    assert stub.asked[0].command == "POST"
    assert stub.asked[0].query == {"db": ["d/b"], "precision": ["u"], "rp": ["short"]}
    assert stub.asked[0].body == b"m f=1 5\nm f=2 6"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("http://127.0.0.1:PORT/write", "http://127.0.0.1:PORT/write"),  # the same host
        ("/write?db=m", "/write"),
        ("//elsewhere.example/", "//elsewhere.example/"),
        (
            "https://u:hunter2@elsewhere.example/a?token=hunter2#hunter2",
            "https://elsewhere.example/a",
        ),
        ("http://elsewhere.example/hunter2", "http://elsewhere.example/***"),
        ("http://[", "no URL"),
        ("", "nowhere"),
    ],
)
def test_no_redirect_is_followed_and_the_error_says_where_it_points_to(
    stub: Stub, status: int, location: str, shown: str
) -> None:
    stub.answer = _replying(status, b"", Location=location.replace("PORT", str(stub.port)))
    client = stub.client(username="u", password="hunter2")
    asks = [
        client.ping,
        lambda: client.write(b"m f=1"),
        lambda: client.query("SHOW DATABASES"),
        lambda: client.query(f"SELECT f FROM m WHERE t = '{'x' * 9_000}'"),  # by POST
        lambda: client.post("DROP MEASUREMENT m"),
    ]

    for ask in asks:
        with pytest.raises((SendError, QueryError)) as caught:
            ask()
        assert str(caught.value).endswith(
            f", got {status}, which points to {shown.replace('PORT', str(stub.port))}; redirects "
            "are not followed: set that URL"
        )

    assert len(stub.asked) == len(asks)


def test_a_redirect_is_not_followed(stub: Stub) -> None:
    stub.answer = _replying(307, Location=f"http://127.0.0.1:{stub.port}/write")
    client = stub.client(username="u", password="hunter2")

    with pytest.raises(SendError, match="got 307"):
        client.write(b"m f=1")
    with pytest.raises(QueryError, match="got 307"):
        client.query("SHOW DATABASES")

    assert len(stub.asked) == 2


def test_an_endless_error_is_read_to_a_limit(stub: Stub) -> None:
    stub.answer = lambda handler: handler.reply_endlessly(500, b"x" * 10_000)

    with pytest.raises(SendError, match="got 500: xxx") as caught:
        stub.client().write(b"m f=1")

    assert len(str(caught.value)) < 700


def test_an_error_that_trickles_in_is_read_for_the_timeout_and_no_longer(stub: Stub) -> None:
    stub.answer = lambda handler: handler.reply_endlessly(500, b"x", pause=0.02)

    with pytest.raises(SendError, match="got 500: xxx"):
        stub.client(http_timeout=SHORT).write(b"m f=1")


def test_an_error_text_that_stalls_still_gives_the_status(stub: Stub) -> None:
    stub.answer = lambda handler: handler.reply_endlessly(503, b"x", pause=60)

    with pytest.raises(SendError, match=r"expected 204, got 503; "):
        stub.client(http_timeout=SHORT).write(b"m f=1")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("-3", 0.0),
        ("9" * 400, 1e9),
        ("9" * 4_000, 1e9),
        ("soon", None),
        (formatdate(0, usegmt=True), 0.0),
        (None, None),
    ],
)
def test_retry_after_is_kept_for_who_retries(
    stub: Stub, value: str | None, seconds: float | None
) -> None:
    stub.answer = _replying(503, b"", **({"Retry_After": value} if value else {}))
    client = stub.client()

    with pytest.raises(SendError) as failed:
        client.write(b"m f=1")

    assert failed.value.retry_after == seconds


def test_a_retry_after_date_counts_from_now() -> None:
    date = formatdate(1_000_000, usegmt=True)

    assert answers.retry_after(date, clock=lambda: 999_990.0) == 10.0


def test_a_field_type_conflict_in_a_new_shard_has_a_cause_of_its_own(stub: Stub) -> None:
    stub.answer = _replying(400, b'{"error":"field type conflict"}')

    with pytest.raises(SendError) as caught:
        stub.client().write(b"m f=1")

    assert caught.value.cause == "conflict"


@pytest.mark.parametrize(
    ("payload", "words", "rejected"),
    [
        (b"a\nm f=1", "partial write: unable to parse 'a': missing fields dropped=0", 1),
        (
            b"a\nm f=1\nb",
            (
                "partial write: unable to parse 'a': missing fields\n"
                "unable to parse 'b': missing fields dropped=0"
            ),
            2,
        ),
        (b"a\n\n# c\nb", "unable to parse 'a': missing fields\nunable to parse 'b': x", 2),
        (b"m f=1\nm f=2", "partial write: points beyond retention policy dropped=2", 2),
        # Then it says nothing of lines that it cannot read.
        (b"m f=1\nbad\n# c\nm f=2\nm f=x", "partial write: points beyond dropped=1", 3),
        (b'm f=1\nm g="\nbad\n"\nm f=2', "partial write: points beyond dropped=1", 1),
        (b"m f=1\nm,t=1,t=2 f=3", "partial write: points beyond dropped=1", 2),
        (
            b"m dropped=7,x\nm f=1",
            "partial write: unable to parse 'm dropped=7,x': missing field value dropped=0",
            1,
        ),
        # Lines whose own text looks like the server's.
        (
            b"m f=\"\nunable to parse 'b': x\",g\nb\nm f=1",
            (
                "partial write: unable to parse 'm f=\"\nunable to parse 'b': x\",g': missing\n"
                "unable to parse 'b': missing fields dropped=0"
            ),
            2,
        ),
        (
            b"m f=\"\nunable to parse 'b': x\",g\nm f=1",
            "partial write: unable to parse 'm f=\"\nunable to parse 'b': x\",g': missing dropped=0",
            1,
        ),
        # Words that do not quote the lines as they were: counted as they come.
        (b"\xff\nm f=1", "partial write: unable to parse '??': bad dropped=0", 1),
    ],
)
def test_rejected_lines_are_counted_from_the_servers_words(
    stub: Stub, payload: bytes, words: str, rejected: int
) -> None:
    stub.answer = _replying(400, json.dumps({"error": words}).encode())
    client = stub.client()

    assert client.write(payload) == rejected
    assert client.rejection == words

    stub.answer = _replying(204)
    assert client.write(b"m f=1") == 0
    assert client.rejection is None


def test_a_thousand_quoted_lines_are_counted_and_their_words_shortened(stub: Stub) -> None:
    lines = [b"bad" + b"<" * 500 + str(index).encode() for index in range(1_000)]
    words = "\n".join(f"unable to parse '{line.decode()}': missing fields" for line in lines)
    text = json.dumps({"error": f"partial write: {words} dropped=0"}).replace("<", "\\u003c")
    stub.answer = _replying(400, text.encode())
    client = stub.client()

    assert client.write(b"\n".join([*lines, b"m f=1"])) == 1_000
    assert len(client.rejection or "") == 500


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('m f="a\nb" 1\nn f=1', ['m f="a\nb" 1', "n f=1"]),
        ('m,t="a f=1\nn f=1', ['m,t="a f=1', "n f=1"]),
        ('m "k=1\nn f=1', ['m "k=1', "n f=1"]),
        ('m f="\\"\n",g="x" 1\nn f=1\n', ['m f="\\"\n",g="x" 1', "n f=1"]),
        ("a\\ b f=1\n\n #c\n  d", ["a\\ b f=1", "d"]),
        ('m f="open\nn f=1', ['m f="open\nn f=1']),
    ],
)
def test_lines_are_parted_as_the_server_parts_them(text: str, lines: list[str]) -> None:
    assert [line.decode() for line in split_lines(text.encode())] == lines


# -- ping ----------------------------------------------------------------------------------------


def test_a_ping_gives_version_and_round_trip(stub: Stub) -> None:
    stub.answer = _replying(204, X_Influxdb_Version="1.8.10")
    times = iter([10.0, 10.25])
    options = DatabaseOptions(host="127.0.0.1", http_port=stub.port)
    client = HTTPClient(options, clock=lambda: next(times, 11.0))

    assert client.ping() == Ping("1.8.10", 0.25)


def test_a_ping_without_a_version_header_is_up_all_the_same(stub: Stub) -> None:
    assert stub.client().ping().version is None


# -- query and post ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "options"),
    [
        ("DROP DATABASE x", {}),
        ("SELECT f INTO t FROM m", {}),
        ("SHOW DATABASES \ud800", {}),
        ("SHOW DATABASES", {"epoch": "us"}),
        ("SHOW DATABASES", {"params": {"v": None}}),
    ],
)
def test_a_query_that_may_write_or_is_wrong_sends_nothing(
    stub: Stub, statement: str, options: dict
) -> None:
    with pytest.raises(QueryError):
        stub.client().query(statement, **options)

    assert stub.asked == []


def test_no_attack_is_sent(stub: Stub) -> None:
    client = stub.client()

    for statement in ATTACKS:
        for more in ({}, {"chunked": True}, {"params": {"into": {"identifier": "stolen"}}}):
            with pytest.raises(QueryError):
                client.query(statement, **more)

    assert len(ATTACKS) > 100
    assert stub.asked == []


def test_a_query_is_a_get_with_everything_bound(stub: Stub) -> None:
    stub.answer = _replying(200, b'{"results":[{"statement_id":0}]}')

    stub.client(retention_policy="rp").query("SELECT f FROM m WHERE t = $t", params={"t": "é'"})
    stub.client().query(
        "SHOW DATABASES", database="other", retention_policy="x", epoch="s", chunked=50
    )

    first, second = stub.asked
    assert first.command == "GET"
    assert first.query == {
        "q": ["SELECT f FROM m WHERE t = $t"],
        "db": ["celery"],
        "rp": ["rp"],
        "epoch": ["ns"],
        "params": ['{"t":"\\u00e9\'"}'],
    }
    assert second.query == {
        "q": ["SHOW DATABASES"],
        "db": ["other"],
        "rp": ["x"],
        "epoch": ["s"],
        "chunked": ["true"],
        "chunk_size": ["50"],
    }


def test_a_long_query_goes_by_post(stub: Stub) -> None:
    stub.answer = _replying(200, b'{"results":[{"statement_id":0}]}')
    statement = f"SELECT f FROM m WHERE t = '{'x' * 9_000}'"

    stub.client().query(statement)

    assert stub.asked[0].command == "POST"
    assert urlsplit(stub.asked[0].path).query == ""
    assert parse_qs(stub.asked[0].body.decode())["q"] == [statement]


def test_a_post_carries_its_statement_in_the_body_alone(stub: Stub) -> None:
    stub.answer = _replying(200, b'{"results":[{"statement_id":0}]}')

    stub.client().post("CREATE USER u WITH PASSWORD 'hunter2'", epoch="ms")

    assert stub.asked[0].path == "/query"
    assert b"hunter2" in stub.asked[0].body


@pytest.mark.parametrize("kind", ["text/html", "application/json; charset=utf-8", "image/png"])
def test_an_answer_is_read_whatever_its_content_type(stub: Stub, kind: str) -> None:
    stub.answer = _replying(200, b'{"results":[{"error":"no"}]}', Content_Type=kind)
    with pytest.raises(QueryError, match=r"^the server answered: no$"):
        stub.client().query("SHOW DATABASES")

    stub.answer = _replying(200, b"<html>", Content_Type=kind)
    with pytest.raises(QueryError, match=f"expected JSON, got {kind}: '<html>'"):
        stub.client().query("SHOW DATABASES")


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'{"results":', b"[" * 200_000, b"\xff"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_no_answer_is_a_query_error(stub: Stub, body: bytes, chunked: bool) -> None:
    stub.answer = _replying(200, body)

    with pytest.raises(QueryError):
        stub.client().query("SHOW DATABASES", chunked=chunked)


def test_a_gzipped_answer_is_unpacked_and_a_false_one_is_an_error(stub: Stub) -> None:
    body = json.dumps({"results": [{"series": [{"columns": ["f"], "values": [[1]] * 9}]}]}).encode()
    stub.answer = _replying(200, gzip.compress(body), Content_Encoding="gzip")
    assert len(stub.client().query("SHOW DATABASES").rows()) == 9

    stub.answer = _replying(200, body, Content_Encoding="gzip")
    with pytest.raises(SendError):
        stub.client().query("SHOW DATABASES")


def test_an_answer_that_ends_too_soon_is_a_send_error(stub: Stub) -> None:
    def cut(handler: _Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"results":[{}]}')
        handler.close_connection = True

    stub.answer = cut

    with pytest.raises(SendError) as caught:
        stub.client().query("SHOW DATABASES")
    assert caught.value.cause == "connection"


def test_an_answer_that_stalls_is_a_timeout(stub: Stub) -> None:
    stub.answer = lambda handler: handler.reply_endlessly(200, b"{", pause=60)

    with pytest.raises(SendError) as caught:
        stub.client().query("SHOW DATABASES", timeout=SHORT)

    assert caught.value.cause == "timeout"


def test_chunks_are_parted_at_newlines_only(stub: Stub) -> None:
    series = {"name": "m", "columns": ["f"], "values": [["a\x85b\u2028"]]}
    lines = [
        json.dumps({"results": [{"series": [{**series, "partial": True}]}]}, ensure_ascii=False),
        json.dumps({"results": [{"series": [series]}]}, ensure_ascii=False),
    ]
    stub.answer = _replying(200, "\n".join(lines).encode())

    result = stub.client().query("SELECT f FROM m", chunked=True)

    assert [found.values for found in result] == [[["a\x85b\u2028"], ["a\x85b\u2028"]]]
