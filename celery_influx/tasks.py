"""The helper tasks: celery_influx.ping, .query and, where allowed, .post.

Their results are plain JSON values, whatever the result serializer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Celery

if TYPE_CHECKING:
    from celery_influx.plugin import Influx


def register(app: Celery, influx: Influx) -> None:
    """Register the helper tasks with ``app``, in a worker: others call them by name."""
    # Celery would share them with every app of the process; and their results are all they are
    # for, even where `task_ignore_result` is the rule.
    task = partial(app.task, shared=False, ignore_result=False)

    @task(name="celery_influx.ping")
    def ping(database: str | None = None) -> dict[str, Any]:
        """Version of the server, and seconds of the round trip; SendError where it is down."""
        found = influx[database or influx.options.default_database].ping()
        return {"version": found.version, "seconds": found.seconds}

    @task(name="celery_influx.query")
    def query(statement: str, database: str | None = None, **options: Any) -> dict[str, Any]:
        """Run a reading statement; its series as plain values. See ``Database.query``."""
        chosen = influx[database or influx.options.default_database]
        return chosen.query(statement, **options).to_json()

    if influx.options.allow_post:

        @task(name="celery_influx.post")
        def post(statement: str, database: str | None = None, **options: Any) -> dict[str, Any]:
            """Run any statement, also one that changes or deletes data. See ``Database.post``."""
            chosen = influx[database or influx.options.default_database]
            return chosen.post(statement, **options).to_json()
