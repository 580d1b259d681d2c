"""The demo's own count of what its tasks send, kept apart from the plugin in order to check it.

A project of yours needs nothing of this. Outside the demo (``EXAMPLE_FOLDER``) it counts nothing.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import celery
from celery import signals
from celery.exceptions import Retry

from example_project.app import app

FOLDER = os.environ.get("EXAMPLE_FOLDER")


def add(word: str) -> None:
    """Count one: a line of a file to which all processes append."""
    if FOLDER:
        with Path(FOLDER, "tally").open("ab", buffering=0) as file:
            file.write(f"{word}\n".encode())


def read() -> Counter[str]:
    """How often each word was counted so far."""
    file = Path(FOLDER or "", "tally")
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def points() -> Counter[str]:
    """How many points of each measurement the tasks sent, by their own count."""
    words = read()
    points: Counter[str] = Counter()
    for word, times in words.items():
        kind, _, name = word.partition(" ")
        if kind in ("point", "task"):
            points[name if kind == "point" else "celery_task"] += times
    return points


class Task(celery.Task):
    """Counts how each run of a task ends."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        end = "failed"
        try:
            result = self.run(*args, **kwargs)
            end = "succeeded"
            return result
        except Retry:
            end = "retried"
            raise
        finally:
            add(f"task {end}")


@signals.worker_ready.connect
def _on_ready(**_: object) -> None:
    add("ready")


@signals.worker_shutdown.connect  # after the plugin's own receiver, which sends what waits
def _on_shutdown(**_: object) -> None:
    if FOLDER:
        Path(FOLDER, "worker.json").write_text(json.dumps(app.influx.stats()["celery"]))
