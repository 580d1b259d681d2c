"""HTTPS with a client's certificate, and without looking at the server's: with a real TLS server.

Other certificates, and influxd's own HTTPS: integration/test_http_influxd.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_influx.errors import SendError
from tests.certificates import make
from tests.test_http import Stub

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("certificates"))
    pair = (folder / "client.pem").read_text() + (folder / "client.key").read_text()
    (folder / "pair.pem").write_text(pair)
    return folder


@contextlib.contextmanager
def serving(files: Path, *, ask: bool = True, newest: bool = True) -> Iterator[Stub]:
    """A server by HTTPS, which may ask its clients for a certificate; by TLS 1.3 or 1.2."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files / "ca.pem")
    context.load_cert_chain(files / "server.pem", files / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED if ask else ssl.CERT_NONE
    if not newest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Stub() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def options(files: Path, certificate: str = "", key: str = "", **more: Any) -> dict[str, Any]:
    given = {"client_certificate": certificate, "client_key": key}
    paths = {name: str(files / file) for name, file in given.items() if file}
    return {"secure": True, "ca_file": str(files / "ca.pem"), "http_timeout": 5.0, **paths, **more}


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize(("certificate", "key"), [("client.pem", "client.key"), ("pair.pem", "")])
def test_a_server_that_wants_a_certificate_gets_it(
    files: Path, certificate: str, key: str, newest: bool
) -> None:
    subjects = []

    def answer(handler: Any) -> None:
        subjects.append(handler.connection.getpeercert()["subject"])
        handler.reply(204)

    with serving(files, newest=newest) as server:
        server.answer = answer
        with server.client(**options(files, certificate, key)) as client:
            assert client.write(b"m f=1") == 0

        assert server.asked[0].body == b"m f=1"
    assert subjects == [((("commonName", "127.0.0.1"),),)]


@pytest.mark.parametrize(
    ("certificate", "key", "text"),
    [
        ("", "", "ALERT.*; does the server want a 'client_certificate' and 'client_key'[?]"),
        ("stranger.pem", "stranger.key", "ALERT.*; does the server trust 'client_certificate'[?]"),
        ("client.pem", "stranger.key", "'client_key' is not the key of 'client_certificate'"),
        ("client.pem", "", "are 'client_certificate', 'client_key' and 'ca_file' PEM files"),
        ("extensions", "client.key", "are 'client_certificate', 'client_key' and 'ca_file' PEM"),
        ("no.pem", "client.key", "client_certificate '.*no.pem' cannot be read"),
        ("client.pem", "no.key", "client_key '.*no.key' cannot be read"),
    ],
)
def test_a_certificate_that_the_server_does_not_take_is_named(
    files: Path, certificate: str, key: str, text: str
) -> None:
    # By TLS 1.3 the server's word may be lost as it hangs up, for our request is on its way.
    with serving(files, newest=False) as server:
        client = server.client(**options(files, certificate, key))
        with client, pytest.raises(SendError, match=text) as caught:
            client.write(b"m f=1")

        assert caught.value.cause == "tls"
        assert server.asked == []


def test_without_a_certificate_nothing_is_written_by_tls_1_3_either(files: Path) -> None:
    with serving(files) as server:
        with server.client(**options(files)) as client, pytest.raises(SendError):
            client.write(b"m f=1")

        assert server.asked == []


def test_insecure_trusts_any_certificate_and_says_so_once_in_a_process(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(files, ask=False) as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        strict = options(files, ca_file=None)
        with server.client(**strict) as client, pytest.raises(SendError, match="is not trusted"):
            client.ping()
        assert server.asked == []
        assert caplog.messages == []

        for _ in range(2):
            with server.client(**strict, insecure=True) as client:
                client.ping()
                client.write(b"m f=1")
        address = client.address

    assert len(server.asked) == 4
    assert [str(each.message) for each in warned] == []
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.getMessage() == (
        f"{address}: any certificate is trusted ('insecure'): who stands in between reads and "
        "changes all that is sent, the password too; set 'ca_file' instead"
    )


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_is_another_process_and_says_it_again(files: Path, tmp_path: Path) -> None:
    with serving(files, ask=False) as server:
        client = server.client(**options(files, ca_file=None, insecure=True))
        client.ping()
        log = tmp_path / "log"

        child = os.fork()
        if child == 0:
            code = 1
            try:
                handler = logging.FileHandler(log)
                logging.getLogger("celery_influx").addHandler(handler)
                client.abandon()
                client.ping()
                client.ping()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert log.read_text().count("any certificate is trusted") == 1


def test_insecure_is_nothing_to_warn_of_without_https(caplog: pytest.LogCaptureFixture) -> None:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with server.client(insecure=True) as client:
            client.ping()
        server.shutdown()
        thread.join()

    assert caplog.messages == []
