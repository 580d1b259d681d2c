"""No-op tasks through a real worker: what each way of watching it costs.

Every variant has a worker and a broker database of its own. The workers live on through several
rounds, stopped by SIGSTOP while another one is measured: so all are warm, none disturbs another,
and the few seconds of a round see the same machine. They are started anew a few times, since
where a process's memory happens to lie is worth a percent or two, and would else look like a cost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from benchmarks.sink import Sink
from benchmarks.table import Table, ratios, rotated, verdict

#: "bare, again" is the yardstick: whatever differs between it and "bare" is noise.
VARIANTS = ("bare", "bare, again", "celery_influx", "events", "opentelemetry")
QUEUE, STORE = "run", "store"
NOTES = """
celery -A ... worker -c 2 -P ... --without-gossip --without-mingle, Redis broker, no result \
backend; tasks queued before the clock starts. CPU is of the worker and its children, not of Redis.
events: -E and task_send_sent_event, and nobody who consumes them (which would cost more).
opentelemetry: SDK, BatchSpanProcessor with its defaults, sampling all, an exporter that drops \
the spans instead of sending them; instrumented in worker_process_init, as documented.
celery_influx: defaults, UDP to a socket on loopback that another process reads.
""".strip().splitlines()


def run(
    rounds: int = 40,
    size: int = 1_000,
    restarts: int = 4,
    pool: str = "prefork",
    variants: tuple[str, ...] = VARIANTS,
) -> None:
    """Measure and print; ``size`` tasks a round, ``rounds`` in all, ``restarts`` of the workers."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    costs: dict[str, list[float]] = {name: [] for name in variants}
    seen = spans = 0
    sink = Sink()
    sink.drain()
    try:
        with tempfile.TemporaryDirectory() as folder, _redis(Path(folder)) as port:
            workers = {
                name: Worker(
                    name, f"redis://127.0.0.1:{port}/{number}", sink.port, Path(folder, name), pool
                )
                for number, name in enumerate(variants)
            }
            for worker in workers.values():
                worker.publish(size)
            left, restarts = rounds, min(rounds, restarts)
            for restart in range(restarts):
                share = left // (restarts - restart)
                left -= share
                with contextlib.ExitStack() as stack:
                    for worker in workers.values():
                        worker.start()
                        stack.callback(worker.wait)
                    for worker in workers.values():
                        stack.callback(worker.terminate)  # all of them first
                    for worker in workers.values():
                        worker.ready()
                    for turn in range(share + 1):
                        for name in rotated(variants, turn):
                            rate, cost = workers[name].measure(size)
                            if turn:  # the first round warms up
                                rates[name].append(rate)
                                costs[name].append(cost)
            if "events" in workers:
                seen = workers["events"].client.info("commandstats")["cmdstat_publish"]["calls"]
            if "opentelemetry" in workers:
                spans = int(workers["opentelemetry"].client.get("spans") or 0)
    finally:
        received = sink.stop()
    tasks = (rounds + 2 * restarts) * (size + 2)
    _table(
        pool,
        rates,
        costs,
        f"{tasks:,} tasks were run by each variant; watchers' account: "
        f"{received:,} points received, {seen:,} event messages, {spans:,} spans",
    )


class Worker:
    """One variant's worker, with a database of the broker to itself."""

    def __init__(self, variant: str, broker: str, udp_port: int, log: Path, pool: str) -> None:
        self._pool = pool
        self.client = redis.Redis.from_url(broker, socket_timeout=90)
        self._log = log
        self._environment = {
            **os.environ,
            "BENCHMARK_VARIANT": variant,
            "BENCHMARK_BROKER": broker,
            "BENCHMARK_UDP_PORT": str(udp_port),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []

    def publish(self, size: int) -> None:
        """Keep a round's messages, as this variant's publisher writes them, to be copied."""
        command = [sys.executable, "-m", "benchmarks.worker_app", str(size)]
        subprocess.run(command, env=self._environment, check=True)
        self.client.rename(QUEUE, STORE)

    def start(self) -> None:
        """Start it; ``ready`` waits for it."""
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.worker_app", "worker"]
        command += ["-c", "2", "--without-gossip", "--without-mingle", "-l", "WARNING"]
        command += ["-P", self._pool]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a process group to stop and to continue
            )

    def ready(self) -> None:
        """Wait until it works, and stop it."""
        assert self._process
        self.client.copy(STORE, QUEUE)
        self._wait_for_mark()
        self._wait_for_mark()
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self._pids = [pid, *map(int, children)]
        self._pause()

    def measure(self, size: int) -> tuple[float, float]:
        """Tasks a second, and µs of CPU of all its processes a task."""
        before = self._cpu()
        self.client.copy(STORE, QUEUE)
        os.killpg(self._pids[0], signal.SIGCONT)
        first = self._wait_for_mark()
        last = self._wait_for_mark()
        self._pause()
        return (size + 1) / (last - first) * 1e9, (self._cpu() - before) / (size + 2) * 1e6

    def terminate(self) -> None:
        """Begin a warm shutdown, so that whatever waits is sent."""
        assert self._process
        self._process.terminate()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)

    def wait(self) -> None:
        """Wait for its end."""
        assert self._process
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)

    def _pause(self) -> None:
        time.sleep(0.05)  # the last task's end
        os.killpg(self._pids[0], signal.SIGSTOP)

    def _wait_for_mark(self) -> int:
        found = self.client.blpop(["marks"], timeout=60)
        if not found:
            log = self._log.read_text(errors="replace")
            raise RuntimeError(f"{self._log.name}: no task ended in 60 s:\n{log[-3000:]}")
        return int(found[1])

    def _cpu(self) -> float:
        """Seconds, exact to the nanosecond: Linux's clock of another process's CPU time."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._pids)


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[int]:
    program = shutil.which("redis-server")
    if not program:
        raise SystemExit(
            "redis-server is not installed; to install it: sh scripts/install-servers.sh"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis("127.0.0.1", port)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _table(
    pool: str, rates: dict[str, list[float]], costs: dict[str, list[float]], account: str
) -> None:
    title = f"{pool.capitalize()} worker, no-op tasks"
    table = Table(f"{title}: rate", "tasks/s", "this / bare")
    for name, found in rates.items():
        table.add(name, found, ratios(found, rates["bare"]))
    ours = ratios(rates["celery_influx"], rates["bare"])
    table.notes = [verdict("rate with celery_influx, of bare", ours, 0.97, least=True)]
    table.show()
    ours = costs["celery_influx"]
    table = Table(f"{title}: CPU of a task", "µs", "this / bare")
    for name, found in costs.items():
        table.add(name, found, ratios(found, costs["bare"]))
    for name in list(costs)[1:]:
        added = [this - bare for this, bare in zip(costs[name], costs["bare"], strict=True)]
        table.add(f"added by {name}", added)
    cheaper = [
        verdict(f"CPU with celery_influx, of that with {peer}", ratios(ours, costs[peer]), 1)
        for peer in ("events", "opentelemetry")
        if peer in costs
    ]
    table.notes = [*cheaper, account, *NOTES]
    table.show()
