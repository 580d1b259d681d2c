"""All at once: the server dies, the network refuses, hangs and drips, the worker is killed."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.integration.worker import Worker, alive, publisher
from tests.servers import Influxd, Redis, free_port, wait_for

pytestmark = pytest.mark.once

#: Seconds; of an attempt, for the connection and again for the answer.
FLUSH_INTERVAL, HTTP_TIMEOUT = 0.5, 1.0
#: Points of one task.
POINTS = 50


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
        self.kills: list[tuple[float, float]] = []  # when, and when the next one was there
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

    def kill_worker(self) -> None:
        """And its children, and start it again."""
        children = self.worker.children()
        self.worker.stop(signal.SIGKILL)
        killed = time.time()
        wait_for(lambda: not any(map(alive, children)), 10, "its children end with it")
        self.worker.start()
        self.kills.append((killed, time.time()))

    def has_spooled(self) -> bool:
        """Whether anything waits on disk."""
        return any(path.stat().st_size for path in self.folder.glob("spool/main-*/*.spool"))

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
        ("failed", 2_000, 1, [0]),
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
        scene.pass_time(scene.chance.uniform(0.5, 2))
        scene.network.become(states[number % 3])
        scene.pass_time(scene.chance.uniform(0.5, 2))
        if number in kills:
            scene.kill_worker()
        scene.network.become("passes")
        scene.influxd.stop(kill=True)
        scene.pass_time(scene.chance.uniform(0.2, 1))
        scene.influxd.start()
    while scene.store.llen("accepted") * POINTS < points:
        scene.pass_time(0.1)

    scene.store.delete("celery")
    wait_for(lambda: not scene.has_spooled(), 60, "all that was on disk is sent")
    scene.worker.stop()

    accepted = scene.accepted()
    stored = [row["n"] for row in scene.influxd.rows("chaos")]
    assert scene.influxd.count("chaos", "n") == len(stored) == len(set(stored))
    missing = {number: accepted[number] for number in accepted.keys() - set(stored)}
    at_risk = FLUSH_INTERVAL + 2 * HTTP_TIMEOUT + 0.5
    for when in missing.values():
        assert any(killed - at_risk < when < killed for killed, _ in scene.kills)
    print(
        f"{len(accepted):,} points accepted, {len(stored):,} stored, each once; {len(missing)} lost "
        f"in {len(scene.kills)} kills of the worker, of {restarts} of the server none"
    )
    assert len(accepted) >= points
