"""A process without a worker: it sends points, and ends. Arguments: how many; "fork" or nothing."""

from __future__ import annotations

import os
import sys

import celery_influx
from tests.integration.apps.base import make_app

app = make_app("script")
celery_influx.install(app)

if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        app.influx.send_data({"measurement": "custom", "fields": {"number": number}})
    if "fork" in sys.argv:
        # What waits here is the parent's to send, once.
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        else:
            app.influx.send_data({"measurement": "child", "fields": {"number": 1}})
