"""Pools of gevent and eventlet, and any process patched by them: all points, and no stalled hub."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

import celery_influx
from tests.integration.worker import (
    Worker,
    environment,
    publisher,
    revoke,
    sending,
    skip_without,
    stats,
)
from tests.servers import Influxd, Redis, wait_for

LIBRARIES = ["gevent", "eventlet"]
#: Celery 5.5 and newer; before, a task goes on when it is revoked.
GEVENT_TERMINATES = hasattr(Celery(set_as_current=False).conf, "worker_soft_shutdown_timeout")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    """Each library that is installed."""
    skip_without(request.param)
    return str(request.param)


# -- workers -------------------------------------------------------------------------------------


class Running:
    """A worker of a green pool with the app ``states``, and all that is needed to look at it."""

    def __init__(
        self, worker: Worker, sender: Celery, store: redis.Redis, influxd: Influxd, database: str
    ) -> None:
        self.worker = worker
        self.sender = sender
        self.store = store
        self._influxd = influxd
        self._database = database
        self.url = f"http://127.0.0.1:{influxd.http_port}/{database}"

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Send ``states.<name>``."""
        return self.sender.send_task(f"states.{name}", args, **options)

    def runs(self, *ids: str, at_least: int) -> list[dict[str, Any]]:
        """The ``celery_task`` points of these tasks' runs, as soon as there are so many."""

        def enough() -> list[dict[str, Any]]:
            rows = self._influxd.rows("celery_task", self._database)
            found = [row for row in rows if row["id"] in ids]
            return found if len(found) >= at_least else []

        found = wait_for(enough, 20, f"{at_least} points of {ids}")
        assert isinstance(found, list)
        return found

    def settle(self) -> None:
        """Wait until what would come too much would have come."""
        marks = [self.send("succeed").id for _ in range(4)]
        self.runs(*marks, at_least=4)

    def began(self, task_id: str) -> None:
        """Wait for the start of a task."""
        wait_for(lambda: self.store.llen(f"began {task_id}"), 10, f"{task_id} began")


@pytest.fixture(scope="module", params=LIBRARIES)
def running(
    request: pytest.FixtureRequest,
    redis_server: Redis,
    influxd: Influxd,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A worker of each green pool in turn, writing to a database of its own."""
    pool = request.param
    skip_without(pool)
    broker = redis_server.url.removesuffix("/0") + "/2"
    store = redis.Redis.from_url(broker, decode_responses=True)
    store.flushdb()
    database = f"greenlets-{pool}"
    influxd.query(f'CREATE DATABASE "{database}"')
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.05"
    config = {"influx_databases": {"main": url}, "influx_task_ids": True}
    sender = publisher(broker)
    celery_influx.install(sender)
    folder = tmp_path_factory.mktemp(f"greenlets-{pool}")
    with Worker(folder, "states", broker, config, pool=pool, concurrency=15) as worker:
        # It is ready for tasks before it is for these.
        wait_for(lambda: sender.control.ping(timeout=0.5, limit=1), 10, "an answer to a ping")
        yield Running(worker, sender, store, influxd, database)
        assert worker.stop() == 0
    sender.close()


def test_every_end_of_a_run_in_a_greenlet_gives_exactly_one_point(running: Running) -> None:
    ended: dict[str, list[tuple[str, str | None, int]]] = {}
    revoked = "revoked-before-it-was-sent"
    revoke(running.sender, revoked)
    past = datetime.now(timezone.utc) - timedelta(seconds=5)

    ended[running.send("succeed").id] = [("SUCCESS", None, 0)]
    ended[running.send("fail").id] = [("FAILURE", "Broken", 0)]
    ended[running.send("retry").id] = [
        ("RETRY", "Broken", 0),
        ("RETRY", "Broken", 1),
        ("SUCCESS", None, 2),
    ]
    ended[running.send("ignored").id] = [("IGNORED", "Ignore", 0)]
    ended[running.send("rejected").id] = [("REJECTED", "Reject", 0)]
    ended[running.send("succeed", expires=past).id] = [("REVOKED", None, 0)]
    ended[running.send("succeed", task_id=revoked).id] = [("REVOKED", None, 0)]
    ended[running.send("does_not_exist").id] = [("REJECTED", "NotRegistered", 0)]
    # The soft limit is enforced by neither; they say so at the start, and let it run.
    ended[running.send("block", 0.3, soft_time_limit=0.1).id] = [("SUCCESS", None, 0)]
    expected = sum(map(len, ended.values()))
    running.runs(*ended, at_least=expected)
    running.settle()

    by_id: dict[str, list[tuple[str, str | None, int]]] = {}
    for row in sorted(running.runs(*ended, at_least=expected), key=lambda row: row["retries"]):
        seen = (row["state"], row.get("exception"), row["retries"])
        by_id.setdefault(row["id"], []).append(seen)
        assert row["worker"] == running.worker.name
        assert row["queue"] == "celery"
        # Of a thread with many greenlets nobody can say whose time it was.
        assert row.get("cpu") is None
        never_ran = row["state"] == "REVOKED" or row.get("exception") == "NotRegistered"
        assert (row["runtime"] is None) == never_ran
    assert by_id == ended


def test_a_green_worker_says_at_its_start_and_in_inspect_stats_what_it_sends(
    running: Running,
) -> None:
    marks = [running.send("succeed").id for _ in range(3)]
    running.runs(*marks, at_least=3)

    account = stats(running.sender, running.worker)["main"]

    line = f"celery_influx: main → {running.url} (task runs, timed, send_data)"
    assert running.worker.log().count(line) == 1
    assert account["sent"] >= 3
    assert account["points"] == account["sent"] + account["queued"]


@pytest.mark.alone
def test_a_hard_time_limit_of_a_greenlet_gives_one_point(running: Running) -> None:
    task = running.send("block", 1.0, time_limit=0.4).id

    running.runs(task, at_least=1)
    running.settle()

    (run,) = running.runs(task, at_least=1)
    if "gevent" in running.worker.name:
        assert (run["state"], run.get("exception")) == ("FAILURE", "TimeLimitExceeded")
        assert run["runtime"] == pytest.approx(0.4, abs=0.2)
    else:  # eventlet has no limits
        assert (run["state"], run.get("exception")) == ("SUCCESS", None)
        assert run["runtime"] == pytest.approx(1.0, abs=0.2)


def test_a_greenlet_that_is_terminated_gives_one_point(running: Running) -> None:
    task = running.send("pause_and_note", 5.0).id
    running.began(task)
    running.sender.control.revoke(task, terminate=True)

    running.runs(task, at_least=1)
    running.settle()

    (run,) = running.runs(task, at_least=1)
    killed = "eventlet" in running.worker.name or GEVENT_TERMINATES
    assert (run["state"], run.get("exception")) == ("REVOKED" if killed else "SUCCESS", None)
    assert (run["runtime"] < 4) == killed


@pytest.mark.alone
def test_greenlets_side_by_side_have_runtimes_and_points_of_their_own(running: Running) -> None:
    began = time.monotonic()
    seconds = {running.send("block", tenths / 10).id: tenths / 10 for tenths in range(1, 16)}

    runs = running.runs(*seconds, at_least=15)

    assert time.monotonic() - began < sum(seconds.values()) / 2  # they did run side by side
    for run in runs:
        assert run["runtime"] == pytest.approx(seconds[run["id"]], abs=0.2)


@pytest.mark.parametrize("scheme", ["http", pytest.param("udp", marks=pytest.mark.once)])
def test_a_warm_shutdown_in_the_middle_of_the_load_loses_no_point(
    library: str,
    scheme: str,
    influxd: Influxd,
    database: str,
    redis_server: Redis,
    tmp_path: Path,
) -> None:
    client = redis.Redis.from_url(redis_server.url, decode_responses=True)
    client.flushdb()
    # Nothing but the end makes it send, or 5,000 lines at once.
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=60"
    if scheme == "udp":
        database = influxd.udp_database
        influxd.query(f'DROP DATABASE "{database}"')
        influxd.query(f'CREATE DATABASE "{database}"')
        ports = f"127.0.0.1:{influxd.udp_port}?http_port={influxd.http_port}"
        url = f"udp://{ports}&flush_interval=60"
    config = {"influx_databases": {"main": url}}
    sender = publisher(redis_server.url)

    with Worker(
        tmp_path, "load", redis_server.url, config, pool=library, concurrency=30, level="warning"
    ) as worker:
        with sending(sender) as send:
            for number in range(1_500):
                send("load.work", [number], ignore_result=True)
        wait_for(lambda: int(client.get("tasks") or 0) >= 300, 20, "some tasks have run")
        exit_code = worker.stop(signal.SIGTERM)
    sender.close()

    assert exit_code == 0
    tasks, sent = int(client.get("tasks") or 0), int(client.get("custom") or 0)
    assert sent == 4 * tasks
    assert 300 <= tasks <= 1_500
    wait_for(lambda: influxd.count("celery_task", "runtime", database) >= tasks, 10)
    wait_for(lambda: influxd.count("custom", "serial", database) >= sent, 10)
    serials = [row["serial"] for row in influxd.rows("custom", database)]
    assert len(serials) == len(set(serials)) == sent
    assert influxd.count("celery_task", "runtime", database) == tasks


# -- the hub -------------------------------------------------------------------------------------


class Slow:
    """An HTTP server that takes what is written and answers so many seconds later, or never."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.lines = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/x"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as stream:
            while stream.readline():
                length = 0
                while header := stream.readline().strip().lower():
                    if header.startswith(b"content-length:"):
                        length = int(header.partition(b":")[2])
                body = stream.read(length)
                if self._seconds is None:
                    continue
                time.sleep(self._seconds)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                self.lines += body.count(b"\n") + 1

    def close(self) -> None:
        """Close all connections."""
        for each in (self._listener, *self._connections):
            each.close()


@pytest.fixture(
    params=[pytest.param(0.2, marks=pytest.mark.long, id="slow"), pytest.param(None, id="never")]
)
def slow(request: pytest.FixtureRequest) -> Iterator[Slow]:
    """A server that answers late, and one that never does."""
    server = Slow(request.param)
    yield server
    server.close()


@pytest.fixture
def quick() -> Iterator[Slow]:
    """A server that answers at once."""
    server = Slow(0)
    yield server
    server.close()


@pytest.fixture
def sink() -> Iterator[int]:
    """The UDP port of somebody who throws away what comes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def patched(library: str, function: str, **arguments: Any) -> dict[str, Any]:
    """What a function of ``apps/stalls.py`` found, in a process patched by ``library``."""
    module = ["-W", "ignore", "-m", "tests.integration.apps.stalls"]
    run = subprocess.run(
        [sys.executable, *module, library, function, json.dumps(arguments)],
        env=environment("memory://"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print(library, function, found)
    assert isinstance(found, dict)
    return found


ROUNDS = 3


@pytest.mark.alone
@pytest.mark.once
def test_a_thousand_greenlets_sending_to_a_slow_server_stall_the_hub_for_less_than_5_ms(
    library: str, slow: Slow
) -> None:
    stalls: dict[bool, list[float]] = {True: [], False: []}
    # Each kind in processes of its own: what a round leaves to be done would be in the next one's.
    for enabled in (True, False, False, True):
        before = slow.lines
        found = patched(
            library,
            "sends",
            url=f"{slow.url}?flush_interval=0.05&http_timeout=0.4",
            enabled=enabled,
            rounds=ROUNDS,
            points=2,
            seconds=0.2,
        )
        stalls[enabled] += found["stalls"]
        made = (ROUNDS + 1) * 2 * 1_000 if enabled else 0
        account, came = found["stats"], slow.lines - before
        assert account["points"] == made
        assert sum(account[name] for name in ("sent", "lost", "dropped", "queued")) == made
        assert account["sent"] == came
        assert came in (0, made)

    # Of each kind's rounds the one in the middle: the host may take the processors away in any, for
    # up to 8 ms as seen in a process that does nothing, and that is not told in time to take it off.
    assert statistics.median(stalls[True]) - statistics.median(stalls[False]) < 5


@pytest.mark.once
def test_the_first_point_of_a_process_does_not_stop_the_hub_for_an_import(
    library: str, quick: Slow
) -> None:
    found = [patched(library, "first_point", url=quick.url) for _ in range(3)]

    assert all(each["flushed"] for each in found)
    # Reading Celery's configuration and starting the batcher take some; requests took 60.
    assert statistics.median(each["stall"] for each in found) < 25


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["http", "udp"])
def test_a_backlog_leaves_with_turns_for_the_hub_in_between(
    library: str, scheme: str, quick: Slow, sink: int
) -> None:
    # As fast as it goes: what slows UDP down by default would give the hub its turns.
    fast = "bytes_per_second=1000000000&datagram_bytes=1472&http_port=0"
    url = quick.url if scheme == "http" else f"udp://127.0.0.1:{sink}?{fast}"

    found = patched(library, "backlog", url=url, lines=50_000)

    assert found["sent"] == 5 * 50_000 + 1
    assert statistics.median(found["stalls"]) < 8


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["http", "udp"])
def test_a_name_that_is_looked_up_for_long_does_not_stall_the_hub(
    library: str, scheme: str
) -> None:
    url = f"{scheme}://no-such-host.invalid:8089/x?flush_interval=0.1"

    found = patched(library, "unknown_host", url=url)

    assert found["asked"]
    assert found["flushed"] is False
    # Over HTTP it is tried again.
    assert found["account"]["lost" if scheme == "udp" else "errors_no_answer"] >= 1
    assert found["took"] > 0.2
    assert found["stall"] < 50


@pytest.mark.once
def test_a_full_socket_is_waited_for_without_stalling_the_hub(library: str, sink: int) -> None:
    found = patched(library, "full_socket", url=f"udp://127.0.0.1:{sink}?http_port=0")

    assert found["outcome"] == "EAGAIN"
    assert 0.09 < found["took"] < 1
    assert found["stall"] < 50


@pytest.mark.once
def test_a_greenlet_that_computes_holds_points_up_no_longer_than_it_holds_up_the_hub(
    library: str, quick: Slow
) -> None:
    found = patched(library, "hog", url=f"{quick.url}?flush_interval=0.05")

    # None while it computed, all as soon as it gave way, even if only for a millisecond.
    assert found["sent"] == [1, 2, 3]


@pytest.mark.once
def test_points_that_wait_at_the_end_of_a_patched_process_are_sent(
    library: str, quick: Slow
) -> None:
    patched(library, "leaves", url=f"{quick.url}?flush_interval=60")

    assert quick.lines == 1
