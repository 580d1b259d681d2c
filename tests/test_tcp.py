"""TCPConnection and UnixDatagrams against real sockets: what arrives, and what is noticed."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from celery_influx.database import Database
from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.transports import open_transport
from celery_influx.transports.tcp import TCPConnection
from celery_influx.transports.unixgram import UnixDatagrams
from tests.servers import free_port, load, wait_for
from tests.test_relay import exit_code, fork, open_files


class Listener:
    """Takes one connection after another and keeps what came by each, as Telegraf does."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_server(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.came: list[bytes] = []
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.came.append(b"")
            self.connections.append(connection)
            while data := self._read(connection):
                self.came[-1] += data

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        try:
            return connection.recv(65_536)
        except OSError:
            return b""

    def hang_up(self) -> None:
        """Close the last connection, as a server that is restarted does."""
        self.connections[-1].shutdown(socket.SHUT_RDWR)
        self.connections[-1].close()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener(0)
    yield made
    made.close()


def tcp(port: int, timeout: float = 5.0) -> TCPConnection:
    options = DatabaseOptions(
        host="127.0.0.1", transport="tcp", tcp_port=port, http_timeout=timeout
    )
    found = open_transport(options)
    assert isinstance(found, TCPConnection)
    return found


def test_lines_go_over_one_connection_each_ended_by_a_newline(listener: Listener) -> None:
    client = tcp(listener.port)
    assert client.address == f"tcp://127.0.0.1:{listener.port}"
    assert "open=False" in repr(client)

    client.write()
    wait_for(lambda: listener.came == [b""], 5)
    client.write(b"a f=1\nb f=2")
    client.write(b"c f=3")

    wait_for(lambda: listener.came == [b"a f=1\nb f=2\nc f=3\n"], 5)
    client.close()


def test_a_connection_that_the_server_has_closed_is_opened_again_before_anything_is_lost(
    listener: Listener,
) -> None:
    client = tcp(listener.port)
    client.write(b"a f=1")
    wait_for(lambda: listener.came == [b"a f=1\n"], 5)
    listener.connections[0].sendall(b"a server that talks")
    listener.hang_up()
    sock = client._socket
    assert sock
    sock.settimeout(5)
    # Its last word and its end are here before the next payload is.
    wait_for(lambda: sock.recv(100, socket.MSG_PEEK), 5)
    sock.settimeout(5.0)

    client.write()  # reads what it said
    client.write(b"b f=2")

    wait_for(lambda: listener.came[-1] == b"b f=2\n", 5)
    client.close()


def test_a_server_that_reads_nothing_costs_the_timeout_and_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        client = tcp(hole.getsockname()[1], timeout=0.2)
        with pytest.raises(SendError, match=r"no room within 0\.2 s \(timeout\)") as failed:
            for _ in range(1_000):
                client.write(b"m f=1" * 100_000)
        assert failed.value.cause == "timeout"
        assert "open=False" in repr(client)


def test_an_unknown_name_is_said() -> None:
    options = DatabaseOptions(host="no-such-host.invalid", transport="tcp")
    with pytest.raises(SendError) as failed:
        TCPConnection(options).write(b"m f=1")
    assert failed.value.cause == "dns"
    assert "tcp://[::1]:8094" in repr(TCPConnection(DatabaseOptions(host="::1")))


def test_a_child_that_closes_its_copy_leaves_the_parents_connection_open(
    listener: Listener,
) -> None:
    client = tcp(listener.port)
    client.write(b"a f=1")
    assert exit_code(fork(client.abandon)) == 0
    client.write(b"b f=2")
    wait_for(lambda: listener.came == [b"a f=1\nb f=2\n"], 5)
    before = open_files()
    client.close()
    assert open_files() == before - 1


# -- unixgram ----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telegraf.sock"


def bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.settimeout(5)
    return sock


def unixgram(path: Path) -> UnixDatagrams:
    found = open_transport(DatabaseOptions(transport="unixgram", socket_path=str(path)))
    assert isinstance(found, UnixDatagrams)
    return found


def test_each_payload_is_a_datagram(path: Path) -> None:
    with bound(path) as listener:
        client = unixgram(path)
        assert client.address == f"unixgram://{path}"
        client.write()
        client.write(b"a f=1\nb f=2")
        client.write(b"x" * client.max_bytes)

        assert listener.recv(100) == b"a f=1\nb f=2"
        assert listener.recv(100_000) == b"x" * 65_507
        client.close()


def test_a_full_queue_is_noticed_and_the_same_connection_goes_on(path: Path) -> None:
    with bound(path) as listener:
        client = unixgram(path)
        sent = 0
        with pytest.raises(SendError) as failed:
            while True:
                client.write(b"%d" % sent)
                sent += 1
        assert failed.value.cause == "EAGAIN"
        assert [int(listener.recv(100)) for _ in range(sent)] == list(range(sent))
        client.write(b"again")
        assert listener.recv(100) == b"again"
        client.close()


def test_a_listener_that_comes_back_is_found(path: Path) -> None:
    client = unixgram(path)
    with bound(path) as listener:
        client.write(b"a f=1")
        assert listener.recv(100) == b"a f=1"
    with pytest.raises(SendError, match="nobody listens") as failed:
        client.write(b"b f=2")
    assert failed.value.cause == "ECONNREFUSED"
    path.unlink()
    with bound(path) as listener:
        client.write(b"c f=3")
        assert listener.recv(100) == b"c f=3"
        client.close()


GREEN = """
import sys
{patch}
from celery_influx import Database, Point
from celery_influx.options import DatabaseOptions
database = Database(DatabaseOptions(transport={transport!r}, {where}, http_port=0))
for number in range(3):
    database.send_data(Point("m", {{"f": number}}, None, number))
    assert database.flush(5), number
assert database.close(5)
"""


@pytest.mark.parametrize(
    "patch",
    [
        "",
        "import gevent.monkey; gevent.monkey.patch_all()",
        "import eventlet; eventlet.monkey_patch()",
    ],
    ids=["threads", "gevent", "eventlet"],
)
def test_a_server_that_says_nothing_holds_up_no_second_payload(
    patch: str, listener: Listener, path: Path
) -> None:
    library = patch.partition(";")[0].removeprefix("import ").partition(".")[0]
    if library and not find_spec(library):
        load(library)
    expected = b"m f=0i 0\nm f=1i 1\nm f=2i 2\n"
    where = f"host='127.0.0.1', tcp_port={listener.port}"
    run = partial(subprocess.run, check=True, timeout=60)
    run([sys.executable, "-c", GREEN.format(patch=patch, transport="tcp", where=where)])
    wait_for(lambda: listener.came == [expected], 5)
    with bound(path) as datagrams:
        where = f"socket_path={str(path)!r}"
        run([sys.executable, "-c", GREEN.format(patch=patch, transport="unixgram", where=where)])
        assert [datagrams.recv(100) for _ in range(3)] == expected.splitlines()


# -- both, with all that is above them ---------------------------------------------------------

POINTS = [Point("m", {"number": number}, None, number + 1) for number in range(500)]
LINES = [b"m number=%di %d" % (number, number + 1) for number in range(500)]


def test_over_tcp_what_was_sent_while_nobody_listened_comes_afterwards() -> None:
    options = DatabaseOptions(
        host="127.0.0.1", transport="tcp", tcp_port=free_port(), batch_size=100, http_port=0
    )
    database = Database(options)
    for point in POINTS:
        database.send_data(point)
    assert database.flush(0.2) is False
    listener = Listener(options.tcp_port)
    try:
        assert database.flush(10)
        assert database.close(5)
        wait_for(lambda: listener.came and listener.came[-1].split(b"\n")[:-1] == LINES, 5)
        stats = database.stats()
        assert (stats["points"], stats["sent"], stats["queued"]) == (500, 500, 0)
        assert stats["errors"] == stats["errors_no_answer"] > 0
    finally:
        listener.close()


def test_by_unixgram_a_listener_that_is_slow_gets_every_line_once(path: Path) -> None:
    options = DatabaseOptions(transport="unixgram", socket_path=str(path), datagram_bytes=64)
    database = Database(options)
    with bound(path) as listener:
        for point in POINTS:
            database.send_data(point)
        wait_for(lambda: database.stats()["errors"], 10)  # the queue is full
        came: list[bytes] = []

        def read() -> None:
            while len(came) < len(LINES):
                came.extend(listener.recv(100).split(b"\n"))

        reader = threading.Thread(target=read)
        reader.start()
        assert database.flush(20)
        reader.join(10)
        assert came == LINES
        assert database.close(5)
    stats = database.stats()
    assert stats["sent"] == 500
    assert stats["errors"] == stats["errors_no_answer"] > 0
