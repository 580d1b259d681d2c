"""One task that can end in every way there is; each start of its body is counted in Redis."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

from celery import Task, chain, chord, group, signals
from celery.exceptions import Ignore, Reject

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("runs", task_queues=None)
influx = celery_influx.install(app)


class Broken(Exception):
    """What the task raises."""


def _kill(task: Task, number: int) -> None:
    time.sleep(0.3)  # else the pool may not have seen who took the task, and gives it out again
    _note_end(task)
    os.kill(os.getpid(), number)
    time.sleep(10)  # not every signal has come by now


def _note_end(task: Task) -> None:
    store().rpush(f"ended {task.request.id}", time.time())


def _end(task: Task, how: str, number: int) -> Any:
    """End as ``how`` says; ``number`` is 1 in the first run of the task."""
    if how == "fail":
        raise Broken("no")
    if how == "retry" and number < 3:
        raise task.retry(countdown=0, exc=Broken("again"), max_retries=5)
    if how == "ignore":
        raise Ignore
    if how == "reject":
        raise Reject("not for me", requeue=False)
    if how == "requeue" and number == 1:
        raise Reject("later", requeue=True)
    if how == "copy":
        request = task.request
        copy.deepcopy(request)
        pickle.dumps(request)
        json.dumps(vars(request))
    if how == "cancel":
        raise asyncio.CancelledError
    if how == "no memory":
        raise MemoryError
    if how.startswith("eat"):
        Path(how.rpartition(" ")[2], "cgroup.procs").write_text(str(os.getpid()))
        bytearray(b"x") * (256 << 20)
    if how == "exit":
        raise SystemExit(3)
    if how == "replace" and number == 1:
        raise task.replace(run.si("succeed"))
    if how == "eager":
        run.apply(("succeed",), task_id=f"{task.request.id} eager")
    if how == "kill":
        _kill(task, signal.SIGKILL)
    if how == "kill when told":
        while not store().get("told"):
            time.sleep(0.005)
    if how in ("kill at once", "kill when told"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill once" and number == 1:
        _kill(task, signal.SIGKILL)
    if how == "crash":
        _kill(task, signal.SIGSEGV)
    if how.startswith("succeed in"):
        time.sleep(float(how.rpartition(" ")[2]))
    if how.startswith("sleep") and ("once" not in how or number == 1):
        time.sleep(float(how.rpartition(" ")[2]))
    return how


@app.task(name="runs.run", bind=True)
def run(self: Task, how: str, *_: Any) -> Any:
    """Count the start, and end as ``how`` says."""
    key = f"began {self.request.id}"
    try:  # whoever reads that it began may end it at once
        number = store().rpush(key, f"{time.time()} {os.getpid()}")
        return _end(self, how, number)
    finally:
        _note_end(self)


@app.task(name="runs.late", bind=True, acks_late=True)
def late(self: Task, how: str) -> Any:
    """The same, acknowledged after it has run."""
    return run.run.__func__(self, how)


@app.task(name="runs.unacknowledged", bind=True, acks_late=True, acks_on_failure_or_timeout=False)
def unacknowledged(self: Task, how: str) -> Any:
    """The same, acknowledged only if it has succeeded."""
    return run.run.__func__(self, how)


@app.task(name="runs.given_back", bind=True, acks_late=True, reject_on_worker_lost=True)
def given_back(self: Task, how: str) -> Any:
    """The same; its message goes back to the queue if its child dies."""
    return run.run.__func__(self, how)


@app.task(
    name="runs.retried", bind=True, retry_on_worker_lost=True, default_retry_delay=0, max_retries=5
)
def retried(self: Task, how: str) -> Any:
    """The same; Celery 5.7 retries it if its child dies."""
    return run.run.__func__(self, how)


@app.task(name="runs.without_result", bind=True, ignore_result=True)
def without_result(self: Task, how: str) -> Any:
    """The same, without a result."""
    return run.run.__func__(self, how)


@app.task(name="runs.canvas", bind=True)
def canvas(self: Task) -> list[str]:
    """Start a chain, a group and a chord; the ids of what they are made of."""
    links = chain(run.si("succeed"), run.si("succeed"))()
    members = group(run.si("succeed") for _ in range(2))()
    body = chord([run.si("succeed") for _ in range(2)])(run.si("succeed"))
    return [
        links.id,
        links.parent.id,
        *[each.id for each in members.results],
        *[each.id for each in body.parent.results],
        body.id,
    ]


@signals.task_success.connect(weak=False)
def kill_before_the_end(result: Any = None, **_: Any) -> None:
    """Of a task that asks for it, kill the child when its result is stored, and its run goes on."""
    if isinstance(result, str) and result.startswith("succeed in"):
        os.kill(os.getpid(), signal.SIGKILL)


@signals.task_postrun.connect(weak=False)
def kill_after_the_end(args: Any = (), **_: Any) -> None:
    """Of a task that asks for it, kill the child when the run has come to its end."""
    if args and args[0] == "succeed and die":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
