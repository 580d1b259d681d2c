"""Tasks of a few milliseconds, with the plugin or without it, that go on whatever is down."""

from __future__ import annotations

import os
import time

import celery_influx
from tests.integration.apps.base import make_app, store

WITH_PLUGIN = os.environ.get("PLUGIN", "yes") == "yes"
SIDE = "with" if WITH_PLUGIN else "without"

app = make_app("outages", worker_prefetch_multiplier=16)
if WITH_PLUGIN:
    celery_influx.install(app)


@app.task(name="outages.work", ignore_result=True)
def work(number: int, size: int = 10) -> None:
    """Send a point to one database after the other, wait as for some server, write a result."""
    if WITH_PLUGIN:
        names = list(app.conf.influx_databases)
        fields = {"number": number, "text": "x" * size}
        point = {"measurement": "custom", "fields": fields}
        app.influx.send_data(point, names[number % len(names)])
    time.sleep(0.008)
    with store().pipeline(transaction=False) as pipe:
        pipe.incrby(f"sum {SIDE}", number)
        pipe.incr(f"done {SIDE}")
        pipe.execute()


@app.task(name="outages.stream", ignore_result=True)
def stream(seconds: float) -> None:
    """Send a point every 5 ms for so long, and count them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if WITH_PLUGIN:
            app.influx.send_data({"measurement": "custom", "fields": {"number": 1}})
        store().incr(f"streamed {SIDE}")
        time.sleep(0.005)
