"""A real ``celery worker`` process for tests, and a publisher that is no part of it.

The worker's app reads its configuration from the environment, as the modules in ``apps`` do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from celery import Celery

import celery_influx
from tests.servers import missing, wait_for

ROOT = Path(__file__).resolve().parents[2]


def environment(
    broker: str, config: Mapping[str, Any] | None = None, **more: str
) -> dict[str, str]:
    """The environment of a process that runs one of ``apps`` with this configuration."""
    # The package that is tested: in tox the installed one, with the extension, and not the source.
    tested = str(Path(celery_influx.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [tested, str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONFAULTHANDLER": "1",
        "BROKER": broker,
        "APP_CONFIG": json.dumps(dict(config or {})),
        **more,
    }


class Worker:
    """``celery worker``: ready to take tasks when ``start`` returns, gone when ``stop`` does.

    Args:
        folder: For its log and its pid; one worker's own.
        module: Name of a module in ``apps``.
        broker: URL of the broker, also used as result backend.
        config: Celery settings, as JSON has them.
        pool: ``prefork``, ``threads`` or ``solo``.
        concurrency: Processes or threads.
        options: More of the command line.
        variables: More of the environment.
        level: Of the log. Its "ready" line needs ``info``, which costs a line for every task;
            with another one a file that the app writes at ``worker_ready`` is waited for.
    """

    def __init__(
        self,
        folder: Path,
        module: str,
        broker: str,
        config: Mapping[str, Any] | None = None,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        level: str = "info",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = f"{pool}-{folder.name}@test"
        self._ready = folder / "ready"
        self._environment = environment(broker, config, READY=str(self._ready), **(variables or {}))
        self._command = [
            *(sys.executable, "-m", "celery", "-A", f"tests.integration.apps.{module}", "worker"),
            *("-P", pool, "-c", str(concurrency), "-l", level, "-n", self.name),
            *("--without-gossip", "--without-mingle", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process, and do not wait for it."""
        self._ready.unlink(missing_ok=True)
        with (self.folder / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=self._environment,
            )
        return self.process

    def start(self) -> None:
        """Start it and wait until it takes tasks."""
        process = self.launch()

        def ready() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"the worker ended:\n{self.log()[-5000:]}")
            return self._ready.exists()

        wait_for(ready, 40, "the worker is ready")

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """End it by a signal; its exit code. Killed, and a failure, when it does not end.

        Celery, with or without the plugin, at times does not count a result that comes while it
        shuts down; its child then waits 30 s for that, and ends in peace.
        """
        process, self.process = self.process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            # The log says where each thread stands, in the children first.
            for pid in (*children(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
            process.wait(10)
            raise AssertionError(
                f"still running after {timeout} s:\n{self.log()[-20000:]}"
            ) from None

    def wait(self, timeout: float = 30) -> int:
        """Wait until it ends by itself; its exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def pid(self) -> int:
        """Its main process."""
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[int]:
        """The processes that its main process has started."""
        return children(self.pid())

    def log(self) -> str:
        """All that it and its children have printed."""
        return (self.folder / "worker.log").read_text(errors="replace")

    def __enter__(self) -> Worker:
        try:
            self.start()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that still are its children."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has just ended
            found += [int(each) for each in task.read_text().split()]
    return found


def alive(pid: int) -> bool:
    """Whether ``pid`` runs, and is not just waited for by its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def resident_kib(pid: int) -> int:
    """Memory that belongs to ``pid`` now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"no memory size of {pid}")


def publisher(broker: str, **config: Any) -> Celery:
    """An app that sends tasks by name, and is not the current one."""
    app = Celery("publisher", broker=broker, backend=broker, set_as_current=False)
    app.conf.update(config)
    return app


@contextmanager
def sending(app: Celery) -> Iterator[Any]:
    """A function as ``app.send_task``, over one connection: thousands of messages a second."""
    with app.producer_pool.acquire(block=True) as producer:

        def send(name: str, args: Sequence[Any] = (), **options: Any) -> Any:
            return app.send_task(name, args, producer=producer, **options)

        yield send


def revoke(app: Celery, task_id: str) -> None:
    """Revoke a task that is not there yet, and wait until a worker has heard of it.

    A worker takes tasks before it listens to such words, and what is said earlier is gone.
    """
    wait_for(
        lambda: app.control.revoke(task_id, reply=True, timeout=1, limit=1),
        20,
        "an answer to a revoke",
    )


def stats(app: Celery, worker: Worker) -> dict[str, dict[str, int]]:
    """Our part of ``celery inspect stats``: database to counters, over all the processes."""

    def ask() -> Any:
        return app.control.inspect(destination=[worker.name], timeout=2, limit=1).stats()

    answer = wait_for(ask, 20, "an answer to inspect stats")
    found = answer[worker.name]["influx"]  # type: ignore[index]
    assert isinstance(found, dict)
    return found


@cache
def skip_without(library: str) -> None:
    """Only looked for: imported, it would be there in all of the other tests."""
    found = subprocess.run([sys.executable, "-c", f"import {library}"], capture_output=True)
    if found.returncode:
        missing(f"{library} is not installed; pip install {library}")
