"""Whatever is down, tasks go on at their pace, memory stays bounded, and sending resumes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.integration.worker import (
    Worker,
    alive,
    environment,
    publisher,
    resident_kib,
    sending,
    stats,
)
from tests.servers import Influxd, Redis, free_port, wait_for


@pytest.fixture
def black_hole() -> Iterator[int]:
    """The port of a TCP server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


def count(store: redis.Redis, key: str) -> int:
    """A counter of the tasks'."""
    return int(store.get(key) or 0)


def memory(worker: Worker) -> int:
    """KiB of all of the worker's processes together."""
    return sum(resident_kib(pid) for pid in (worker.pid(), *worker.children()))


def grown(sizes: list[int]) -> int:
    """By how much a worker grew once it had taken its first rounds' tasks."""
    return max(sizes) - sizes[3]


def settled(account: dict[str, int]) -> int:
    """How many points have come to an end."""
    return sum(account[name] for name in ("sent", "dropped", "lost", "rejected", "queued"))


#: What is wrong with each database, and what the log says of it.
FAULTS = {
    "hung": "timeout",
    "refused": "ECONNREFUSED",
    "refused-http": "refused",
    "unknown": "dns",
    "unknown-http": "dns",
    "gone": "refused",
}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("pool", "faults"),
    [
        *(("prefork", [fault]) for fault in FAULTS),
        *((pool, list(FAULTS)) for pool in ("prefork", "threads", "solo")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0] if value[1:] == [] else "all",
)
def test_with_any_kind_of_outage_tasks_keep_their_rate_and_memory_its_bounds(
    pool: str,
    faults: list[str],
    broker: str,
    store: redis.Redis,
    sender: Celery,
    black_hole: int,
    tmp_path: Path,
) -> None:
    influxd = Influxd(tmp_path / "influxd")
    # Of all buffers together. Eleven times as much is sent: of six, 1.8 times as much to each.
    limit = 4 << 20
    limits = {
        "queue_bytes": limit // len(faults),
        "batch_bytes": 262_144,
        "flush_interval": 0.5,
        "http_port": 9,
    }
    nowhere = {**limits, "host": "no-such-host.invalid", "datagram_bytes": 65_507}
    databases = {
        "hung": {
            **limits,
            "transport": "http",
            "http_port": black_hole,
            "host": "127.0.0.1",
            "batch_bytes": 65_536,  # so that it stays full
        },
        "refused": {**limits, "udp_port": free_port(), "host": "127.0.0.1"},
        "refused-http": {**limits, "transport": "http", "host": "127.0.0.1"},
        "unknown": nowhere,
        "unknown-http": {**nowhere, "transport": "http"},
        "gone": {
            **limits,
            "transport": "http",
            "http_port": influxd.http_port,
            "database": influxd.udp_database,
            "host": "127.0.0.1",
        },
    }
    databases = {fault: databases[fault] for fault in faults}
    tasks, rounds, size, long_size = 60, 40, 4_000, 20_000
    config = {"influx_databases": databases, "influx_shutdown_timeout": 1}
    workers = {
        side: Worker(
            tmp_path / side,
            "outages",
            broker,
            {**(config if side == "with" else {}), "task_default_queue": side},
            variables={"PLUGIN": "yes" if side == "with" else "no"},
            pool=pool,
            level="warning",
        )
        for side in ("with", "without")
    }
    rates: dict[str, list[float]] = {"with": [], "without": []}
    ratios: list[float] = []
    memories: dict[str, list[int]] = {"with": [], "without": []}

    def run(side: str, size: int = size) -> None:
        for each in range(tasks):
            send("outages.work", [each, size], queue=f"{side} waiting", ignore_result=True)
        done = count(store, f"done {side}") + tasks
        # All at once, so that publishing is not in the way of the tasks.
        start = time.perf_counter()
        store.rename(f"{side} waiting", side)
        while count(store, f"done {side}") < done:
            assert time.perf_counter() - start < 30
            time.sleep(0.002)
        rates[side].append(tasks / (time.perf_counter() - start))
        memories[side].append(memory(workers[side]))

    with influxd, workers["with"], workers["without"], sending(sender) as send:
        run("with")
        run("without")
        sent = {"gone": tasks // len(databases) * (2 if faults == ["gone"] else 1)}
        if "gone" in faults:
            # Told so, too: of a write that was not answered nobody can say that it arrived.
            wait_for(lambda: stats(sender, workers["with"])["gone"]["sent"] == sent["gone"], 10)
        influxd.stop(kill=True)
        # Others' work on this machine is in the ratio of two rounds, and not in that of many.
        for number in range(rounds):
            for side in ("with", "without") if number % 2 else ("without", "with"):
                run(side)
            ratios.append(rates["with"][-1] / rates["without"][-1])
        for _ in range(30):
            run("with", long_size)
        accounts = stats(sender, workers["with"])
        start = time.perf_counter()
        assert workers["with"].stop() == 0
        assert workers["without"].stop() == 0
        assert time.perf_counter() - start < 15

    print(f"{len(ratios)} rounds", {side: statistics.median(rates[side]) for side in rates})
    print("ratio", statistics.median(ratios), {side: grown(memories[side]) for side in memories})
    for side in workers:
        assert count(store, f"sum {side}") == sum(range(tasks)) * len(rates[side])
    assert statistics.median(ratios) >= 0.95
    assert grown(memories["with"]) < grown(memories["without"]) + 1.5 * limit / 1024
    total = tasks * len(rates["with"])
    log = workers["with"].log()
    for name, account in accounts.items():
        # The first one has the points of all runs as well: so many lines beside each of its own.
        beside = len(databases) if name == faults[0] else 0
        made = total // len(databases) * (1 + beside)
        # The buffer has long lines, and a batch that is tried the short ones of when it began.
        buffered = limits["queue_bytes"] // long_size
        tried = databases[name]["batch_bytes"] // size
        assert account["points"] == settled(account) == made, name
        assert account["sent"] == sent.get(name, 0), name
        assert account["queued"] <= (buffered + tried) * (1 + beside), name
        assert account["errors"] > 0, name
        assert FAULTS[name] in log, name
    if "hung" in faults:
        # Its buffer was full for long: what an attempt took along is lost, and not dropped.
        assert accounts["hung"]["dropped"] > (total // 3 if pool == "solo" else total // 2)
        assert "the buffer is full" in log
    assert log.count("the buffer is full") <= len(databases)


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [
        pytest.param("udp", "gone", marks=pytest.mark.once),
        pytest.param("http", "gone", marks=pytest.mark.once),
        pytest.param("http", "hung", marks=pytest.mark.long),
    ],
)
def test_sending_resumes_by_itself_when_influxdb_is_back(
    scheme: str, fault: str, broker: str, store: redis.Redis, sender: Celery, tmp_path: Path
) -> None:
    with Influxd(tmp_path / "influxd") as influxd:
        port = influxd.udp_port if scheme == "udp" else influxd.http_port
        url = (
            f"{scheme}://127.0.0.1:{port}/celery?flush_interval=0.05&http_port={influxd.http_port}"
        )
        url = url if scheme == "udp" else url.partition("&")[0] + "&http_timeout=0.3"
        config = {"influx_databases": {"metrics": url}, "influx_task_points": False}

        with (
            Worker(tmp_path / "worker", "outages", broker, config) as worker,
            sending(sender) as send,
        ):

            def work(numbers: range, *, to_the_end: bool = True) -> dict[str, int]:
                for number in numbers:
                    send("outages.work", [number], ignore_result=True)
                wait_for(lambda: count(store, "done with") >= numbers.stop, 20)
                return wait_for(  # type: ignore[return-value]
                    lambda: (
                        (found := stats(sender, worker)["metrics"])["points"] == numbers.stop
                        and (found["queued"] == 0 or not to_the_end)
                        and found
                    ),
                    40,
                )

            before = work(range(100))
            wait_for(lambda: influxd.count("custom", "number") == 100, 10)
            assert influxd.process
            end, revive = {
                "gone": (partial(influxd.stop, kill=True), influxd.start),
                "hung": (
                    partial(influxd.process.send_signal, signal.SIGSTOP),
                    partial(influxd.process.send_signal, signal.SIGCONT),
                ),
            }[fault]
            end()
            during = work(range(100, 300), to_the_end=scheme == "udp")
            revive()
            after = work(range(300, 400))
            wait_for(lambda: influxd.count("custom", "number") >= after["sent"], 10)
            assert worker.stop() == 0

        stored = {row["number"] for row in influxd.rows("custom")}
    assert before["sent"] == 100
    if scheme == "http":  # each is tried again until it is stored
        assert during["errors_no_answer"] > 0
        assert after["sent"] == len(stored) == 400
        return
    assert during["sent"] + during["lost"] + during["dropped"] == 300
    assert during["lost"] > 100
    # All that came after it was back.
    assert after["sent"] - during["sent"] == 100
    assert stored >= {*range(100), *range(300, 400)}
    assert len(stored) <= after["sent"]


@pytest.mark.long
def test_with_the_broker_down_tasks_keep_their_rate_and_no_point_is_lost(
    influxd: Influxd, database: str, broker: str, store: redis.Redis, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.05"
    with_plugin = {"influx_databases": {"metrics": url}}

    def streamed() -> dict[str, int]:
        return {side: count(store, f"streamed {side}") for side in ("with", "without")}

    def stored() -> int:
        return influxd.count("custom", "number", database)

    with Redis(tmp_path / "broker") as own, contextlib.ExitStack() as stack:
        workers = {
            side: Worker(
                tmp_path / side,
                "outages",
                own.url,
                {**config, "broker_connection_retry": True, "task_default_queue": side},
                variables={"STORE": broker, "PLUGIN": "yes" if side == "with" else "no"},
            )
            for side, config in (("with", with_plugin), ("without", {}))
        }
        for worker in workers.values():
            stack.enter_context(worker)
        app = publisher(own.url)
        for side in ("with", "without") * 2:
            app.send_task("outages.stream", [7.0], queue=side, ignore_result=True)
        wait_for(lambda: min(streamed().values()) > 20)
        own.stop(kill=True)
        for worker in workers.values():
            wait_for(lambda: "lost" in worker.log(), 10, "the worker sees it")  # noqa: B023
        begun, memories = streamed(), {side: memory(workers[side]) for side in workers}
        wait_for(lambda: streamed()["without"] > begun["without"] + 800, 20)
        made = {side: number - begun[side] for side, number in streamed().items()}
        grown = {side: memory(workers[side]) - memories[side] for side in workers}
        wait_for(lambda: stored() >= begun["with"] + made["with"], 5, "it is sent meanwhile")
        own.start()
        wait_for(lambda: "Connected to" in workers["with"].log().partition("lost")[2], 30)
        for number in range(50):
            publisher(own.url).send_task("outages.work", [number], queue="with", ignore_result=True)
        wait_for(lambda: count(store, "done with") >= 50, 30)
        sent = streamed()["with"] + 50
        wait_for(lambda: stored() >= sent, 10)
        # Celery 5.3 does not end by SIGTERM once its Redis was away, without the plugin either.
        for worker in workers.values():
            worker.stop(signal.SIGKILL)

    print("made", made, "grown", grown)
    assert stored() == sent
    assert made["with"] >= 0.95 * made["without"]
    assert grown["with"] < grown["without"] + 3 * 1024


@pytest.mark.once
def test_a_hung_database_takes_nothing_from_another(
    influxd: Influxd,
    database: str,
    broker: str,
    store: redis.Redis,
    sender: Celery,
    black_hole: int,
    tmp_path: Path,
) -> None:
    config = {
        "influx_databases": {
            "hung": f"http://127.0.0.1:{black_hole}/x?queue_size=100&flush_interval=0.05",
            "good": f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.05",
        },
        "influx_shutdown_timeout": 1.5,
    }
    tasks = 1_000

    with Worker(tmp_path, "outages", broker, config, level="warning") as worker:
        with sending(sender) as send:
            for number in range(tasks):
                send("outages.work", [number], ignore_result=True)
        wait_for(lambda: count(store, "done with") >= tasks, 30)
        # A point is stored a little before the worker has its answer, and counts it.
        wait_for(lambda: stats(sender, worker)["good"]["sent"] >= tasks // 2, 10)
        accounts = stats(sender, worker)
        began = time.monotonic()
        assert worker.stop() == 0
        took = time.monotonic() - began

    assert influxd.count("custom", "number", database) == tasks // 2
    assert accounts["good"]["sent"] == accounts["good"]["points"] == tasks // 2
    assert accounts["hung"]["sent"] == 0
    assert accounts["hung"]["dropped"] >= tasks
    assert took < 6


@pytest.mark.alone
def test_forked_children_of_a_killed_worker_go_on_sending(
    influxd: Influxd, database: str, broker: str, store: redis.Redis, sender: Celery, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.05"
    config = {"influx_databases": {"metrics": url}}
    orphans: list[int] = []

    with Worker(tmp_path, "orphans", broker, config, variables={"STORE": broker}) as worker:
        try:
            sender.send_task("orphans.start", ignore_result=True)
            for name in ("forked", "grandchild"):
                wait_for(lambda: store.get(f"{name} pid"), 20, f"{name} runs")  # noqa: B023
                orphans.append(count(store, f"{name} pid"))
            # They have sent a point, while the worker still lived.
            wait_for(lambda: influxd.count("early", "number", database) == 2, 10)
            pool = [pid for pid in worker.children() if pid not in orphans]
            worker.stop(signal.SIGKILL)

            for name in ("forked", "grandchild"):
                wait_for(
                    lambda: store.get(f"{name} slowest") or store.get(f"{name} failed"),  # noqa: B023
                    20,
                    f"{name} is done",
                )
        finally:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    for name in ("forked", "grandchild"):
        assert store.get(f"{name} failed") is None
        assert store.get(f"{name} flushed") == "True"
        assert float(str(store.get(f"{name} slowest"))) < 0.25
    # Neither lost nor, after the fork, sent a second time.
    assert influxd.count("late", "number", database) == 10_000
    assert influxd.count("before", "number", database) == 2
    wait_for(lambda: not any(map(alive, pool)), 10, "the pool's children end with the worker")


class Wiretap:
    """A TCP proxy that keeps all that clients send, each connection by itself."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.heard: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                heard = bytearray()
                self.heard.append(heard)
                for source, sink, kept in ((client, server, heard), (server, client, None)):
                    threading.Thread(
                        target=self._pass, args=(source, sink, kept), daemon=True
                    ).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if kept is not None:
                    kept += data
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


def test_embedded_beat_under_load_writes_no_byte_of_ours_to_the_broker(
    influxd: Influxd,
    redis_server: Redis,
    broker: str,
    store: redis.Redis,
    sender: Celery,
    tmp_path: Path,
) -> None:
    influxd.query('DROP DATABASE "celery"')
    influxd.query('CREATE DATABASE "celery"')
    udp = f"udp://127.0.0.1:{influxd.udp_port}?http_port={influxd.http_port}&flush_interval=0.02"
    config = {"influx_databases": {"metrics": udp}}
    tap = Wiretap(redis_server.port)

    with Worker(
        tmp_path,
        "beating",
        f"redis://127.0.0.1:{tap.port}/0",
        config,
        options=["-B", "-s", str(tmp_path / "schedule")],
        variables={"STORE": broker},
        level="warning",
    ) as worker:
        with sending(sender) as send:
            for _ in range(1_000):
                send("beating.work", ignore_result=True)
        wait_for(lambda: count(store, "works") >= 1_000 and store.get("beat is done"), 30)
        wait_for(lambda: influxd.count("from_beat", "number") == 300, 10)
        ticks = count(store, "ticks")
        wait_for(lambda: count(store, "ticks") >= ticks + 5, 10, "beat goes on")
        assert worker.stop() == 0
    tap.close()

    heard = [bytes(each) for each in tap.heard]
    assert any(b"beating.tick" in each for each in heard)  # beat's connection is among them
    assert not any(b",host=" in each or b"from_beat" in each for each in heard)
    wait_for(lambda: influxd.count("custom", "tick") >= count(store, "ticks"), 10)
    assert influxd.count("custom", "work") == 1_000
    assert influxd.count("custom", "tick") == count(store, "ticks")
    assert influxd.count("custom", "early") == 1
    ran = 1_000 + count(store, "ticks")
    wait_for(lambda: influxd.count("celery_task", "runtime") >= ran, 10)  # UDP takes its time
    runs = Counter(row["task"] for row in influxd.rows("celery_task"))
    assert runs == {"beating.work": 1_000, "beating.tick": count(store, "ticks")}


def script(config: dict[str, object], *arguments: str) -> tuple[int, float, str]:
    """Run ``apps/script.py``: its exit code, seconds, and what it printed."""
    began = time.monotonic()
    run = subprocess.run(
        # Newer Pythons warn of a fork while threads run, which is just what is tried.
        [sys.executable, "-W", "ignore", "-m", "tests.integration.apps.script", *arguments],
        env=environment("memory://", config),
        capture_output=True,
        text=True,
        timeout=30,
    )
    return run.returncode, time.monotonic() - began, run.stdout + run.stderr


def test_points_of_a_process_without_a_worker_are_sent_at_its_exit(
    influxd: Influxd, database: str
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=60"

    code, seconds, printed = script({"influx_databases": {"metrics": url}}, "1000", "fork")

    assert (code, printed) == (0, "")
    assert seconds < 10
    assert influxd.count("custom", "number", database) == 1_000
    assert len(influxd.rows("custom", database)) == 1_000
    assert influxd.count("child", "number", database) == 1


@pytest.mark.alone
def test_a_black_hole_holds_up_the_exit_no_longer_than_the_shutdown_timeout(
    black_hole: int,
) -> None:
    url = f"http://127.0.0.1:{black_hole}/x?flush_interval=60"
    config = {"influx_databases": {"metrics": url}, "influx_shutdown_timeout": 0.5}
    _, usual, _ = script({"influx_enabled": False}, "1000")

    code, seconds, printed = script(config, "1000")

    assert code == 0
    assert 0.2 < seconds - usual < 2.0
    assert "Traceback" not in printed
    assert re.search(r"did not end within 0\.\d+ s", printed)
