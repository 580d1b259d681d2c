"""Exactly one point for each run of a task, however it ends.

A run is a start of a task's body, which the tasks count themselves. Each row of the table is made
by a real message, and by a real signal or limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, Task
from celery.app.defaults import NAMESPACES
from celery.worker.request import Request
from kombu import Producer

import celery_influx
from tests.integration.worker import (
    Worker,
    alive,
    environment,
    publisher,
    revoke,
    skip_without,
)
from tests.servers import Influxd, RabbitMQ, Redis, missing, wait_for

#: Celery 5.5 and newer: there a cold shutdown gives back what is acknowledged, too, and a hard time
#: limit what is not.
HAS_SOFT_SHUTDOWN = "soft_shutdown_timeout" in NAMESPACES["worker"]
#: Celery 5.7 looks what a child had stored before it was lost.
LOOKS_AT_RESULTS = hasattr(Request, "_success_was_stored")
#: And starts such a task again, if it is asked to.
RETRIES_LOST = hasattr(Task, "retry_on_worker_lost")
LOST = "WorkerLostError"
#: A run that was over before anything could be done to it.
OK = ("SUCCESS", None)


@dataclass
class Bench:
    """A worker of one pool, and what is needed to send to it and to look at what came of it."""

    worker: Worker
    sender: Celery
    store: redis.Redis
    influxd: Influxd
    database: str
    sent: dict[str, float] = field(default_factory=dict)

    def send(self, *args: Any, task: str = "run", **options: Any) -> str:
        """Send ``runs.<task>``; its id."""
        sent = time.time()
        task_id = str(self.sender.send_task(f"runs.{task}", args, **options).id)
        self.sent[task_id] = sent
        return task_id

    def note_end(self, task_id: str) -> None:
        """Note that the task's body ends now, of one that cannot do so."""
        self.store.rpush(f"ended {task_id}", time.time())

    def began(self, task_id: str) -> list[float]:
        """When each run of the task began."""
        found = self.store.lrange(f"began {task_id}", 0, -1)
        return [float(each.split()[0]) for each in found]

    def pid(self, task_id: str) -> int:
        """The process in which the task's first run began."""
        (first,) = self.store.lrange(f"began {task_id}", 0, 0)
        return int(first.split()[1])

    def wait_for_start(self, task_id: str) -> None:
        """Wait until the task's body runs."""
        wait_for(lambda: self.began(task_id), 20, f"{task_id} runs")

    def points(self, task_id: str) -> list[dict[str, Any]]:
        """The points of the task's runs, in the order of the runs."""
        rows = self.influxd.rows("celery_task", self.database)
        mine = [row for row in rows if row.get("id") == task_id]
        # The run after a retry may end before the one that sent it; and one that is given back
        # may have succeeded elsewhere before its child is dead.
        return sorted(mine, key=lambda row: (row["retries"], row["time"] - began_ago(row)))


def began_ago(row: dict[str, Any]) -> int:
    """Nanoseconds from the start of a run to its point."""
    return int((row.get("runtime") or 0) * 1e9)


def sent(*args: Any, **options: Any) -> Callable[[Bench], str]:
    """A row that is just a message."""
    return lambda bench: bench.send(*args, **options)


#: Signals of which a child dies without running a `finally`.
NO_FINALLY = ("SIGKILL", "SIGABRT", "SIGSEGV", "SIGALRM", "SIGUSR2")


def revoked_while_running(
    name: str, seconds: float = 30, task: str = "run"
) -> Callable[[Bench], str]:
    """A row whose task is revoked by a signal when its body runs."""

    def make(bench: Bench) -> str:
        task_id = bench.send(f"sleep {seconds}", task=task)
        bench.wait_for_start(task_id)
        bench.sender.control.revoke(
            task_id, terminate=True, signal=name, destination=[bench.worker.name]
        )
        if name in NO_FINALLY:  # at least not with every billiard
            pid = bench.pid(task_id)
            wait_for(lambda: not alive(pid), 20, f"the end of {task_id}")
            if not bench.store.llen(f"ended {task_id}"):
                bench.note_end(task_id)
        return task_id

    return make


def revoked_before(bench: Bench) -> str:
    """A row whose task was revoked before it was sent."""
    task_id = str(uuid.uuid4())
    revoke(bench.sender, task_id)
    return bench.send("succeed", task_id=task_id)


def revoked_while_held(bench: Bench) -> str:
    """A row whose task is revoked while the worker has it wait for its time."""
    task_id = bench.send("succeed", countdown=4)
    revoke(bench.sender, task_id)
    return task_id


def expired(bench: Bench) -> str:
    """A row whose task is too old."""
    return bench.send("succeed", expires=datetime.now(timezone.utc) - timedelta(seconds=5))


def killed_from_outside(bench: Bench) -> str:
    """A row whose child is killed by somebody else, as by a system that is out of memory."""
    task_id = bench.send("sleep 30")
    bench.wait_for_start(task_id)
    pid = bench.pid(task_id)
    assert pid in bench.worker.children()
    bench.note_end(task_id)
    os.kill(pid, signal.SIGKILL)
    return task_id


def refused(
    body: bytes = b"{not json", content_type: str = "application/json", **headers: str
) -> Callable[[Bench], str]:
    """A row whose message is none of which a worker can make a task."""

    def make(bench: Bench) -> str:
        task_id = str(uuid.uuid4())
        with bench.sender.connection_for_write() as connection:
            Producer(connection).publish(
                body,
                routing_key="celery",
                content_type=content_type,
                content_encoding="utf-8",
                headers={"id": task_id, "lang": "py", "root_id": task_id, **headers},
                delivery_mode=2,
            )
        return task_id

    return make


GREEN, PREFORK = ("gevent", "eventlet"), ("prefork",)
ALL = (*PREFORK, "threads", "solo", *GREEN)
#: The table once more with a broker that knows by itself what is acknowledged, and what goes back.
ON_RABBITMQ = "prefork, RabbitMQ"


@dataclass
class Row:
    """How a task is sent and ended, what its runs' points say, in order, and in which pools."""

    make: Callable[[Bench], str]
    points: list[tuple[str, str | None]]
    pools: tuple[str, ...] = ALL
    #: Points of runs whose body never started.
    unstarted: int = 0
    task: str = "runs.run"


NEVER = {"unstarted": 1}
#: The body of a message that calls ``run``.
CALL = b'[["succeed"], {}, {}]'
ROWS = {
    "success": Row(sent("succeed"), [OK]),
    "failure": Row(sent("fail"), [("FAILURE", "Broken")]),
    "retry": Row(sent("retry"), [("RETRY", "Broken"), ("RETRY", "Broken"), OK]),
    "ignore": Row(sent("ignore"), [("IGNORED", "Ignore")]),
    "reject": Row(sent("reject", task="late"), [("REJECTED", "Reject")], task="runs.late"),
    "reject and requeue": Row(
        sent("requeue", task="late"), [("REJECTED", "Reject"), OK], task="runs.late"
    ),
    "replaced": Row(sent("replace"), [("IGNORED", "Ignore"), OK]),
    "soft time limit": Row(
        sent("sleep 30", soft_time_limit=1), [("FAILURE", "SoftTimeLimitExceeded")], PREFORK
    ),
    "hard time limit": Row(
        sent("sleep 30", time_limit=1), [("FAILURE", "TimeLimitExceeded")], PREFORK
    ),
    "time limits that nobody enforces": Row(
        sent("sleep 1", soft_time_limit=0.3, time_limit=0.5), [OK], ("threads", "solo")
    ),
    "SIGKILL": Row(sent("kill"), [("FAILURE", LOST)], PREFORK),
    "SIGSEGV": Row(sent("crash"), [("FAILURE", LOST)], PREFORK),
    "SIGKILL from outside": Row(killed_from_outside, [("FAILURE", LOST)], PREFORK),
    "SystemExit": Row(sent("exit"), [("FAILURE", LOST)], PREFORK),
    # No Exception; the child may live on, or die of it, with older billiard.
    "CancelledError": Row(sent("cancel"), [("FAILURE", "CancelledError")], ("prefork", "threads")),
    "SystemExit in a thread": Row(sent("exit"), [("FAILURE", "SystemExit")], ("threads",)),
    "killed after its end": Row(
        sent("succeed and die", task="without_result"), [OK], PREFORK, task="runs.without_result"
    ),
    "killed after its end, with a result": Row(sent("succeed and die"), [OK], PREFORK),
    "killed when its result is stored": Row(
        sent("succeed in 0.3"), [OK if LOOKS_AT_RESULTS else ("FAILURE", LOST)], PREFORK
    ),
    "acks late, killed": Row(
        sent("kill", task="late"), [("FAILURE", LOST)], PREFORK, task="runs.late"
    ),
    "acks late, hard time limit": Row(
        sent("sleep 30", task="late", time_limit=1),
        [("FAILURE", "TimeLimitExceeded")],
        PREFORK,
        task="runs.late",
    ),
    "acks late, hard time limit, not acknowledged": Row(
        sent("sleep once 30", task="unacknowledged", time_limit=1),
        [("RETRY", "TimeLimitExceeded"), OK]
        if HAS_SOFT_SHUTDOWN
        else [("FAILURE", "TimeLimitExceeded")],
        PREFORK,
        task="runs.unacknowledged",
    ),
    "acks late, killed, given back": Row(
        sent("kill once", task="given_back"), [("RETRY", LOST), OK], PREFORK, task="runs.given_back"
    ),
    "killed, retried": Row(
        sent("kill once", task="retried"),
        [("RETRY", LOST), OK],
        PREFORK if RETRIES_LOST else (),
        task="runs.retried",
    ),
    "revoked before its start": Row(revoked_before, [("REVOKED", None)], **NEVER),
    "revoked while the worker holds it": Row(revoked_while_held, [("REVOKED", None)], **NEVER),
    "expired": Row(expired, [("REVOKED", None)], **NEVER),
    "expired while the worker holds it": Row(
        sent("succeed", countdown=2, expires=1), [("REVOKED", None)], **NEVER
    ),
    "unregistered": Row(
        sent(task="nothing"), [("REJECTED", "NotRegistered")], task="runs.nothing", **NEVER
    ),
    "undecodable": Row(refused(task="runs.run"), [("REJECTED", "DecodeError")], **NEVER),
    "undecodable, of no task": Row(
        refused(), [("REJECTED", "DecodeError")], task="(unreadable)", **NEVER
    ),
    **{
        f"content of {kind}": Row(
            refused(CALL, content_type=kind, task="runs.run"),
            [("REJECTED", "ContentDisallowed")],
            **NEVER,
        )
        for kind in ("application/x-python-serialize", "application/x-nobody-knows")
    },
    "content that is not accepted, of no task": Row(
        refused(content_type="application/x-python-serialize"),
        [("REJECTED", "ContentDisallowed")],
        task="(unreadable)",
        **NEVER,
    ),
    "arguments that are none": Row(
        refused(b'[[], ["none"], {}]', task="runs.run"), [("FAILURE", "InvalidTaskError")], **NEVER
    ),
    "an ETA that is none": Row(
        refused(CALL, task="runs.run", eta="soon"), [("REJECTED", "InvalidTaskError")], **NEVER
    ),
    "JSON of no task": Row(refused(b"[1]"), [("REJECTED", None)], task="(unreadable)", **NEVER),
    **{
        f"revoked with {name}": Row(revoked_while_running(name), [("REVOKED", None)], PREFORK)
        for name in ("SIGTERM", "SIGQUIT", "SIGHUP", *NO_FINALLY)
    },
    "acks late, revoked with SIGTERM": Row(
        revoked_while_running("SIGTERM", task="late"),
        [("REVOKED", None)],
        PREFORK,
        task="runs.late",
    ),
    # The task's own way to be told that its time is up.
    "revoked with SIGUSR1": Row(
        revoked_while_running("SIGUSR1"), [("FAILURE", "SoftTimeLimitExceeded")], PREFORK
    ),
    # A pool's children ignore this one, and the body goes on to its end.
    "revoked with SIGINT": Row(revoked_while_running("SIGINT", 1), [OK], PREFORK),
    "revoked in a thread, which nobody can kill": Row(
        revoked_while_running("SIGTERM", 1), [OK], ("threads",)
    ),
    "its request is copied, pickled and dumped": Row(sent("copy"), [OK]),
    "with an eager run in it": Row(sent("eager"), [OK]),
}


def rows_of(pool: str) -> dict[str, Row]:
    """The rows that make sense there."""
    return {name: row for name, row in ROWS.items() if pool.partition(",")[0] in row.pools}


@dataclass
class Table:
    """All rows of one pool, made at the same time."""

    bench: Bench
    ids: dict[str, str]
    points: dict[str, list[dict[str, Any]]]


def make_bench(
    pool: str,
    redis_server: Redis,
    influxd: Influxd,
    folder: Path,
    number: int,
    broker: str = "",
    flush_interval: float = 0.05,
    concurrency: int = 4,
    **config: Any,
) -> Bench:
    """A worker of ``pool``, not started yet, with a Redis and a database of its own.

    ``broker``: its URL, where that is not the Redis.
    """
    backend = redis_server.url.removesuffix("/0") + f"/{number}"
    store = redis.Redis.from_url(backend, decode_responses=True)
    store.flushdb()
    database = f"runs {folder.name}"
    influxd.query(f'CREATE DATABASE "{database}"')
    settings = {
        "influx_databases": {
            "main": {
                "transport": "http",
                "host": "127.0.0.1",
                "http_port": influxd.http_port,
                "database": database,
                "flush_interval": flush_interval,
            }
        },
        "influx_task_ids": True,
        "result_backend": backend,
        **config,
    }
    sender = publisher(broker or backend, result_backend=backend)
    celery_influx.install(sender)
    worker = Worker(
        folder,
        "runs",
        broker or backend,
        settings,
        pool=pool,
        concurrency=concurrency,
        variables={"STORE": backend},
    )
    return Bench(worker, sender, store, influxd, database)


@pytest.fixture(scope="module")
def tables(
    redis_server: Redis,
    influxd: Influxd,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], Table]:
    """Gives the table of a pool. The worker has ended by then: nothing more can come."""

    @lru_cache
    def table(pool: str) -> Table:
        broker = request.getfixturevalue("rabbitmq").url if pool == ON_RABBITMQ else ""
        kind = pool.partition(",")[0]
        folder = tmp_path_factory.mktemp(kind)
        bench = make_bench(kind, redis_server, influxd, folder, 2, broker)
        mine = rows_of(pool)
        if kind in GREEN:
            skip_without(kind)
        with bench.worker:
            # It is ready for tasks before it is for these.
            wait_for(lambda: bench.sender.control.ping(timeout=0.5, limit=1), 10)
            ids = {name: row.make(bench) for name, row in mine.items()}
            # What is missing then is said by the rows themselves.
            with contextlib.suppress(AssertionError):
                wait_for(lambda: all_have_come(bench, mine, ids), 40)
            assert bench.worker.stop() == 0
        bench.sender.close()
        return Table(bench, ids, {name: bench.points(ids[name]) for name in mine})

    return table


def all_have_come(bench: Bench, rows: dict[str, Row], ids: dict[str, str]) -> bool:
    """Whether InfluxDB has as many points of each row as it expects."""
    points = bench.influxd.rows("celery_task", bench.database)
    found = Counter(point.get("id") for point in points)
    return all(found[ids[name]] >= len(row.points) for name, row in rows.items())


@pytest.mark.alone
@pytest.mark.parametrize(
    ("pool", "name"),
    [(pool, name) for pool in (*ALL, ON_RABBITMQ) for name in rows_of(pool)],
)
def test_each_run_has_one_point_that_says_how_it_ended(
    tables: Callable[[str], Table], pool: str, name: str
) -> None:
    table = tables(pool)
    row, points = ROWS[name], table.points[name]
    began = table.bench.began(table.ids[name])

    assert states(points) == row.points
    assert len(began) == len(points) - row.unstarted
    assert {each["task"] for each in points} == {row.task}
    assert {each["queue"] for each in points} == {"celery"}
    assert {each["worker"] for each in points} == {table.bench.worker.name}
    for point in points:
        assert (point["runtime"] is None) == bool(row.unstarted)
        assert (point["wait"] is None) == bool(row.unstarted)
        assert point["retries"] == (points.index(point) if "retr" in name else 0)
    # The body's own word, or that of who killed it.
    ended = [*map(float, table.bench.store.lrange(f"ended {table.ids[name]}", 0, -1))]
    assert len(ended) == len(began)
    for start, end, point in zip(began, ended, points, strict=False):
        assert point["runtime"] == pytest.approx(end - start, abs=0.2)
    if began:
        sent = table.bench.sent[table.ids[name]]
        assert points[0]["wait"] == pytest.approx(began[0] - sent, abs=0.2)
    for start, point in zip(began, points, strict=False):
        # Soon, and not when the worker gave up on hearing from Celery what became of the run.
        assert point["time"] / 1e9 - start - point["runtime"] < 10


@pytest.mark.parametrize("pool", [*ALL, ON_RABBITMQ])
def test_nothing_else_has_a_point(tables: Callable[[str], Table], pool: str) -> None:
    table = tables(pool)

    rows = table.bench.influxd.rows("celery_task", table.bench.database)
    assert Counter(row["id"] for row in rows) == {
        table.ids[name]: len(row.points) for name, row in rows_of(pool).items()
    }


def states(points: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """What the points say of the end; InfluxDB has no column for what none of them has."""
    return [(each["state"], each.get("exception")) for each in points]


@pytest.fixture
def bench(
    redis_server: Redis, influxd: Influxd, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    """A worker for one test, of the prefork pool unless ``parametrize`` says otherwise."""
    config = {"pool": "prefork", **getattr(request, "param", {})}
    pool = config.pop("pool")
    if pool in GREEN:
        skip_without(pool)
    if config.get("broker"):
        config["broker"] = request.getfixturevalue(config["broker"]).url
    found = make_bench(pool, redis_server, influxd, tmp_path, 3, **config)
    yield found
    found.worker.stop(signal.SIGKILL)
    found.sender.close()


@pytest.mark.parametrize("bench", [{"concurrency": 8}], indirect=True)
def test_a_run_that_the_pool_silently_repeats_is_two_runs(bench: Bench) -> None:
    """A child that dies before the pool has seen it take its task: then another one gets it.

    So it is if it takes its task and dies while the pool cleans up after others, which takes it
    10 ms for each, and after it was seen alive, the last one first.
    """
    ids: list[str] = []
    with bench.worker:
        for _ in range(5):  # it hardly ever needs a second one
            bench.store.delete("told")
            wait_for(lambda: len(bench.worker.children()) == 8, 20, "eight children")
            last = max(bench.worker.children())
            os.kill(last, signal.SIGSTOP)
            mine = [bench.send("kill when told", task="without_result") for _ in range(8)]
            ids += mine
            wait_for(lambda: sum(bool(bench.began(each)) for each in mine) == 7, 20)  # noqa: B023
            time.sleep(0.1)  # by now the last one is written to its child, too
            os.kill(bench.worker.pid(), signal.SIGSTOP)
            bench.store.set("told", 1)
            wait_for(lambda: sum(map(alive, bench.worker.children())) == 1, 10, "seven deaths")
            os.kill(bench.worker.pid(), signal.SIGCONT)
            time.sleep(0.02)
            os.kill(last, signal.SIGCONT)
            wait_for(lambda: all_have_failed(bench, ids), 60)  # noqa: B023
            if sum(len(bench.began(task_id)) for task_id in ids) > len(ids):
                break
        assert bench.worker.stop() == 0

    runs = [len(bench.began(task_id)) for task_id in ids]
    assert sum(runs) > len(ids)
    assert [states(bench.points(task_id)) for task_id in ids] == [
        [("RETRY", LOST)] * (each - 1) + [("FAILURE", LOST)] for each in runs
    ]


def all_have_failed(bench: Bench, ids: list[str]) -> bool:
    """Whether each task has failed for good."""
    rows = bench.influxd.rows("celery_task", bench.database)
    return {row.get("id") for row in rows if row["state"] == "FAILURE"} >= set(ids)


def starts_again(bench: Bench, task_id: str) -> bool:
    """Whether another worker is given the task."""
    with bench.worker:
        last = bench.send("succeed")
        wait_for(lambda: bench.store.llen(f"ended {last}"), 20, bench.worker.log())
        assert bench.worker.stop() == 0
    return len(bench.began(task_id)) > 1


@pytest.mark.parametrize(
    ("bench", "task"),
    [
        *(({"broker": broker}, task) for broker in ("", "rabbitmq") for task in ("run", "late")),
        *(
            # Idle: a signal's handler runs in whatever greenlet there is.
            pytest.param({"pool": pool, "flush_interval": 60}, task, marks=pytest.mark.long)
            for pool in GREEN
            for task in ("run", "late")
        ),
    ],
    indirect=["bench"],
)
def test_a_cold_shutdown_ends_a_run_with_one_point(bench: Bench, task: str) -> None:
    with bench.worker:
        task_id = bench.send("sleep once 30", task=task)
        bench.wait_for_start(task_id)
        time.sleep(0.5)
        bench.worker.stop(signal.SIGQUIT)

    (point,) = bench.points(task_id)
    assert 0.4 < point["runtime"] < 5
    failed = bench.sender.AsyncResult(task_id).state == "FAILURE"
    again = starts_again(bench, task_id)
    green = not bench.worker.name.startswith("prefork")
    if HAS_SOFT_SHUTDOWN or green or task == "run":
        # Celery 5.5 and newer acknowledge what they kill in a greenlet.
        assert again == (task == "late" and not (green and HAS_SOFT_SHUTDOWN))
        state = "RETRY" if again else "FAILURE"
    else:
        # Before, Celery sees the child die if it comes to it, and fails the task; but it may have
        # left the broker by then, which gives the task out again all the same.
        assert again or failed
        state = "FAILURE" if failed else "RETRY"
    assert states(bench.points(task_id)) == [(state, LOST), *([OK] if again else [])]


@pytest.mark.alone
def test_a_task_that_is_given_out_twice_at_once_has_a_point_for_each_run(bench: Bench) -> None:
    """As by Redis, of a message that is not acknowledged within its visibility timeout."""
    with bench.worker:
        task_id = str(uuid.uuid4())
        for _ in range(2):
            bench.send("sleep 1", task="late", task_id=task_id)
        wait_for(lambda: len(bench.points(task_id)) == 2, 20)
        assert bench.worker.stop() == 0

    points = bench.points(task_id)
    assert len(bench.began(task_id)) == 2
    assert states(points) == [OK, OK]
    assert [point["runtime"] for point in points] == pytest.approx([1, 1], abs=0.2)


def test_of_a_run_in_a_worker_that_is_killed_only_the_next_one_elsewhere_is_known(
    redis_server: Redis, influxd: Influxd, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    bench = make_bench("prefork", redis_server, influxd, tmp_path, 3, rabbitmq.url)
    with bench.worker:
        task_id = bench.send("sleep once 30", task="late")
        bench.wait_for_start(task_id)
        bench.worker.stop(signal.SIGKILL)
    with bench.worker:
        wait_for(lambda: bench.points(task_id), 20, bench.worker.log())
        assert bench.worker.stop() == 0
    bench.sender.close()

    assert len(bench.began(task_id)) == 2
    assert states(bench.points(task_id)) == [OK]


@pytest.mark.parametrize("bench", [{"pool": "solo"}], indirect=True)
def test_a_run_that_ends_a_solo_worker_has_its_point(bench: Bench) -> None:
    with bench.worker:
        task_id = bench.send("exit")
        bench.worker.wait()

    assert states(bench.points(task_id)) == [("FAILURE", "SystemExit")]


@pytest.mark.parametrize(
    "bench", [{"pool": pool} for pool in ("prefork", "threads", "solo")], indirect=True
)
def test_a_run_that_has_no_memory_left_has_its_point(bench: Bench) -> None:
    """Celery ends a worker of processes then: what it had taken goes down with it, all counted."""
    with bench.worker:
        task_id = bench.send("no memory")
        wait_for(lambda: bench.points(task_id), 20, bench.worker.log())
        bench.worker.stop()

    assert states(bench.points(task_id)) == [("FAILURE", "MemoryError")]
    assert len(bench.began(task_id)) == 1


def test_a_run_that_the_kernel_kills_for_its_memory_has_its_point(
    bench: Bench, small_group: Path
) -> None:
    with bench.worker:
        task_id = bench.send(f"eat in {small_group}")
        wait_for(lambda: bench.points(task_id), 20, bench.worker.log())
        assert bench.worker.stop() == 0

    assert states(bench.points(task_id)) == [("FAILURE", LOST)]
    events = (small_group / "memory.oom_control", small_group / "memory.events")
    assert any("oom_kill 1" in each.read_text() for each in events if each.exists())


@pytest.fixture
def small_group(tmp_path: Path) -> Iterator[Path]:
    """A control group of Linux in which 32 MiB can be had, and no swap."""
    root, name = Path("/sys/fs/cgroup"), f"{tmp_path.name}.{os.getpid()}"
    if (root / "memory").is_dir():  # version 1
        group, limits = root / "memory" / name, ["memory.limit_in_bytes"]
    else:
        group, limits = root / name, ["memory.max", "memory.swap.max"]
    try:
        group.mkdir()
        for limit in limits:
            (group / limit).write_text(str(32 << 20))
    except OSError as error:
        missing(f"no control group for memory can be made here: {error}")
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text(), 10, "nobody is in it")
    group.rmdir()


CANCELS = {"worker_cancel_long_running_tasks_on_connection_loss": True}


@pytest.mark.parametrize(
    "bench",
    [
        {"pool": "prefork", **CANCELS},
        pytest.param({"pool": "eventlet", **CANCELS}, marks=pytest.mark.long),
        pytest.param(
            {"pool": "gevent", **CANCELS},
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not HAS_SOFT_SHUTDOWN, reason="Celery before 5.5 ends of it"),
            ],
        ),
    ],
    indirect=True,
)
def test_a_run_that_is_cancelled_as_the_broker_is_lost_has_its_point(bench: Bench) -> None:
    with bench.worker:
        task_id = bench.send("sleep once 30", task="late")
        bench.wait_for_start(task_id)
        time.sleep(0.5)  # else the worker may not know yet who has taken it
        own = str(bench.store.get_connection_kwargs()["db"])
        for client in bench.store.client_list():
            # And of no other app's: tests share the server, and Celery keeps its connections.
            if client["cmd"].startswith("brpop") and client["db"] == own:
                bench.store.client_kill_filter(_id=client["id"])
        wait_for(lambda: bench.points(task_id), 20, bench.worker.log())
        bench.worker.stop()

    points = bench.points(task_id)
    assert states(points)[0] == ("RETRY", LOST)
    assert 0.4 < points[0]["runtime"] < 5
    assert len(points) == len(bench.began(task_id))


@pytest.mark.skipif(
    "pool_start_method" not in NAMESPACES["worker"], reason="this Celery's pools always fork"
)
@pytest.mark.parametrize(
    "bench", [{"worker_pool_start_method": "spawn", "flush_interval": 60}], indirect=True
)
def test_children_that_are_spawned_write_each_run_that_they_live_to_end(bench: Bench) -> None:
    with bench.worker:
        killed = bench.send("kill")
        bench.sender.AsyncResult(killed).get(timeout=20, propagate=False)
        ids = {how: bench.send(how) for how in ("succeed", "fail", "exit")}
        for task_id in ids.values():
            bench.sender.AsyncResult(task_id).get(timeout=20, propagate=False)
        pong = bench.sender.send_task("celery_influx.ping").get(timeout=20)
        assert bench.worker.stop() == 0

    assert pong["version"]
    assert len(bench.began(killed)) == 1
    assert bench.points(killed) == []
    assert {how: states(bench.points(task_id)) for how, task_id in ids.items()} == {
        "succeed": [OK],
        "fail": [("FAILURE", "Broken")],
        "exit": [("FAILURE", "SystemExit")],
    }
    assert "runs that are killed have no point" in bench.worker.log()


SOFT = {"worker_soft_shutdown_timeout": 1.0}


@pytest.mark.skipif(not HAS_SOFT_SHUTDOWN, reason="this Celery has no soft shutdown")
@pytest.mark.parametrize("bench", [SOFT], indirect=True)
@pytest.mark.parametrize("task", ["run", "late"])
def test_a_soft_shutdown_ends_a_run_with_one_point(bench: Bench, task: str) -> None:
    with bench.worker:
        task_id = bench.send("sleep once 30", task=task)
        bench.wait_for_start(task_id)
        bench.worker.stop(signal.SIGQUIT)

    again = task == "late"
    assert starts_again(bench, task_id) == again
    points = bench.points(task_id)
    assert states(points) == ([("RETRY", LOST), OK] if again else [("FAILURE", LOST)])
    (began, *_), (ended, *_) = bench.began(task_id), bench.store.lrange(f"ended {task_id}", 0, 0)
    assert points[0]["runtime"] == pytest.approx(float(ended) - began, abs=0.2)


@pytest.mark.long
@pytest.mark.skipif(not HAS_SOFT_SHUTDOWN, reason="this Celery has no soft shutdown")
@pytest.mark.parametrize("bench", [SOFT], indirect=True)
def test_a_run_that_comes_to_its_end_in_a_soft_shutdown_has_its_own_point(bench: Bench) -> None:
    with bench.worker:
        task_id = bench.send("sleep 0.6", task="late")
        bench.wait_for_start(task_id)
        bench.worker.stop(signal.SIGQUIT)

    assert states(bench.points(task_id)) == [OK]


@pytest.mark.parametrize("bench", [{"worker_pool_restarts": True, "concurrency": 1}], indirect=True)
def test_a_run_of_a_task_that_came_with_a_restart_of_the_pool_has_its_point(bench: Bench) -> None:
    with bench.worker:
        (old,) = bench.worker.children()
        bench.sender.control.pool_restart(
            modules=["tests.integration.apps.later"], destination=[bench.worker.name]
        )
        wait_for(
            # A child sees it after its next task.
            lambda: bench.send("succeed") and old not in bench.worker.children(),
            20,
            "a new child",
        )
        task_id = bench.send("sleep 30", task="later", time_limit=1)
        wait_for(lambda: bench.points(task_id), 10, bench.worker.log())
        assert bench.worker.stop() == 0

    assert states(bench.points(task_id)) == [("FAILURE", "TimeLimitExceeded")]


@pytest.mark.alone
@pytest.mark.parametrize("bench", [{"result_backend": "redis://127.0.0.1:9/0"}], indirect=True)
@pytest.mark.parametrize(
    "how",
    [
        "success",
        "unregistered",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("failure", "retry")),
    ],
)
def test_a_result_backend_that_is_down_takes_no_point(bench: Bench, how: str) -> None:
    row = ROWS[how]
    with bench.worker:
        task_id = row.make(bench)
        wait_for(lambda: len(bench.points(task_id)) >= len(row.points), 60, bench.worker.log())
        # The point is there before Celery has the result. If it begins to shut down in between, it
        # reads no more results, and waits for the child, which waits for room for this long one.
        inspect = bench.sender.control.inspect(timeout=0.5, limit=1)
        wait_for(lambda: [*(inspect.active() or {}).values()] == [[]], 20, "the result is read")
        assert bench.worker.stop() == 0  # in peace, so that a second point would come

    points, began = bench.points(task_id), bench.began(task_id)
    assert states(points) == row.points
    assert len(began) == len(row.points) - row.unstarted
    ended = bench.store.lrange(f"ended {task_id}", 0, -1)
    for start, end, point in zip(began, map(float, ended), points, strict=not row.unstarted):
        assert point["runtime"] == pytest.approx(end - start, abs=0.2)


@pytest.mark.parametrize("bench", [{"influx_eager": True}], indirect=True)
def test_eager_runs_count_where_they_are_asked_for(bench: Bench) -> None:
    with bench.worker:
        task_id = bench.send("eager")
        wait_for(lambda: bench.points(task_id), 20)
        assert bench.worker.stop() == 0

    assert states(bench.points(task_id)) == [OK]
    (eager,) = bench.points(f"{task_id} eager")
    assert states([eager]) == [OK]
    assert eager["wait"] is None  # it was never published
    assert eager["worker"] == bench.worker.name


EAGER = {
    "succeed": [OK],
    "fail": [("FAILURE", "Broken")],
    "retry": [("RETRY", "Broken"), ("RETRY", "Broken"), OK],
}


@pytest.mark.parametrize("counted", [True, False])
def test_eager_runs_of_a_script_count_only_where_they_are_asked_for(
    counted: bool, influxd: Influxd, database: str
) -> None:
    config = {
        "influx_databases": {"main": f"http://127.0.0.1:{influxd.http_port}/{database}"},
        "influx_task_ids": True,
        "influx_eager": counted,
        "result_backend": "cache+memory://",
    }

    script = subprocess.run(
        [sys.executable, "-m", "tests.integration.apps.eager"],
        env=environment("memory://", config),
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert script.returncode == 0, script.stderr
    found = json.loads(script.stdout)
    points = influxd.rows("celery_task", database)
    points.sort(key=lambda point: point["retries"])
    expected = {
        f"{how} by {by}": ends if counted else []
        for by in ("apply", "delay", "raising delay")
        for how, ends in EAGER.items()
    }
    if counted:
        # A call that raises what the task does ends with the first run.
        expected["retry by raising delay"] = [("RETRY", "Broken")]
        assert Counter(point["id"] for point in points) == Counter(found["starts"])
    assert len(found["starts"]) == 13
    assert {
        called: states([point for point in points if point["id"] == task_id])
        for called, task_id in found["ids"].items()
    } == expected
    assert {point["task"] for point in points} == ({"eager.end"} if counted else set())
    # It was never published, and nobody's worker ran it.
    assert not any(point.get("wait") or point.get("worker") for point in points)


def test_each_task_of_a_canvas_has_one_point(bench: Bench) -> None:
    with bench.worker:
        ids = bench.sender.send_task("runs.canvas").get(timeout=20)
        wait_for(lambda: all(map(bench.points, ids)), 20)
        assert bench.worker.stop() == 0

    assert len(ids) == len(set(ids)) == 7
    for task_id in ids:
        assert states(bench.points(task_id)) == [OK]
