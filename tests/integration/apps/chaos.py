"""A task that sends numbered points, and notes in Redis when it had."""

from __future__ import annotations

import os
import time

import celery_influx
from celery_influx.spool import Spool
from tests.integration.apps.base import make_app, store

app = make_app("chaos", worker_prefetch_multiplier=1)
influx = celery_influx.install(app)
Spool.LOOK = float(os.environ.get("LOOK", Spool.LOOK))  # else a test would wait for 30 s


@app.task(name="chaos.send", ignore_result=True)
def send(first: int, points: int) -> None:
    """Send points numbered from ``first``, one about every millisecond."""
    for number in range(first, first + points):
        influx.send_data({"measurement": "chaos", "fields": {"n": number}})
        time.sleep(0.0005)
    store().rpush("accepted", f"{first} {points} {time.time()}")
