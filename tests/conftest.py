"""Fixtures shared by all tests: real servers, one of each per test process."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
import redis
from celery import Celery

from celery_influx.errors import INTERRUPTS
from celery_influx.line_reader import decode
from celery_influx.point import Point
from tests import servers
from tests.integration.worker import publisher
from tests.servers import Influxd, RabbitMQ, Redis


class Room:
    """Where tests run: many at once (``pytest -n 5``), or one that is marked ``alone``.

    Locks on two files that are there anyway. Who waits for the room keeps the gate shut, or the
    others would never leave it empty.
    """

    def __init__(self) -> None:
        self._gate, self._room = (
            os.open(file, os.O_RDONLY) for file in (__file__, servers.__file__)
        )
        self._stays = False

    def enter(self, *, alone: bool) -> None:
        """Wait for a place in it, or for it to be empty."""
        if not self._stays:
            fcntl.flock(self._gate, fcntl.LOCK_EX)
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def leave(self, *, stay: bool) -> None:
        """``stay``: the next one will be alone, too. Each entry would wait for another's test."""
        self._stays = stay
        if not stay:
            fcntl.flock(self._room, fcntl.LOCK_UN)


ROOM = Room()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Give each test its place."""
    alone, next_alone = (each and each.get_closest_marker("alone") for each in (item, nextitem))
    ROOM.enter(alone=bool(alone))
    try:
        return (yield)
    finally:
        ROOM.leave(stay=bool(alone and next_alone))


@pytest.fixture(autouse=True)
def no_collection_inside_of_celerys_client() -> Iterator[None]:
    """Keep the collector out while a test runs.

    A collected AsyncResult unsubscribes from Redis, wherever it is collected: inside of redis-py's
    own lock, which is not reentrant, it hangs for ever (seen here with Celery 5.3).
    """
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def influxd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    """One influxd 1.x for the whole run; a test makes databases of its own in it."""
    with Influxd(tmp_path_factory.mktemp("influxd")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One redis-server for the whole run."""
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
        # Each of Celery's results says at its end that it wants no more news: to this server, over
        # and over again where that is gone.
        gc.collect()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """One rabbitmq-server for the whole run."""
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def broker(redis_server: Redis) -> str:
    """URL of an empty Redis."""
    redis.Redis.from_url(redis_server.url).flushdb()
    return redis_server.url


@pytest.fixture
def store(broker: str) -> redis.Redis:
    """Where the tasks of a test's workers count."""
    return redis.Redis.from_url(broker, decode_responses=True)


@pytest.fixture
def sender(broker: str) -> Iterator[Celery]:
    """A publisher without the plugin."""
    app = publisher(broker)
    yield app
    app.close()


_databases = iter(range(1_000_000))


@pytest.fixture
def database(influxd: Influxd) -> str:
    """A fresh, empty database in ``influxd``."""
    name = f"test{next(_databases)}"
    influxd.query(f'CREATE DATABASE "{name}"')
    return name


def run_python(
    code: str, *arguments: str, flags: tuple[str, ...] = (), timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run ``code``, which may be indented, in a Python of its own that finds what this one does."""
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class TimeIsUp(Exception):
    """Stands for Celery's SoftTimeLimitExceeded, which a signal's handler raises anywhere."""


@pytest.fixture
def time_is_up() -> Iterator[None]:
    """``TimeIsUp`` means the caller."""
    INTERRUPTS.add(TimeIsUp)
    yield
    INTERRUPTS.discard(TimeIsUp)


class Receiver:
    """A UDP port that keeps what comes to it, with nothing of the package's in between."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.02)
        self._lines: list[bytes] = []
        self.url = f"udp://127.0.0.1:{self._socket.getsockname()[1]}?http_port=0"

    def points(self, measurement: str, at_least: int = 0) -> list[Point]:
        """All points of a measurement so far, as soon as there are ``at_least`` so many."""

        def arrived() -> list[Point] | None:
            with contextlib.suppress(TimeoutError):
                while True:
                    self._lines += self._socket.recv(65_536).split(b"\n")
            points = [decode(line) for line in self._lines if line]
            found = [point for point in points if point.measurement == measurement]
            return found if len(found) >= at_least else None

        deadline = time.monotonic() + 10
        while (found := arrived()) is None:
            assert time.monotonic() < deadline, f"less than {at_least} points of {measurement}"
        return found

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Where the points of this test go, by ``influx_databases = {"main": receiver.url}``."""
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def other_receiver() -> Iterator[Receiver]:
    """One more."""
    found = Receiver()
    yield found
    found.close()
