"""Where a password or token is found, that it is found again when it changes, and seen nowhere."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from celery import Celery
from celery.worker import control

import celery_influx
from celery_influx.bootstep import _probe
from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.delivery import Delivery, Fate, fate_of
from celery_influx.errors import InfluxError, QueryError, SendError
from celery_influx.options import DatabaseOptions
from celery_influx.report import Report
from tests.test_http import Stub, _Handler, serving

pytestmark = pytest.mark.once

SECRET = "hünter/2=="
BASIC = "Basic " + b64encode(f"u:{SECRET}".encode()).decode()
TOKEN = f"Token {SECRET}"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as server:
        yield server


def header(handler: _Handler) -> str:
    return handler.headers["Authorization"].encode("latin-1").decode()


def wanting(secret: str) -> Callable[[_Handler], None]:
    """Only tokens of that name are let in."""

    def answer(handler: _Handler) -> None:
        if header(handler) != f"Token {secret}":
            handler.reply(401, b'{"error":"authorization failed"}')
        elif handler.path.startswith("/query"):
            handler.reply(200, b'{"results":[{"statement_id":0}]}')
        else:
            handler.reply(204)

    return answer


# -- where it is found -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n"], ids=["bare", "newline", "crlf"]
)
@pytest.mark.parametrize("place", ["", "_file", "_env"])
def test_a_secret_is_taken_from_the_option_a_file_or_the_environment(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, content: str
) -> None:
    (tmp_path / "secret").write_bytes(content.encode())
    monkeypatch.setenv("INFLUX_SECRET", SECRET)
    given = {"": SECRET, "_file": str(tmp_path / "secret"), "_env": "INFLUX_SECRET"}[place]

    stub.client(**{f"token{place}": given}).write(b"m f=1")
    stub.client(username="u", **{f"password{place}": given}).write(b"m f=1")

    assert [header(handler) for handler in stub.asked] == [TOKEN, BASIC]


def test_only_the_last_newline_is_no_part_of_a_password(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b" a\nb \n\n")

    stub.client(username="u", password_file=str(file)).ping()

    assert header(stub.asked[0]) == "Basic " + b64encode(b"u: a\nb \n").decode()


def test_a_file_is_read_when_a_connection_is_opened_and_no_sooner_or_later(
    stub: Stub, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    client = stub.client(token_file=str(file))
    file.write_text("one")
    client.ping()
    file.write_text("two")
    client.ping()
    client.close()
    client.ping()

    assert [header(handler) for handler in stub.asked] == ["Token one", "Token one", "Token two"]


@pytest.mark.parametrize("kind", ["file", "env"])
def test_a_secret_that_has_changed_is_taken_up_at_the_first_refusal(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = tmp_path / "secret"

    def change(secret: str) -> None:
        stub.answer = wanting(secret)
        file.write_text(secret)
        monkeypatch.setenv("INFLUX_SECRET", secret)

    change("one")
    given = {"file": str(file), "env": "INFLUX_SECRET"}[kind]
    with stub.client(**{f"token_{kind}": given}) as client:
        assert client.write(b"m f=1") == 0
        for number, call in enumerate(
            (
                lambda: client.write(b"m f=1"),
                lambda: client.query("SHOW DATABASES"),
                lambda: client.post("DROP MEASUREMENT m"),
            )
        ):
            change(f"new{number}")
            asked = len(stub.asked)
            call()
            # The one that was refused, and the one that was not, with all that it held.
            refused, taken = stub.asked[asked:]
            assert (refused.path, refused.body) == (taken.path, taken.body)


def test_a_refusal_with_an_unchanged_secret_is_not_tried_again(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("wrong")
    stub.answer = wanting("right")
    client = stub.client(token_file=str(file))

    for _ in range(2):
        with pytest.raises(SendError, match="got 401: authorization failed; set") as caught:
            client.write(b"m f=1")
        assert caught.value.cause == "401"

    assert len(stub.asked) == 2


# -- where it is not found ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff", b"x" * 65_537])
def test_a_file_without_a_secret_sends_nothing_until_it_has_one(
    stub: Stub, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    client = stub.client(token_file=str(file))

    for call in (client.ping, lambda: client.write(b"m"), lambda: client.query("SHOW USERS")):
        with pytest.raises(SendError, match=r"\(secret\)") as caught:
            call()
        assert caught.value.cause == "secret"
    assert stub.asked == []

    file.write_text("here")
    client.ping()
    assert header(stub.asked[0]) == "Token here"


def test_a_file_that_has_gone_is_said_at_a_refusal(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("one")
    client = stub.client(token_file=str(file))
    client.ping()
    file.unlink()
    stub.answer = wanting("two")

    with pytest.raises(SendError, match="cannot be read: no such file or directory") as caught:
        client.write(b"m f=1")

    assert caught.value.cause == "secret"
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", ["a\0b", "\ud800", ".", "x" * 300])
def test_a_name_that_no_file_has_is_no_crash(stub: Stub, name: str) -> None:
    with pytest.raises(SendError, match=r"\(secret\)"):
        stub.client(token_file=name).ping()


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(stub: Stub, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(SendError, match="is empty"):
        stub.client(token_file=str(tmp_path / "pipe")).ping()


def test_lines_wait_for_a_secret_as_they_do_for_the_right_one(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    counters = Counters(1)
    delivery = Delivery(
        "m",
        stub.client(token_file=str(file)),
        counters.row(0),
        Report(logging.getLogger("tests.secrets")),
        retry_age=60,
    )

    delivery.deliver([b"m f=1"])
    assert delivery.held == 1
    assert counters.total(0)["errors_access"] == 1
    file.write_text("here")
    delivery.retry()

    assert counters.total(0)["sent"] == 1
    assert fate_of("secret") is Fate.ACCESS


@pytest.mark.parametrize("transport", ["http", "udp"])
def test_a_worker_says_at_its_start_that_there_is_no_secret(
    stub: Stub, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        ports = {"udp_port": listener.getsockname()[1], "http_port": stub.port}
        options = {"transport": transport, "token_env": "NO_SUCH_VARIABLE", **ports}

        _probe(Database(DatabaseOptions(name="m", host="127.0.0.1", **options)))

    (said,) = [line for line in caplog.messages if "secret" in line]
    assert said.startswith(
        f"celery_influx: m: http://127.0.0.1:{stub.port}/m: the environment variable that "
        "'token_env' names is not set, or empty (secret)"
    )
    assert ("points wait until there is one" in said) == (transport == "http")


# -- where it is not seen ----------------------------------------------------------------------


def _echo(status: int, form: Callable[[str], str]) -> Callable[[_Handler], None]:
    """Tell the client all that it said, in every place there is."""

    def answer(handler: _Handler) -> None:
        said = form(header(handler))
        handler.reply(
            status,
            said.encode(),
            Location=f"http://u:{quote(SECRET)}@h/{quote(SECRET, safe='')}?token={quote(SECRET)}",
            Content_Type=f"text/{quote(SECRET, safe='')}",
            X_Influxdb_Version="1.6.7",
        )

    return answer


FORMS: list[Callable[[str], str]] = [
    lambda said: f"rejected {said}, which is {SECRET} ({quote(SECRET, safe='')})",
    lambda said: json.dumps({"error": f"unauthorized {said} {SECRET}"}),
    lambda said: json.dumps({"results": [{"error": f"no {said} {SECRET}"}]}),
    lambda said: json.dumps({"error": f"partial write: {said} {SECRET} dropped=1"}),
]


@pytest.mark.parametrize("place", ["token", "token_file", "password", "password_env"])
def test_no_secret_that_a_server_repeats_is_shown(
    stub: Stub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("INFLUX_SECRET", SECRET)
    places = {"file": str(tmp_path / "secret"), "env": "INFLUX_SECRET"}
    given = {place: places.get(place.partition("_")[2], SECRET)}
    client = stub.client(**given, **({"username": "u"} if "password" in place else {}))
    hidden = (SECRET, quote(SECRET, safe=""), BASIC.removeprefix("Basic "), "nter")

    for status, form in itertools.product((200, 307, 400, 401, 500), FORMS):
        stub.answer = _echo(status, form)
        report = Report(logging.getLogger("tests.secrets"))
        delivery = Delivery("m", client, Counters(1).row(0), report)
        caplog.clear()
        shown = []
        for ask in (client.ping, partial(client.query, "SHOW USERS"), partial(client.post, "X")):
            with pytest.raises(InfluxError) as caught:
                ask()
            shown += [str(caught.value), repr(caught.value)]
        delivery.deliver([b"m f=1"])
        assert caplog.messages
        shown += [*caplog.messages, repr(client), client.address, client.rejection or ""]

        assert [each for each in shown if any(secret in each for secret in hidden)] == []
        assert "***" in "".join(shown)


def test_the_secret_before_is_masked_too(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("first-secret")
    client = stub.client(token_file=str(file))
    client.ping()
    file.write_text("second-secret")
    stub.answer = lambda handler: handler.reply(401, b"first-secret is not second-secret")

    with pytest.raises(QueryError, match=r"got 401: \*\*\* is not \*\*\*;"):
        client.query("SHOW USERS")


def test_nothing_that_a_worker_tells_shows_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    app = Celery("app", broker="memory://", set_as_current=False)
    places = {
        "token": {"token": "hunter2"},
        "password": {"username": "u", "password": "hunter2"},
        "env": {"token_env": "hunter2"},  # a mistake that is easily made
        "file": {"token_file": "hunter2"},
    }
    app.conf.influx_databases = {
        **{
            name: {"transport": "http", "host": "127.0.0.1", "http_port": 9, **given}
            for name, given in places.items()
        },
        "url": "http://u:hunter2@127.0.0.1:9/x",
        "query": "http://127.0.0.1:9/x?token=hunter2&gzip=true",
        "open": "http://127.0.0.1:9/x?gzip=true",
    }
    influx = celery_influx.install(app)
    options = influx.options
    shown = [repr(influx), repr(influx.options), repr(influx.stats())]
    for database in influx:
        shown += [repr(database), repr(database.options), database.address]
        _probe(database)

    assert len(caplog.messages) == len(influx.options.databases)
    told = control.conf(SimpleNamespace(app=app))  # `celery inspect conf`
    shown += [*caplog.messages, app.bugreport(), json.dumps(told)]
    assert "hunter2" not in "\n".join(shown)
    # As it was given, where it has none; and all means what it did.
    assert told["influx_databases"]["open"] == "http://127.0.0.1:9/x?gzip=true"
    assert celery_influx.Influx(app).options == options
