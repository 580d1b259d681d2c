"""The end-to-end load: tasks that send points, and count in Redis what they sent."""

from __future__ import annotations

import time

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("load", worker_prefetch_multiplier=64)
influx = celery_influx.install(app)

POINTS = 4


@app.task(name="load.work", ignore_result=True)
def work(number: int) -> None:
    """Send four points, each unlike any other in its values."""
    for part in range(POINTS):
        serial = number * POINTS + part
        influx.send_data(
            {
                "measurement": "custom",
                "tags": {"shop": f"shop {serial % 7}", "even": serial % 2 == 0},
                "fields": {
                    "serial": serial,
                    "half": serial / 2,
                    "odd": serial % 2 == 1,
                    "text": f'a "quoted" text, {serial}\n\\',
                    "clock": time.time_ns(),
                },
            }
        )
    with store().pipeline(transaction=False) as pipe:
        pipe.incrby("custom", POINTS)
        pipe.incr("tasks")
        pipe.execute()
