"""All at once: the server dies, the network refuses, hangs and drips, the worker is killed."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from celery import Celery

from celery_influx.line_reader import decode
from celery_influx.spool_records import records, unpack
from tests.integration.worker import Worker, alive, publisher, stats
from tests.servers import Influxd, Redis, free_port, wait_for

pytestmark = pytest.mark.once

#: Seconds; of an attempt, for the request to be taken and again for the head of its answer.
FLUSH_INTERVAL, HTTP_TIMEOUT = 0.5, 0.5
#: Seconds that an attempt takes at most: at once nobody is there, or all of it is waited for.
ATTEMPT = {"refuses": 0.0, "hangs": 2 * HTTP_TIMEOUT}
#: Seconds from a pool's child through its pipe to the batcher, on a busy machine.
ON_ITS_WAY = 0.5
#: Points of one task.
POINTS = 50


def at_risk(mode: str, state: str, on_disk_for: float) -> float:
    """For how many seconds at most a point is only in the memory of a worker, and lost with it.

    It waits in the buffer: for the flush interval, or while an attempt keeps the thread, which
    begins right after the buffer was emptied. After that it is a batch: with ``always`` on disk
    at once, so where an attempt hangs, lost is only what came since it has been there; else only
    when its own attempt has failed.
    """
    if mode == "always":
        return (on_disk_for if state == "hangs" else FLUSH_INTERVAL) + ON_ITS_WAY
    return FLUSH_INTERVAL + ATTEMPT[state] + ON_ITS_WAY


class Kill(NamedTuple):
    """Of a worker: when, when the last of its children was gone, and what was on disk by then."""

    began: float
    ended: float
    at_risk: float
    on_disk: set[int]


class Network:
    """A proxy before influxd that passes on, refuses, hangs, or lets through little by little."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._state = "passes"
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def become(self, state: str) -> None:
        """``passes``, ``refuses``, ``hangs`` or ``drips``."""
        self._state = state

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._ended.is_set():
            if self._state == "refuses":
                self._close_listener()
            elif self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            if self._listener and select.select([self._listener], [], [], 0.02)[0]:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
            else:
                self._ended.wait(0.02)
        self._close_listener()

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener:
            listener.close()

    def _serve(self, client: socket.socket) -> None:
        place = "127.0.0.1", self._target
        with client, contextlib.suppress(OSError), socket.create_connection(place, 5) as server:
            self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        while not self._ended.is_set() and self._state != "refuses":
            if self._state == "hangs":
                self._ended.wait(0.02)
                continue
            slow = self._state == "drips"
            for ready in select.select(list(other), [], [], 0.05)[0]:
                data = ready.recv(20 if slow else 65_536)
                if not data:
                    return
                other[ready].sendall(data)
            if slow:
                self._ended.wait(0.05)


def on_disk(folder: Path) -> set[int]:
    """The points in the files of the spool that is there."""
    found = set()
    for path in folder.glob("spool/main-*/*.spool"):
        data = path.read_bytes()
        for start, _, count in records(data):
            points = map(decode, unpack(data, start, count))
            found |= {point.fields["n"] for point in points if point.measurement == "chaos"}
    return found


class Scene:
    """A worker that sends by the network to influxd, and the troubles that come."""

    def __init__(self, folder: Path, mode: str, broker: str) -> None:
        self.folder = folder
        self.influxd = Influxd(folder / "influxd", udp=False)
        self.network = Network(self.influxd.http_port)
        self.store = redis.Redis.from_url(broker, decode_responses=True)
        self.sender = publisher(broker)
        self.chance = random.Random(1)
        self.sent = 0
        self.mode = mode
        self.kills: list[Kill] = []
        options = {
            "flush_interval": FLUSH_INTERVAL,
            "http_timeout": HTTP_TIMEOUT,
            "spool_dir": folder / "spool",
            "spool_mode": mode,
        }
        query = "&".join(f"{name}={value}" for name, value in options.items())
        config = {
            "influx_databases": {"main": f"http://127.0.0.1:{self.network.port}/celery?{query}"}
        }
        self.worker = Worker(folder / "worker", "chaos", broker, config, level="warning")

    def give_work(self, tasks: int = 20) -> None:
        """Have some tasks wait."""
        while self.store.llen("celery") < tasks:
            self.sender.send_task("chaos.send", (self.sent, POINTS), ignore_result=True)
            self.sent += POINTS

    def accepted(self) -> dict[int, float]:
        """Number of each point that is known to be accepted, to the time when at the latest."""
        notes = [each.split() for each in self.store.lrange("accepted", 0, -1)]  # type: ignore[union-attr]
        return {
            number: float(when)
            for first, points, when in notes
            for number in range(int(first), int(first) + int(points))
        }

    def pass_time(self, seconds: float) -> None:
        """Work goes on."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.give_work()
            time.sleep(0.02)

    def work_until(self, condition: Callable[[dict[str, int]], bool], what: str) -> None:
        """Work goes on until the worker's account is such."""

        def reached() -> bool:
            self.give_work()
            return condition(self.account())

        wait_for(reached, 40, what)

    def account(self) -> dict[str, int]:
        """What became of the points of the worker that is there now."""
        return stats(self.sender, self.worker)["main"]

    def suffer(self, trouble: str, attempts: int = 1) -> None:
        """Work goes on until so many attempts have failed by it, and a batch went to disk."""
        before = self.account()
        self.work_until(
            lambda now: (
                now["errors_no_answer"] >= before["errors_no_answer"] + attempts
                and now["spooled"] > before["spooled"]
            ),
            f"{trouble}: attempts fail by it",
        )

    def recover(self) -> None:
        """Work goes on until points arrive again; and those, too, that a killed worker left."""
        sent = self.account()["sent"]
        left = bool(self.kills)
        self.work_until(
            lambda now: now["sent"] > sent and (now["adopted"] > 0 or not left),
            "points arrive again, those that a killed worker left, too",
        )

    def kill_worker(self, state: str) -> None:
        """And its children, and start it again."""
        children = self.worker.children()
        began = put_down = time.time()
        if self.mode == "always" and state == "hangs":
            put_down = self.wait_for_batch_in_hand()
            began = time.time()
        self.worker.stop(signal.SIGKILL)
        wait_for(lambda: not any(map(alive, children)), 10, "its children end with it")
        risk = at_risk(self.mode, state, began - put_down)
        self.kills.append(Kill(began, time.time(), risk, on_disk(self.folder)))
        self.worker.start()

    def wait_for_batch_in_hand(self) -> float:
        """Work goes on until an attempt begins; when its batch was put on disk."""
        asked = time.time()

        def written() -> float | None:
            self.give_work()
            for path in self.folder.glob("spool/main-*/*.hand.spool"):
                found = path.stat()
                if found.st_size and found.st_mtime > asked:
                    return found.st_mtime
            return None

        when = wait_for(written, 40, "a batch is on disk before its attempt is over")
        assert isinstance(when, float)
        return when

    def has_spooled(self) -> bool:
        """Whether anything waits on disk."""
        with contextlib.suppress(FileNotFoundError):  # it was sent meanwhile
            return any(path.stat().st_size for path in self.folder.glob("spool/main-*/*.spool"))
        return True

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.worker.stop()
        self.network.close()
        self.influxd.stop()
        self.sender.close()
        self.store.close()


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    with Redis(tmp_path / "redis") as broker:
        made = Scene(tmp_path, request.param, broker.url)
        try:
            yield made
        finally:
            made.close()


LONG = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("scene", "points", "restarts", "kills"),
    [
        ("failed", 2_000, 3, [1]),
        pytest.param("failed", 100_000, 10, [3, 7], marks=LONG),
        pytest.param("always", 100_000, 10, [3, 7], marks=LONG),
    ],
    indirect=["scene"],
)
def test_all_troubles_together_cost_only_what_was_in_memory_of_a_killed_worker(
    scene: Scene, points: int, restarts: int, kills: list[int]
) -> None:
    scene.influxd.start()
    scene.worker.start()
    states = ["refuses", "hangs", "drips"]
    for number in range(restarts):
        state = states[number % 3]
        scene.pass_time(scene.chance.uniform(0.2, 1))
        scene.network.become(state)
        scene.suffer(state)
        if number in kills:
            # What it has spooled since then is still there: nothing passes meanwhile.
            scene.kill_worker(state)
            assert scene.kills[-1].on_disk
        scene.influxd.stop(kill=True)
        scene.network.become("passes")
        scene.suffer("no server", attempts=2)  # one may have begun before
        scene.influxd.start()
        scene.recover()
    while scene.store.llen("accepted") * POINTS < points:
        scene.pass_time(0.1)

    scene.store.delete("celery")
    wait_for(lambda: not scene.has_spooled(), 60, "all that was on disk is sent")
    account = scene.account()
    scene.worker.stop()

    assert (account["dropped"], account["lost"], account["rejected"]) == (0, 0, 0)
    accepted = scene.accepted()
    stored = [row["n"] for row in scene.influxd.rows("chaos")]
    assert scene.influxd.count("chaos", "n") == len(stored) == len(set(stored))
    missing = {number: accepted[number] for number in accepted.keys() - set(stored)}
    for when in missing.values():
        assert any(kill.began - kill.at_risk < when < kill.ended for kill in scene.kills)
    for kill in scene.kills:
        assert kill.on_disk <= set(stored)
    print(
        f"{len(accepted):,} points accepted, {len(stored):,} stored, each once; {len(missing)} lost "
        f"in {len(scene.kills)} kills of the worker, of {restarts} of the server none; oldest lost "
        f"{[_oldest(kill, missing) for kill in scene.kills]} s before them"
    )
    assert len(accepted) >= points


def _oldest(kill: Kill, missing: dict[int, float]) -> float:
    """Seconds from when the oldest point that was lost with it was accepted."""
    lost = [when for when in missing.values() if kill.began - 5 < when < kill.ended]
    return round(kill.began - min(lost, default=kill.began), 2)


def files_in(folder: Path) -> set[tuple[int, str]]:
    """Whose files are in the spool that is there, and of which kind."""
    paths = folder.glob("spool/main-*/*")
    return {(int(path.name.partition(".")[0].partition("-")[2]), path.suffix) for path in paths}


def test_what_a_killed_worker_left_arrives_once_by_another_that_spools_there_too(
    broker: str, sender: Celery, tmp_path: Path
) -> None:
    with Influxd(tmp_path / "influxd", udp=False) as influxd:
        pass  # it has its database, and is away
    points = 4 * POINTS
    place = f"127.0.0.1:{influxd.http_port}/celery?spool_dir={tmp_path / 'spool'}"
    config = {
        "influx_databases": {"main": f"http://{place}&flush_interval=0.05"},
        "influx_task_points": False,
    }

    with contextlib.ExitStack() as stack:
        workers = []
        for number, queue in enumerate(("first", "second")):
            worker = Worker(
                tmp_path / queue,
                "chaos",
                broker,
                {**config, "task_default_queue": queue},
                variables={"LOOK": "0.2"},
                level="warning",
            )
            workers.append(stack.enter_context(worker))
            for each in range(number * points, (number + 1) * points, POINTS):
                sender.send_task("chaos.send", (each, POINTS), queue=queue, ignore_result=True)
            expected = {*range((number + 1) * points)}
            wait_for(lambda: on_disk(tmp_path) == expected, 20, "all is on disk")  # noqa: B023
        first, second = workers
        owners = {(worker.pid(), kind) for worker in workers for kind in (".lock", ".spool")}
        assert files_in(tmp_path) == owners
        # It has looked for the dead at its start, when the first had all of its points on disk.
        assert stats(sender, second)["main"]["adopted"] == 0

        first.stop(signal.SIGKILL)
        stack.enter_context(influxd)
        left = {(second.pid(), ".lock")}
        wait_for(
            lambda: files_in(tmp_path) == left, 30, "all is sent, and no file of the dead left"
        )
        account = stats(sender, second)["main"]

        assert influxd.count("chaos", "n") == 2 * points
        assert {row["n"] for row in influxd.rows("chaos")} == {*range(2 * points)}
        # What came twice would be stored once, and counted here.
        assert account["sent"] == 2 * points
        assert account["adopted"] == account["points"] == points
        assert second.stop() == 0
        assert files_in(tmp_path) == set()
