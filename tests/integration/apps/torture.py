"""Tasks that kill their own child, are killed by a limit, or just end; all that they did is counted."""

from __future__ import annotations

import os
import signal
import time

from celery import Task

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("torture", worker_prefetch_multiplier=4)
influx = celery_influx.install(app)


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
