"""What the workers' apps share: an app made from the environment, counting in Redis, being ready."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import billiard.pool
import redis
from celery import Celery, signals


def make_app(name: str, **defaults: Any) -> Celery:
    """An app with the broker and the settings that the test gave by the environment."""
    app = Celery(name, broker=os.environ["BROKER"], backend=os.environ["BROKER"])
    app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=True)
    app.conf.update(defaults)
    app.conf.update(json.loads(os.environ.get("APP_CONFIG", "{}")))
    return app


def end_at_once() -> None:
    """Let a pool's child that ends wait for 1 s, and not 30, for its results to be counted.

    With the plugin or without, Celery at times never counts the last one.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 10


def store() -> redis.Redis:
    """A connection of this process's own to the Redis that counts for the tasks."""
    return _store(os.getpid())


@lru_cache(maxsize=1)
def _store(pid: int) -> redis.Redis:
    return redis.Redis.from_url(os.environ.get("STORE") or os.environ["BROKER"])


@signals.worker_ready.connect(weak=False)
def _ready(**_: Any) -> None:
    if os.environ.get("READY"):
        Path(os.environ["READY"]).touch()
