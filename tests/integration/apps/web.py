"""A WSGI application whose requests send points and publish tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app("web")
influx = celery_influx.install(app)


def send(measurement: str, number: int) -> None:
    """Send one point that says who made it."""
    influx.send_data(
        {"measurement": measurement, "tags": {"pid": os.getpid()}, "fields": {"number": number}}
    )


# With --preload this is gunicorn's master: its thread and its connection are there at the fork,
# and a line waits that is its own to send.
send("early", 0)
influx.flush(5)
send("early", 1)
store().rpush("importers", os.getpid())


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Send ``points`` points, publish a task, and count both in Redis."""
    points = int(parse_qs(environ["QUERY_STRING"])["points"][0])
    for number in range(points):
        send("hits", number)
    app.send_task("web.work", ignore_result=True)
    store().incrby("points", points)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
    return [str(os.getpid()).encode()]
