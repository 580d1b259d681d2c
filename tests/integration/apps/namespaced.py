"""An app with its settings in a namespace, as Django projects have them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

from celery import Celery

import celery_influx
from tests.integration.apps import base  # noqa: F401 - it says when the worker is ready

settings = SimpleNamespace(
    CELERY_BROKER_URL=os.environ["BROKER"],
    CELERY_RESULT_BACKEND=os.environ["BROKER"],
    CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP=True,
    **json.loads(os.environ["APP_CONFIG"]),
)
app = Celery("namespaced")
celery_influx.install(app)
app.config_from_object(settings, namespace="CELERY")


@app.task(name="namespaced.succeed")
def succeed(value: Any = 1) -> Any:
    """Give back what was given."""
    return value
