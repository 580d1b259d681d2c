"""Processes forked by a user's own code, which live on when the worker is killed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import redis
from celery import signals

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("orphans")
influx = celery_influx.install(app)
WORKER = "worker's pid"


def live_on(name: str, worker: int) -> None:
    """Wait until the worker is dead; send points; write down how long the slowest one took."""
    connection = redis.Redis.from_url(os.environ["STORE"])
    connection.set(f"{name} pid", os.getpid())
    try:
        influx.send_data({"measurement": "early", "fields": {"number": 1}})
        while _runs(worker):
            time.sleep(0.01)
        slowest = 0.0
        for number in range(5_000):
            start = time.perf_counter()
            influx.send_data(
                {"measurement": "late", "fields": {"number": number, "text": "x" * 90}}
            )
            slowest = max(slowest, time.perf_counter() - start)
        connection.set(f"{name} flushed", str(influx.flush(5)))
        connection.set(f"{name} slowest", slowest)
    except BaseException as error:
        connection.set(f"{name} failed", repr(error))
        raise


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@signals.worker_ready.connect(weak=False)
def _fork_in_the_worker(**_: object) -> None:
    store().set(WORKER, os.getpid())
    # Points of before, so that there are threads and sockets to be inherited.
    influx.send_data({"measurement": "before", "fields": {"number": 1}})
    influx.flush(5)
    worker = os.getpid()
    _fork(lambda: live_on("forked", worker))


def _fork(run: Callable[[], None]) -> None:
    if os.fork() == 0:
        try:
            run()
        finally:
            os._exit(0)


@app.task(name="orphans.start", ignore_result=True)
def start() -> None:
    """Start a process of ``multiprocessing`` in a pool child, and leave it alone."""
    influx.send_data({"measurement": "before", "fields": {"number": 2}})
    worker = int(store().get(WORKER))  # type: ignore[arg-type]
    # The pool's children are daemons, which multiprocessing lets have none; so people do this.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    context = multiprocessing.get_context("fork")
    context.Process(target=live_on, args=("grandchild", worker)).start()
    store().set("started", 1)
