"""What is written: each measurement with its tags and fields, their types, units and meaning.

The table in docs/reference/measurements.md comes from here. No name of ours is an InfluxQL
keyword, which every query would have to quote.
"""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """A tag (``type`` is "tag") or a field of a measurement."""

    name: str
    type: str
    unit: str
    doc: str


class Measurement(NamedTuple):
    """One measurement that this package writes."""

    name: str
    when: str
    columns: tuple[Column, ...]


#: Every state a run of a task can end in; Celery's own words.
STATES = ("SUCCESS", "FAILURE", "RETRY", "IGNORED", "REJECTED", "REVOKED")

CELERY_TASK = Measurement(
    "celery_task",
    "at the end of every run of a task",
    (
        Column("task", "tag", "", "the task's name; (unreadable) of a message that names none"),
        Column("queue", "tag", "", "the queue it came from"),
        Column("worker", "tag", "", "the worker's node name"),
        Column("host", "tag", "", "the machine's host name"),
        Column("state", "tag", "", "how it ended: " + ", ".join(STATES)),
        Column(
            "exception",
            "tag",
            "",
            "class of the exception, only where there is one; WorkerLostError: its child died",
        ),
        Column(
            "runtime",
            "float",
            "s",
            "from the start of the task's body to its end, or until it was killed",
        ),
        Column(
            "wait",
            "float",
            "s",
            "how long it stood in the queue, able to run: start − max(last publish, ETA); "
            "left out where the publisher has no plugin",
        ),
        Column("age", "float", "s", "since the first publish; only where retries > 0"),
        Column(
            "cpu",
            "float",
            "s",
            "processor time of the run's thread; left out under gevent and eventlet, and where the "
            "run was killed",
        ),
        Column("retries", "int", "", "how often it was retried before this run"),
        Column("id", "str", "", "the task's id; only with `influx_task_ids`, as the next two"),
        Column("root_id", "str", "", "id of the first task of its workflow"),
        Column("parent_id", "str", "", "id of the task that sent it"),
    ),
)

TIMED = Measurement(
    "timed",
    "at the end of every call of a `@timed` function and of every `with timed(...)` block",
    (
        Column("timer", "tag", "", "the timer's name; by default module and name of the function"),
        Column("outcome", "tag", "", "success or error"),
        Column("exception", "tag", "", "class of the exception; only on error"),
        Column("host", "tag", "", "the machine's host name"),
        Column("worker", "tag", "", "the worker's node name; only inside a worker"),
        Column("runtime", "float", "s", "from start to end"),
    ),
)

MEASUREMENTS = (CELERY_TASK, TIMED)
