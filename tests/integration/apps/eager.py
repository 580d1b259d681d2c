"""A script whose tasks run at once, in their caller: they end in every way, however they are called.

Prints as JSON the tasks' ids by how each was called and ended, and the id at each start of a body.
"""

from __future__ import annotations

import contextlib
import json

from celery import Task
from celery.exceptions import Retry

import celery_influx
from tests.integration.apps.base import make_app

app = make_app("eager")
celery_influx.install(app)
starts: list[str] = []


class Broken(Exception):
    """What the task raises."""


@app.task(name="eager.end", bind=True)
def end(self: Task, how: str) -> None:
    """Note the start, and end as ``how`` says."""
    starts.append(self.request.id)
    if how == "fail":
        raise Broken
    if how == "retry" and self.request.retries < 2:
        raise self.retry(exc=Broken(), countdown=0)


def call(by: str, how: str) -> str:
    """Call the task; its id."""
    task_id = f"{how} by {by}"
    app.conf.task_always_eager = by != "apply"
    app.conf.task_eager_propagates = by == "raising delay"
    if by == "apply":
        return str(end.apply((how,)).id)
    if by == "delay":
        return str(end.delay(how).id)
    with contextlib.suppress(Broken, Retry):
        end.apply_async((how,), task_id=task_id)
    return task_id


if __name__ == "__main__":
    ids = {
        f"{how} by {by}": call(by, how)
        for by in ("apply", "delay", "raising delay")
        for how in ("succeed", "fail", "retry")
    }
    print(json.dumps({"ids": ids, "starts": starts}))
