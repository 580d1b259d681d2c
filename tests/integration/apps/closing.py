"""A worker that closes the plugin in its main process while tasks run."""

from __future__ import annotations

import time

from celery import signals

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("closing")
influx = celery_influx.install(app)


@signals.worker_shutting_down.connect(weak=False)
def _close(**_: object) -> None:
    store().set("closed", int(influx.close(5)))


@app.task(name="closing.wait", ignore_result=True)
def wait() -> None:
    """Send a point as soon as the plugin was closed."""
    store().set("begun", 1)
    until = time.monotonic() + 20
    while not store().get("closed") and time.monotonic() < until:
        time.sleep(0.01)
    influx.send_data({"measurement": "afterwards", "fields": {"f": 1}})
