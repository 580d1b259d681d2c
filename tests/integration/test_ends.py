"""How processes end: what is kept, what is counted, and how long it takes.

Real workers, Redis and influxd. Each point carries its number, and tasks note in Redis each that
``send_data`` returned from: so a missing point shows, and so does one that was stored twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.app.defaults import NAMESPACES

import celery_influx
from celery_influx.listener import Listener
from tests.integration.worker import Worker, alive, environment, publisher, skip_without
from tests.servers import Influxd, free_port, wait_for

POOLS = ["prefork", "threads", "solo"]
GREEN = ["gevent", "eventlet"]
#: Celery 5.5 and later: a cold shutdown first waits so long for the running tasks.
HAS_SOFT_SHUTDOWN = "soft_shutdown_timeout" in NAMESPACES["worker"]
SOFT = {"worker_soft_shutdown_timeout": 0.3} if HAS_SOFT_SHUTDOWN else {}
#: Seconds; and there is one attempt at a time.
FLUSH_INTERVAL, HTTP_TIMEOUT = 0.1, 0.5


class Scene:
    """A worker with the app ``ends``, the tasks' notes, and what is stored of their points."""

    def __init__(self, influxd: Influxd, database: str, broker: str, folder: Path) -> None:
        self.store = redis.Redis.from_url(broker, decode_responses=True)
        self.url = f"http://127.0.0.1:{influxd.http_port}/{database}"
        self._influxd = influxd
        self._database = database
        self._broker = broker
        self._folder = folder
        self._sender = publisher(broker)

    def worker(self, pool: str, url: str = "", **config: Any) -> Worker:
        """A worker of ``pool`` that sends to ``url``, or else to influxd."""
        if pool in GREEN:
            skip_without(pool)
        limits = f"flush_interval={FLUSH_INTERVAL}&http_timeout={HTTP_TIMEOUT}"
        config = {"influx_databases": {"main": url or f"{self.url}?{limits}"}, **config}
        return Worker(self._folder, "ends", self._broker, config, pool=pool, level="warning")

    def stream(self, pool: str, seconds: float) -> None:
        """Have tasks send points for so long; return as soon as all that can run do."""
        running = 1 if pool == "solo" else 2
        for number in range(running):
            self.send("stream", number * 1_000_000, seconds)
        wait_for(lambda: len(self.starts()) == running, 20, "the tasks run")
        wait_for(lambda: self.store.llen("accepted") >= 60, 20, "they send points")

    def hush(self) -> None:
        """Have the tasks do nothing for half a second, which has just begun."""
        self.store.set("hush", 1)
        wait_for(lambda: self.store.llen("hushed") == len(self.starts()), 5, "silence")
        time.sleep(0.05)  # the last of them has said so, and is about to

    def send(self, name: str, *args: Any) -> None:
        """Send a task."""
        self._sender.send_task(f"ends.{name}", args, ignore_result=True)

    def starts(self) -> list[str]:
        """Task id and pid of each start of a task's body."""
        return self.store.lrange("starts", 0, -1)  # type: ignore[return-value]

    def said(self) -> list[str]:
        """What the bodies say that ended them."""
        return self.store.lrange("ends", 0, -1)  # type: ignore[return-value]

    def accepted(self, until: float = 2e9) -> set[int]:
        """The numbers of the points that ``send_data`` returned from before that moment."""
        notes = [each.split() for each in self.store.lrange("accepted", 0, -1)]  # type: ignore[union-attr]
        return {int(serial) for serial, when in notes if float(when) < until}

    def stored(self, at_least: int = 0) -> list[int]:
        """The numbers of the points that InfluxDB has, as soon as there are so many."""

        def count() -> int:
            return self._influxd.count("custom", "serial", self._database)

        with contextlib.suppress(AssertionError):
            wait_for(lambda: count() >= at_least, 5)
        return [row["serial"] for row in self._influxd.rows("custom", self._database)]

    def runs(self) -> list[dict[str, Any]]:
        """The ``celery_task`` points."""
        return self._influxd.rows("celery_task", self._database)

    def close(self) -> None:
        """Close the connection to the broker."""
        self._sender.close()


@pytest.fixture
def scene(influxd: Influxd, database: str, broker: str, tmp_path: Path) -> Iterator[Scene]:
    """An empty database and an empty broker."""
    found = Scene(influxd, database, broker, tmp_path)
    yield found
    found.close()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """The port of a TCP server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


soft = pytest.mark.skipif(not HAS_SOFT_SHUTDOWN, reason="soft shutdowns came with Celery 5.5")
cold = pytest.mark.skipif(
    not HAS_SOFT_SHUTDOWN, reason="Celery before 5.5 hangs there, without the plugin too"
)
#: How a worker is told to end: signals, and the seconds between them.
ENDS = {
    "warm": [signal.SIGTERM],
    "warm-twice": [signal.SIGTERM, signal.SIGTERM],
    "cold": [signal.SIGQUIT],
    "cold-then-warm": [signal.SIGQUIT, signal.SIGTERM],
    "soft": [signal.SIGQUIT],
    "warm-then-soft": [signal.SIGTERM, signal.SIGQUIT],
}


def end(worker: Worker, how: str) -> tuple[int, float]:
    """End ``worker``: its exit code, and how long that took."""
    began = time.monotonic()
    *first, last = ENDS[how]
    for number in first:
        os.kill(worker.pid(), number)
        time.sleep(0.2)  # the second one is for a worker that is about to end
    code = worker.stop(last)
    return code, time.monotonic() - began


LOST = "WorkerLostError"
#: What ended a run, by its point: as its body says itself, or that it cannot.
OWN_END, UNASKED, KILLED = "its own end", "NotImplementedError", "killed"
ENDED_BY = {
    ("SUCCESS", None): OWN_END,
    ("FAILURE", UNASKED): UNASKED,
    ("FAILURE", LOST): KILLED,
    ("RETRY", LOST): KILLED,
}


def ends_of(how: str, pool: str) -> set[str]:
    """What may end a run there."""
    if pool == "threads" or how in ("warm", "warm-twice"):
        return {OWN_END}  # no thread can be killed
    if pool == "solo":
        # Celery means to kill it, has no way to, and says so in the middle of the task.
        return {UNASKED if HAS_SOFT_SHUTDOWN else OWN_END}
    if pool == "prefork":
        return {KILLED}
    # Among greenlets Celery's handler of the signal fails: with the first wait. Before 5.5 it waits
    # for nothing.
    return {OWN_END, KILLED} if how == "cold" and HAS_SOFT_SHUTDOWN else {OWN_END}


@pytest.mark.parametrize(
    ("how", "pool"),
    [
        *(("warm", pool) for pool in POOLS),
        pytest.param("cold", "prefork", marks=cold),
        ("cold", "threads"),
        # Of one SIGQUIT in the middle of a task, Celery 5.5 and 5.6 go on.
        ("cold-then-warm", "solo"),
        # Solo looks for signals between tasks only.
        *(
            pytest.param(how, pool, marks=soft)
            for how in ("soft", "warm-then-soft")
            for pool in ("prefork", "threads")
        ),
        *(
            pytest.param(how, pool, marks=pytest.mark.long)
            for how in ("warm", "warm-twice", "cold")
            for pool in GREEN
        ),
        *(
            pytest.param(how, pool, marks=[soft, pytest.mark.long])
            for how in ("soft", "warm-then-soft")
            for pool in GREEN
        ),
    ],
)
def test_a_worker_that_is_told_to_end_sends_all_that_was_accepted(
    how: str, pool: str, scene: Scene
) -> None:
    config = SOFT if "soft" in how else {}
    # Nothing but the end makes it send.
    url = f"{scene.url}?flush_interval=60"

    with scene.worker(pool, url, **config) as worker:
        scene.stream(pool, 1.2 if pool in GREEN else 1.0)
        if pool in GREEN:
            # A signal's handler runs in whatever greenlet there is: in a task's own, Celery's waits
            # for itself at times, and for ever. So in none.
            scene.hush()
        _, took = end(worker, how)
        log = worker.log()

    accepted = scene.accepted()
    stored = scene.stored(len(accepted))
    assert len(stored) == len(set(stored))
    assert accepted <= set(stored)
    # A task may be ended between a point and the note of it.
    assert len(set(stored) - accepted) <= len(scene.starts())
    # One for each start of a body, however it ended.
    runs = scene.runs()
    assert len([run for run in runs if run["runtime"] is not None]) == len(scene.starts())
    ends = [ENDED_BY[run["state"], run.get("exception")] for run in runs]
    assert set(ends) <= ends_of(how, pool)
    assert KILLED in ends or KILLED not in ends_of(how, pool)
    said = [each if each in (OWN_END, UNASKED) else KILLED for each in scene.said()]
    assert Counter(ends) == Counter(said + [KILLED] * (len(ends) - len(said)))
    if pool == "prefork" and KILLED in ends:
        # Celery says that it tries them again; but their messages are acknowledged.
        assert {run["state"] for run in runs} == {"FAILURE"}
    assert took < 10
    assert "lines could not be sent" not in log


@pytest.mark.parametrize(
    ("how", "pool", "timeout"),
    [
        ("warm", "prefork", 1.0),
        pytest.param("warm", "threads", None, marks=pytest.mark.long),
        *(pytest.param("warm", pool, 1.0, marks=pytest.mark.long) for pool in GREEN),
        # A soft one ends as a cold one does.
        pytest.param("soft", "prefork", 1.0, marks=soft),
        ("cold-then-warm", "solo", 1.0),
        pytest.param("cold", "threads", 1.0, marks=pytest.mark.long),
        *(
            pytest.param("cold", pool, 1.0, marks=[cold, pytest.mark.long])
            for pool in ("prefork", *GREEN)
        ),
        *(
            pytest.param("soft", pool, 1.0, marks=[soft, pytest.mark.long])
            for pool in ("threads", *GREEN)
        ),
    ],
)
def test_a_black_hole_delays_the_end_by_the_shutdown_timeout_and_its_last_line_counts_the_rest(
    how: str, pool: str, timeout: float | None, scene: Scene, black_hole: int
) -> None:
    url = f"http://127.0.0.1:{black_hole}/x?flush_interval=0.1&http_timeout=60"
    config = {} if timeout is None else {"influx_shutdown_timeout": timeout}
    config |= SOFT if how == "soft" else {}

    with scene.worker(pool, url, **config) as worker:
        scene.stream(pool, 1.2 if pool in GREEN else 0.5)
        if pool in GREEN:
            scene.hush()  # as above
        _, took = end(worker, how)
        ended = time.time()
        log = worker.log()

    limit = 5.0 if timeout is None else timeout
    # Celery's own part is long on a busy machine, and longer among greenlets.
    assert took < limit + (9 if pool in GREEN else 6)
    # What comes after that is ours, and the end of an interpreter.
    ours = ended - float(str(scene.store.get("all tasks have ended")))
    print(f"{how} {pool}: {took:.2f} s, {ours:.2f} s of them after the last task")
    assert limit * 0.9 < ours < limit + 1.5
    said = re.findall(r"main: ([0-9]+) lines could not be sent within .* at the end", log)
    ours = [line for line in log.splitlines() if "main: " in line]
    assert len(said) == 1
    assert f"main: {said[0]} lines could not be sent" in ours[-1]
    accepted, starts = len(scene.accepted()), len(scene.starts())
    # The tasks' own points are among them, and so is one that a task did not come to note.
    assert accepted + starts <= int(said[0]) <= accepted + 2 * starts


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["nobody listens", "black hole"])
def test_what_fails_while_a_worker_ends_is_counted_in_its_last_line(
    kind: str, scene: Scene, black_hole: int
) -> None:
    port = black_hole if kind == "black hole" else free_port()
    url = f"http://127.0.0.1:{port}/x?flush_interval=60&http_timeout=0.4"

    with scene.worker("prefork", url) as worker:
        scene.stream("prefork", 0.5)
        _, took = end(worker, "warm")
        log = worker.log()

    accepted, starts = len(scene.accepted()), len(scene.starts())
    assert accepted > 50
    *_, last = (line for line in log.splitlines() if "main: " in line)
    said = re.search(r"main: ([0-9]+) lines could not be sent within 5.0 s at the end: (.*)", last)
    assert said
    assert int(said[1]) == accepted + starts
    assert said[2] == f"{said[1]} in attempts that failed"
    assert took < 5


@pytest.mark.parametrize(
    "pool", ["gevent", pytest.param("eventlet", marks=pytest.mark.long), "prefork"]
)
def test_a_worker_that_is_restarted_by_sighup_sends_all_before(pool: str, scene: Scene) -> None:
    """Celery's own hook at exit makes the process another one."""
    with scene.worker(pool, f"{scene.url}?flush_interval=60") as worker:
        scene.stream(pool, 1.0)
        if pool in GREEN:
            scene.hush()  # as above
        os.kill(worker.pid(), signal.SIGHUP)
        wait_for(lambda: len(scene.runs()) == len(scene.starts()), 30, worker.log())
        accepted = scene.accepted()
        assert set(scene.stored(len(accepted))) == accepted
        worker.stop(signal.SIGKILL)


def test_a_killed_child_loses_no_point_that_was_accepted(scene: Scene) -> None:
    with scene.worker("prefork") as worker:
        scene.stream("prefork", 1.5)
        victim = int(scene.starts()[0].split()[1])
        os.kill(victim, signal.SIGKILL)
        # And one that is killed right after a burst, which the worker may not have read yet.
        scene.send("burst", 5_000_000, 3_000)
        wait_for(lambda: scene.store.get("burst"), 20, "the burst")
        os.kill(int(str(scene.store.get("burst"))), signal.SIGKILL)
        wait_for(lambda: len(scene.runs()) >= 3, 20, "a point for each of the three runs")
        assert worker.stop() == 0
        log = worker.log()

    accepted = scene.accepted() | set(range(5_000_000, 5_003_000))
    stored = scene.stored(len(accepted))
    assert len(stored) == len(set(stored))
    assert accepted <= set(stored)
    assert len(set(stored) - accepted) <= 1
    assert "dropped" not in log
    states = sorted((run["state"], run["exception"]) for run in scene.runs())
    assert states == [
        ("FAILURE", "WorkerLostError"),
        ("FAILURE", "WorkerLostError"),
        ("SUCCESS", None),
    ]


@pytest.mark.long
@pytest.mark.skipif(
    "pool_start_method" not in NAMESPACES["worker"], reason="this Celery's pools always fork"
)
def test_a_spawned_child_that_is_killed_loses_at_most_the_last_interval_and_one_attempt(
    scene: Scene,
) -> None:
    with scene.worker("prefork", worker_pool_start_method="spawn") as worker:
        scene.stream("prefork", 5.0)
        began = time.time()
        wait_for(lambda: time.time() > began + FLUSH_INTERVAL + HTTP_TIMEOUT + 0.3, 5)
        os.kill(worker.pid(), signal.SIGSTOP)  # it would have the tasks run again
        killed = time.time()
        for start in scene.starts():
            os.kill(int(start.split()[1]), signal.SIGKILL)
        worker.stop(signal.SIGKILL)

    promised = scene.accepted(until=killed - FLUSH_INTERVAL - HTTP_TIMEOUT)
    stored = scene.stored(len(promised))
    assert len(promised) >= 60
    assert len(stored) == len(set(stored))
    assert promised <= set(stored)


@pytest.mark.parametrize(
    "pool", [*POOLS, *(pytest.param(pool, marks=pytest.mark.long) for pool in GREEN)]
)
def test_a_killed_worker_loses_at_most_the_last_interval_and_one_attempt(
    pool: str, scene: Scene
) -> None:
    with scene.worker(pool) as worker:
        scene.stream(pool, 5.0)
        children = worker.children()
        began = time.time()
        wait_for(lambda: time.time() > began + FLUSH_INTERVAL + HTTP_TIMEOUT + 0.3, 5)
        killed = time.time()
        worker.stop(signal.SIGKILL)
        wait_for(lambda: not any(map(alive, children)), 5, "its children end with it")

    promised = scene.accepted(until=killed - FLUSH_INTERVAL - HTTP_TIMEOUT)
    stored = scene.stored(len(promised))
    assert len(promised) >= 60
    assert len(stored) == len(set(stored))
    assert promised <= set(stored)


@pytest.mark.alone
def test_a_child_whose_worker_is_gone_goes_on_and_counts(scene: Scene) -> None:
    with scene.worker("prefork") as worker:
        scene.send("alone", 2_000, True)
        wait_for(lambda: scene.store.get("alone"), 20, "the task runs")
        pid = int(str(scene.store.get("alone")))
        try:
            worker.stop(signal.SIGKILL)
            scene.store.set("go", 1)
            found = wait_for(lambda: scene.store.hgetall("found"), 20, "its account")
            wait_for(lambda: not alive(pid), 5, "it ends")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    assert isinstance(found, dict)
    assert found["failed"] == ""  # and it is no signal that ended it
    assert float(found["slowest"]) < 0.25
    assert int(found["points"]) == int(found["dropped"]) == 2_000
    assert (found["flushed"], float(found["flush"]) < 1) == ("False", True)


@pytest.mark.alone
def test_a_child_whose_worker_stands_still_drops_and_counts_what_finds_no_room(
    scene: Scene,
) -> None:
    points = 8_000  # of 500 bytes and more: several times as much as the pipe holds

    with scene.worker("prefork") as worker:
        scene.send("alone", points, False)
        wait_for(lambda: scene.store.get("alone"), 20, "the task runs")
        os.kill(worker.pid(), signal.SIGSTOP)
        try:
            scene.store.set("go", 1)
            found = wait_for(lambda: scene.store.hgetall("found"), 20, "its account")
        finally:
            os.kill(worker.pid(), signal.SIGCONT)
        assert isinstance(found, dict)
        kept = points - int(found["dropped"])
        wait_for(lambda: len(scene.stored()) >= kept - 5, 10, "what had found room is stored")
        scene.store.set("end", 1)
        wait_for(scene.runs, 10, "the run's point")
        assert worker.stop() == 0

    assert found["failed"] == ""
    assert int(found["points"]) == points
    assert points // 4 < int(found["dropped"]) < points - 500
    # It waits for room once, and no more until a point gets through.
    assert float(found["slowest"]) < 0.5
    # A long line that was begun and not ended is found broken by the worker only later.
    stored = scene.stored()
    assert len(stored) == len(set(stored))
    assert kept - 5 <= len(stored) <= kept


def restarts(times: int, pool: str, broker: str, url: str, plugin: str = "yes") -> dict[str, Any]:
    """What ``apps/restarts.py`` found."""
    config = {"influx_databases": {"main": url}, "result_backend": "cache+memory://"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.integration.apps.restarts", str(times), pool],
        env=environment(broker, config, PLUGIN=plugin),
        capture_output=True,
        text=True,
        timeout=800 if pool == "prefork" else 100,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])  # above it, Celery says what it was told
    assert isinstance(found, dict)
    return found


def growth(found: dict[str, Any]) -> Counter[str]:
    """Files that the workers after the first 20 left open, by kind, and how many of them."""
    early, late = (Counter(each["files"]) for each in found["worker"])
    return late - early


@pytest.mark.once
@pytest.mark.parametrize(
    ("pool", "times"),
    [
        ("solo", 60),
        *(pytest.param(pool, 200, marks=pytest.mark.long) for pool in ("solo", "threads", *GREEN)),
        pytest.param("prefork", 200, marks=[pytest.mark.long, pytest.mark.timeout(1_200)]),
    ],
)
def test_many_starts_and_stops_in_one_process_leave_nothing_behind(
    pool: str, times: int, broker: str
) -> None:
    if pool in GREEN:
        skip_without(pool)
    with Listener() as listener:
        url = f"http://127.0.0.1:{listener.http_port}/celery?flush_interval=60"
        if pool != "prefork":
            found, left_by_celery = restarts(times, pool, "memory://", url), Counter[str]()
        else:
            found = restarts(times, pool, broker, url)
            # Celery's pool of processes itself leaves pipes open, as many each time.
            after_ten = growth(restarts(30, pool, broker, url, "no"))
            left_by_celery = Counter({kind: 18 * after_ten[kind] for kind in after_ten})
        lines = listener.received.lines

    for kind in ("worker", "plugin"):
        early, late = found[kind]
        assert late["children"] == []
        assert late["threads"] == []
        assert late["all_threads"] == early["all_threads"]
        assert late["objects"] <= early["objects"] + 20, kind
    assert growth(found) == left_by_celery
    # A hundred bytes for each of 180, or three of 60, would show; what a cache keeps does not.
    early, late = found["plugin"]
    assert late["files"] == early["files"]
    assert late["bytes"] < early["bytes"] + 12_000
    # A task and its two points for each worker at least, and one for each start of the plugin.
    assert lines >= times * 3


def test_datagrams_that_find_no_room_at_the_server_are_counted_as_sent() -> None:
    points = 5_000
    app = Celery(set_as_current=False)
    influx = celery_influx.install(app)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        url = f"udp://127.0.0.1:{port}?http_port=0&datagram_bytes=1472"
        app.conf.influx_databases = {"main": url}
        influx.send_data(
            {"measurement": "custom", "fields": {"serial": serial}} for serial in range(points)
        )
        flushed = influx.flush(10)
        account = influx.stats()["main"]
        dropped = kernel_drops(port)
        server.setblocking(False)
        received = []
        with contextlib.suppress(BlockingIOError):
            while True:
                received.append(server.recv(65_536))
    influx.close()

    assert flushed
    assert account["points"] == account["sent"] == points
    assert not any(account[name] for name in ("dropped", "lost", "rejected", "errors", "queued"))
    assert 0 < sum(datagram.count(b"custom") for datagram in received) < points
    # It is the kernel of the server that knows.
    assert dropped > 0
    assert len(received) + dropped == account["payloads"]


def kernel_drops(port: int) -> int:
    """Datagrams to the UDP port of 127.0.0.1 for which its socket's buffer had no room."""
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}"):
            return int(fields[-1])
    raise AssertionError(f"no socket has the port {port}")
