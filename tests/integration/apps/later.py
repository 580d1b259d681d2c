"""A task that a worker learns of only when it is told to import this."""

from __future__ import annotations

from celery import Task

from tests.integration.apps.runs import app, run


@app.task(name="runs.later", bind=True)
def later(self: Task, how: str) -> object:
    """The same as ``run``."""
    return run.run.__func__(self, how)
