"""Real servers for tests: each on free ports of 127.0.0.1, with a data folder of its own.

A server, or a library, that is not installed skips the test with the command that mends it; in CI
(``CI=true``) it fails the test instead.
"""

from __future__ import annotations

import http.client
import importlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import pytest

MEND = "sh scripts/install-servers.sh"


def missing(what: str) -> NoReturn:
    """End this test: it cannot run here, and in CI it must."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def find(program: str) -> str:
    """The path of ``program``, or the end of this test."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin")
    return path or missing(f"{program} is not installed; to install the servers: {MEND}")


def load(library: str) -> Any:
    """The Python library, or the end of this test."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        missing(
            f"{library} is not installed ({error}); to install the test's: pip install '.[test]'"
        )


def _below_ephemeral() -> int:
    """The first port that the kernel may give to an outgoing connection."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


_PORTS = range(10_000, _below_ephemeral())
_handed_out: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody holds now, by TCP or by UDP, and that none will be given.

    A port that the kernel picks (``bind`` to 0) is free only until it picks it again for
    somebody's outgoing connection, perhaps before the server under test has bound it. So this
    one is from below those; and it is free for both protocols, since VictoriaMetrics listens
    to both on one port.
    """
    for _ in range(1000):
        port = random.SystemRandom().choice(_PORTS)
        if port in _handed_out:
            continue
        try:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with socket.socket(socket.AF_INET, kind) as sock:
                    sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        _handed_out.add(port)
        return port
    raise AssertionError("no free port found among 1000 tries")


def wait_for(condition: Callable[[], object], timeout: float = 30.0, what: str = "") -> object:
    """Poll ``condition`` until it is true; its value, or an AssertionError after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.01)


def answers(port: int, path: str = "") -> bool:
    """Whether something listens on ``port``; with ``path``, answers GET there with 2xx."""
    try:
        if not path:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status // 100 == 2
        finally:
            connection.close()
    except OSError:
        return False


class Server:
    """A process that is ready when ``start`` returns, and gone when ``stop`` does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line to run."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether it answers by now."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder
            )

        def up() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"{self} ended:\n{self.log()[-3000:]}")
            return self.ready()

        wait_for(up, 60, f"{type(self).__name__} up")

    def stop(self, *, kill: bool = False) -> None:
        """End it; with ``kill`` by SIGKILL. Idempotent."""
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        self.process = None

    def log(self) -> str:
        """All it has printed so far."""
        return (self.folder / "log").read_text(errors="replace")

    def __enter__(self):
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class Influxd(Server):
    """InfluxDB 1.x: ``http_port``, and one UDP port writing into the database ``udp_database``.

    Args:
        folder: Its data folder.
        auth: Ask for credentials over HTTP. Create the first admin by ``query`` first.
        tls: (certificate, key) files: HTTP becomes HTTPS.
        udp_precision: The unit in which UDP timestamps are read: "", "u", "ms" or "s".
        udp: Without it nobody listens on ``udp_port``, as in an InfluxDB that was just installed.
        make_database: Not to wait for the first datagram, at which influxd makes it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        udp_database: str = "celery",
        auth: bool = False,
        tls: tuple[Path, Path] | None = None,
        udp_precision: str = "",
        max_body_size: int = 25_000_000,
        udp: bool = True,
        make_database: bool = True,
    ) -> None:
        super().__init__(folder)
        self.program = find("influxd")
        self.http_port = free_port()
        self.udp_port = free_port()
        self.udp_database = udp_database
        self.udp_precision = udp_precision
        self.auth = auth
        self.tls = tls
        self.max_body_size = max_body_size
        self.udp = udp
        self.make_database = make_database and not auth

    def command(self) -> list[str]:
        tls = ""
        if self.tls:
            certificate, key = self.tls
            tls = (
                f'https-enabled = true\nhttps-certificate = "{certificate}"\n'
                f'https-private-key = "{key}"'
            )
        config = f"""
reporting-disabled = true
bind-address = "127.0.0.1:{free_port()}"
[meta]
dir = "{self.folder}/meta"
[data]
dir = "{self.folder}/data"
wal-dir = "{self.folder}/wal"
[monitor]
store-enabled = false
[http]
bind-address = "127.0.0.1:{self.http_port}"
log-enabled = false
auth-enabled = {str(self.auth).lower()}
max-body-size = {self.max_body_size}
{tls}
"""
        if self.udp:
            config += f"""
[[udp]]
enabled = true
bind-address = "127.0.0.1:{self.udp_port}"
database = "{self.udp_database}"
batch-size = 5000
batch-pending = 100
batch-timeout = "50ms"
read-buffer = 8388608
precision = "{self.udp_precision}"
"""
        path = self.folder / "influxdb.conf"
        path.write_text(config)
        return [self.program, "-config", str(path)]

    def ready(self) -> bool:
        if self.tls:
            return answers(self.http_port)
        return answers(self.http_port, "/ping")

    def start(self) -> None:
        super().start()
        if self.make_database:
            self.query(f'CREATE DATABASE "{self.udp_database}"')

    @property
    def http_url(self) -> str:
        """Its root URL."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.http_port}"

    def query(self, statement: str, database: str | None = None, **params: str) -> list[dict]:
        """Run any InfluxQL by POST, apart from the package under test; the series found."""
        import requests

        params = {"q": statement, "db": database or self.udp_database, "epoch": "ns", **params}
        answer = requests.post(f"{self.http_url}/query", params=params, timeout=30, verify=False)
        body = answer.json()
        for result in body.get("results", []):
            if "error" in result:
                raise AssertionError(result["error"])
        if "error" in body:
            raise AssertionError(body["error"])
        return [series for result in body["results"] for series in result.get("series", [])]

    def write(self, body: bytes, database: str | None = None, **params: str) -> tuple[int, str]:
        """POST raw bytes to /write; status and body of the answer."""
        import requests

        params = {"db": database or self.udp_database, **params}
        answer = requests.post(f"{self.http_url}/write", params=params, data=body, timeout=30)
        return answer.status_code, answer.text

    def count(self, measurement: str, field: str, database: str | None = None) -> int:
        """COUNT of one field over all time; 0 where there is none."""
        found = self.query(f'SELECT COUNT("{field}") FROM "{measurement}"', database)
        return int(found[0]["values"][0][1]) if found else 0

    def rows(self, measurement: str, database: str | None = None) -> list[dict]:
        """Every point as a dict of its tags and fields, ``time`` in ns, oldest first."""
        found = self.query(f'SELECT * FROM "{measurement}"', database)
        return [
            dict(zip(s["columns"], values, strict=True)) for s in found for values in s["values"]
        ]


class Redis(Server):
    """redis-server without persistence."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.program = find("redis-server")
        self.port = free_port()

    def command(self) -> list[str]:
        return [self.program, "--port", str(self.port), "--save", "", "--bind", "127.0.0.1"]

    def ready(self) -> bool:
        return answers(self.port)

    @property
    def url(self) -> str:
        """For Celery's ``broker`` and ``backend``."""
        return f"redis://127.0.0.1:{self.port}/0"


class VictoriaMetrics(Server):
    """victoria-metrics, line protocol over HTTP and UDP."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.program = find("victoria-metrics")
        self.http_port = free_port()
        self.udp_port = free_port()

    def command(self) -> list[str]:
        return [
            self.program,
            f"-storageDataPath={self.folder}/data",
            f"-httpListenAddr=127.0.0.1:{self.http_port}",
            f"-influxListenAddr=127.0.0.1:{self.udp_port}",
        ]

    def ready(self) -> bool:
        return answers(self.http_port, "/health")


class RabbitMQ(Server):
    """rabbitmq-server as a node of its own name and ports."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        own = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        # Debian's command becomes another user, who may not write to our folder.
        self.program = str(own) if own.exists() else find("rabbitmq-server")
        self.port = free_port()
        self.dist_port = free_port()

    def command(self) -> list[str]:
        settings = {
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": f"{self.folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{self.folder}/log.d",
            "RABBITMQ_PID_FILE": f"{self.folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self.folder}/plugins",
            "HOME": str(self.folder),
        }
        return ["env", *(f"{key}={value}" for key, value in settings.items()), self.program]

    def ready(self) -> bool:
        return answers(self.port)

    @property
    def url(self) -> str:
        """For Celery's ``broker``."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"
