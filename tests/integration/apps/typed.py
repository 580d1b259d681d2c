"""Tasks whose points have fields of this and that type."""

from __future__ import annotations

import os
from typing import Any

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("typed")
influx = celery_influx.install(app)


@app.task(name="typed.send", influx=False)
def send(name: str, fields: dict[str, Any]) -> int:
    """Send a point, and wait for the test's word, so that the next one goes to another child."""
    influx.send_data({"measurement": "typed", "tags": {"name": name}, "fields": fields})
    store().rpush("sent", name)
    store().blpop("go", timeout=20)
    return os.getpid()
