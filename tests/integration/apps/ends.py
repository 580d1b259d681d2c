"""Tasks that send numbered points, and note in Redis each that ``send_data`` returned from."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from celery import Task, bootsteps, signals

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("ends", worker_prefetch_multiplier=1)


@signals.worker_shutdown.connect(weak=False)  # before the plugin is, and so called before it
def _note_that_all_tasks_have_ended(**_: Any) -> None:
    store().set("all tasks have ended", time.time())


class Mark(bootsteps.StartStopStep):
    """A cold shutdown ends it just before the plugin's own step, and sends no signal."""

    requires = ("celery_influx.bootstep:InfluxStep",)

    def terminate(self, parent: Any) -> None:
        """Note it as well."""
        _note_that_all_tasks_have_ended()


app.steps["worker"].add(Mark)
influx = celery_influx.install(app)
_PR_SET_PDEATHSIG = 1


@app.task(name="ends.stream", bind=True, ignore_result=True)
def stream(self: Task, first: int, seconds: float) -> None:
    """Send a point about every 2 ms for so long, numbered from ``first``; note what ends it.

    When told to hush, do nothing at all for a while.
    """
    store().rpush("starts", f"{self.request.id} {os.getpid()}")
    until = time.monotonic() + seconds
    serial, hushed = first, 0
    try:
        while time.monotonic() < until:
            influx.send_data({"measurement": "custom", "fields": {"serial": serial}})
            with store().pipeline(transaction=False) as pipe:
                pipe.rpush("accepted", f"{serial} {time.time()}")
                pipe.get("hush")
                _, hush = pipe.execute()
            serial += 1
            time.sleep(0.001)
            if hush and not hushed:
                hushed = store().rpush("hushed", serial)
                time.sleep(0.5)
    except BaseException as error:
        store().rpush("ends", type(error).__name__)
        raise
    store().rpush("ends", "its own end")


@app.task(name="ends.burst", ignore_result=True)
def burst(first: int, points: int) -> None:
    """Send points as fast as it goes, and stay: to be killed right after."""
    for serial in range(first, first + points):
        influx.send_data({"measurement": "custom", "fields": {"serial": serial, "t": "x" * 50}})
    store().set("burst", os.getpid())
    time.sleep(20)


@app.task(name="ends.alone", ignore_result=True)
def alone(points: int, worker_dies: bool) -> None:
    """Send points while nobody reads them any more; write down how that went.

    The worker is gone for good, or is only not running until this is done.
    """
    if worker_dies:
        # Billiard has the kernel end a child with its worker: not this one.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
        # Python ignores it; a task's own code may not.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    store().set("alone", os.getpid())
    found: dict[str, Any] = {"slowest": 0.0, "failed": ""}
    try:
        # Not until another parent is seen: Linux gives one before the old one's files are closed.
        while not store().get("go"):
            time.sleep(0.005)
        before = influx.stats()["main"]
        for number in range(points):
            # Each fiftieth is longer than one write to the worker may be.
            text = "x" * (9_000 if number % 50 == 0 else 400)
            began = time.perf_counter()
            influx.send_data({"measurement": "custom", "fields": {"serial": number, "text": text}})
            found["slowest"] = max(found["slowest"], time.perf_counter() - began)
        after = influx.stats()["main"]
        found["points"] = after["points"] - before["points"]
        found["dropped"] = after["dropped"] - before["dropped"]
        began = time.perf_counter()
        found["flushed"] = str(influx.flush(0.5))
        found["flush"] = time.perf_counter() - began
    except BaseException as error:
        found["failed"] = repr(error)
        raise
    finally:
        store().hset("found", mapping=found)
        if worker_dies:
            os._exit(0)
    while not store().get("end"):
        time.sleep(0.01)
