"""Processes that write one series as fast as they can, let go together: tasks, and web requests.

For gunicorn it is also the configuration (``-c python:…``): with SLOT in the environment every
web process gets a pid that is SLOT modulo 1,000, and so all have one slot.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("unique", worker_prefetch_multiplier=1)
influx = celery_influx.install(app)

#: A pool child looks after so many points whether more than that many lines are on their way to
#: the worker and in its buffer, and waits if so: `flush` does not, since in a pool child it means
#: "handed to the worker". 16 children thus have 3,000 + 16 × 250 lines of 100 bytes underway at
#: the most. That fits into the pipe alone (1 MiB), so none is dropped, however late the reader.
LOOK_AFTER = 250
UNDERWAY = 3_000

SLOT = int(os.environ.get("SLOT", "-1"))


def _wait_for_the_others(parties: int) -> None:
    store().incr("arrived")
    while int(store().get("arrived") or 0) < parties:  # type: ignore[arg-type]
        time.sleep(0.002)


@app.task(name="unique.race", ignore_result=True)
def race(parties: int, points: int) -> None:
    """Write the points, and count them."""
    _wait_for_the_others(parties)
    send, stats = influx.send_data, influx.default.stats
    for number in range(points):
        if number % LOOK_AFTER == 0:
            while stats()["queued"] > UNDERWAY:
                time.sleep(0.01)
        send({"measurement": "race", "fields": {"number": number}})
    with store().pipeline() as pipe:
        pipe.incrby("points", points)
        pipe.rpush("pids", os.getpid())
        pipe.execute()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The same in a web process: a field of its own tells what arrived from what was overwritten.

    InfluxDB merges the fields of points with one series and time. All of the points fit into the
    buffer, so nothing is dropped.
    """
    asked = dict(parse_qsl(environ["QUERY_STRING"]))
    points, own = int(asked["points"]), asked["own"]
    _wait_for_the_others(int(asked["parties"]))
    send, began = influx.send_data, time.monotonic()
    for number in range(points):
        send({"measurement": "race", "fields": {"number": number, own: 1}})
    ended = time.monotonic()
    flushed = influx.flush(60)
    answer = {
        "pid": os.getpid(),
        "began": began,
        "ended": ended,
        "flushed": flushed,
        "stats": influx.default.stats(),
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


def pre_fork(server: Any, worker: Any) -> None:
    """Use up numbers until the next process has the slot: a thread takes one, too."""
    while SLOT >= 0:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        if ((thread.native_id or 0) + 1) % 1_000 == SLOT:
            return


def post_fork(server: Any, worker: Any) -> None:
    """Somebody else was quicker to get that number: end, and gunicorn starts another one."""
    if SLOT >= 0 and os.getpid() % 1_000 != SLOT:
        os._exit(0)
