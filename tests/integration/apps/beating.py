"""``worker -B``: beat is a fork of the worker that closes all files and opens its own."""

from __future__ import annotations

import threading
import time

from celery import signals

import celery_influx
from tests.integration.apps.base import end_at_once, make_app, store

app = make_app(
    "beating",
    beat_schedule={"tick": {"task": "beating.tick", "schedule": 0.1}},
    beat_max_loop_interval=0.1,
)
influx = celery_influx.install(app)
end_at_once()
POINTS = 300


@signals.celeryd_after_setup.connect(weak=False)
def _open_sockets_before_the_fork(**_: object) -> None:
    influx.send_data({"measurement": "custom", "fields": {"early": 1}})
    influx.flush(5)


@signals.beat_embedded_init.connect(weak=False)
def _send_from_beat(**_: object) -> None:
    threading.Thread(target=_stream, daemon=True).start()


def _stream() -> None:
    for number in range(POINTS):
        influx.send_data({"measurement": "from_beat", "fields": {"number": number}})
        time.sleep(0.005)
    store().set("beat is done", 1)


@app.task(name="beating.tick", ignore_result=True)
def tick() -> None:
    """What beat sends."""
    influx.send_data({"measurement": "custom", "fields": {"tick": 1}})
    store().incr("ticks")


@app.task(name="beating.work", ignore_result=True)
def work() -> None:
    """Load beside it."""
    influx.send_data({"measurement": "custom", "fields": {"work": 1}})
    store().incr("works")
