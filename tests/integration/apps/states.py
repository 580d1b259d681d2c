"""Tasks that end in every way there is, routes of their own, workflows, timers."""

from __future__ import annotations

import gc
import time
from typing import Any

from celery import Task, chain, chord, group, shared_task
from celery.exceptions import Ignore, Reject
from kombu import Exchange, Queue

import celery_influx
from tests.integration.apps.base import make_app, store

app = make_app(
    "states",
    task_queues=[
        Queue("celery"),
        Queue("letters", Exchange("post", type="direct"), routing_key="letter"),
        Queue("parcels", Exchange("post", type="direct"), routing_key="parcel"),
        Queue("eu", Exchange("news", type="topic"), routing_key="news.eu.#"),
        Queue("us", Exchange("news", type="topic"), routing_key="news.us.*"),
    ],
    result_extended=False,
)
influx = celery_influx.install(app)
# Tasks of this app hold Celery's results, which hang where they are collected inside of redis-py's
# lock: see tests/conftest.py.
gc.disable()


class Broken(Exception):
    """What a task of ours raises."""

    def __json__(self) -> str:
        """As a result. Celery 5.6 encodes also those that are ignored."""
        return str(self)


@app.task(name="states.succeed")
def succeed(value: Any = 1) -> Any:
    """Give back what was given."""
    return value


@app.task(name="states.fail")
def fail() -> None:
    """Raise."""
    raise Broken("no")


@app.task(name="states.hammer", soft_time_limit=0.5)
def hammer() -> None:
    """Send points until the time is up: nearly always it is up inside of ``send_data``.

    Each takes long to encode, and so they are too few to push this task's own from the queue.
    """
    fields = {"f": 1, **{f"none{number}": None for number in range(200)}}
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        influx.send_data({"measurement": "hammer", "fields": fields})


@app.task(name="states.give_error", ignore_result=True)
def give_error() -> Exception:
    """Succeed, with an exception as the result."""
    return Broken("a value, not raised")


@app.task(name="states.retry", bind=True, max_retries=2)
def retry(self: Task) -> str:
    """Succeed at the third run."""
    if self.request.retries < 2:
        raise self.retry(countdown=0.1, exc=Broken("again"))
    return "at last"


@app.task(name="states.retry_bare", bind=True, max_retries=1)
def retry_bare(self: Task) -> str:
    """Succeed at the second run, and give no reason."""
    if self.request.retries < 1:
        raise self.retry(countdown=0.1)
    return "at last"


@app.task(
    name="states.auto",
    autoretry_for=(Broken,),
    max_retries=1,
    retry_backoff=False,
    default_retry_delay=0.1,
)
def auto() -> None:
    """Fail twice: one retry, then the failure."""
    raise Broken("always")


@app.task(name="states.ignored")
def ignored() -> None:
    """End without a result."""
    raise Ignore


@app.task(name="states.rejected", acks_late=True)
def rejected() -> None:
    """Refuse the message."""
    raise Reject("not for me", requeue=False)


@app.task(name="states.left_out", influx=False)
def left_out() -> str:
    """Wants no point."""
    return "done"


@app.task(name="states.block", ignore_result=True)
def block(seconds: float) -> None:
    """Keep one process or thread of the pool busy."""
    time.sleep(seconds)


@app.task(name="states.note", bind=True)
def note(self: Task, *_: Any) -> None:
    """Write down when this run began."""
    store().rpush(f"began {self.request.id}", repr(time.time()))


@app.task(name="states.again", bind=True, max_retries=2)
def again(self: Task, countdown: float) -> None:
    """Write down when each run began, and the ETA of the one after it."""
    store().rpush(f"began {self.request.id}", repr(time.time()))
    if self.request.retries < 2:
        store().rpush(f"eta {self.request.id}", repr(time.time() + countdown))
        raise self.retry(countdown=countdown)


@app.task(name="states.forward", bind=True, max_retries=1)
def forward(self: Task, countdown: float) -> str:
    """In its second run send another task, and hand on its own headers, as some people do."""
    if self.request.retries < 1:
        raise self.retry(countdown=countdown)
    store().rpush("forwarded", repr(time.time()))
    sent = note.apply_async(headers=self.request.headers)
    return str(sent.id)


@app.task(name="states.pause_and_note", bind=True)
def pause_and_note(self: Task, seconds: float, *_: Any) -> None:
    """Write down when this run began and ended."""
    store().rpush(f"began {self.request.id}", repr(time.time()))
    time.sleep(seconds)
    store().rpush(f"ended {self.request.id}", repr(time.time()))


@app.task(name="states.route")
def route(exchange: str, key: str) -> str:
    """Send a task by an exchange that only the worker's app knows."""
    queues = list(app.amqp.queues.values())
    sent = succeed.apply_async(exchange=exchange, routing_key=key, declare=queues)
    return str(sent.id)


@app.task(name="states.workflow")
def workflow() -> dict[str, Any]:
    """Start a chain of three, a group, and a chord; the ids of what they are made of."""
    steps = [pause_and_note.si(0.1) for _ in range(3)]
    links = chain(*steps)
    links.freeze()
    last = links.apply_async()
    ids = [last.id, last.parent.id, last.parent.parent.id][::-1]
    heads = [pause_and_note.si(0.1) for _ in range(2)]
    body = chord(heads, note.s()).apply_async()
    members = group(note.si() for _ in range(2)).apply_async()
    return {
        "chain": ids,
        "heads": [each.id for each in body.parent.results],
        "body": body.id,
        "group": [each.id for each in members.results],
    }


@celery_influx.timed("above", tags={"kind": "demo"})
@app.task(name="states.timed_above", bind=True)
def timed_above(self: Task, number: int) -> list[Any]:
    """A timer above a bound task."""
    return [self.request.id, number]


@app.task(name="states.timed_below", bind=True)
@celery_influx.timed
def timed_below(self: Task, number: int) -> list[Any]:
    """A timer below a bound task."""
    with celery_influx.timed("inner"):
        return [self.request.id, number]


@shared_task(name="states.timed_shared")
@celery_influx.timed("shared")
def timed_shared() -> None:
    """A timer below a shared task."""
    raise Broken("shared")
