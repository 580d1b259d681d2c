"""Tasks that kill their own child, are killed by a limit, or just end; all that they did is counted."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from celery import Task, signals

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("torture", worker_prefetch_multiplier=4)
influx = celery_influx.install(app)


@signals.worker_shutdown.connect(weak=False)  # after the plugin is, and so called after it
def _note_the_account(**_: Any) -> None:
    store().rpush("accounts", json.dumps(influx.stats()["main"]))


@app.task(name="torture.work", bind=True, ignore_result=True)
def work(self: Task, number: int) -> None:
    """Send three points, count those of which ``send_data`` returned, and end by ``number``."""
    run = store().incr("runs")
    store().rpush("starts", str(self.request.id))
    for part in range(3):
        serial = run * 10 + part
        influx.send_data({"measurement": "custom", "fields": {"serial": serial}})
        store().rpush("returned", serial)
    if number % 5 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if number % 50 == 1:
        time.sleep(30)  # until a hard limit
    if number % 50 == 2:
        raise ValueError(number)
