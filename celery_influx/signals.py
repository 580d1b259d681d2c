"""Celery's signals → celery_task points. Nothing is kept of a run after its end.

What only the worker itself knows (hard time limits, killed children) is not told by these
signals; the relay's frames have kinds free for the start and the end of a run.
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from celery import Task, current_task, signals
from celery.app.task import Context
from celery.exceptions import NotRegistered, Retry

from celery_influx.counters import CLAMPED
from celery_influx.measurements import CELERY_TASK
from celery_influx.plugin import Influx, find
from celery_influx.point import Point

#: Name of the one header: "1;<ns of this publish>;<ns of the first publish>". Flat, small and
#: scalar; whoever does not know it can leave it alone, and so do we with another version's.
HEADER = "celery_influx"
_is_ours = re.compile(r"1;([0-9]{1,19});([0-9]{1,19})").fullmatch
_NS = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def connect() -> None:
    """Connect all receivers, once per process; each looks whether the task's app has the plugin."""
    for signal, receiver in (
        (signals.before_task_publish, _on_publish),
        (signals.task_prerun, _on_start),
        (signals.task_postrun, _on_end),
        (signals.task_revoked, _on_revoked),
        (signals.task_unknown, _on_unknown),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"celery_influx.{receiver.__name__}")


def _on_publish(headers: dict[str, Any] | None = None, body: object = None, **_: Any) -> None:
    """Stamp a message. Nothing here says which app publishes: so the header must harm nobody."""
    if not isinstance(headers, dict):
        return
    # Protocol 1 says it in the body.
    about = body if isinstance(body, dict) else headers
    now = first = time.time_ns()
    if about.get("retries"):
        # A retry is sent by the run before it, which knows for sure. Headers that a task hands
        # on may be another task's, and Sentry's instrumentation leaves ours out of them.
        request = current_task.request if current_task else Context()
        own = request.get(HEADER) if request.id == about.get("id") else None
        first = (_published(own) or _published(headers.get(HEADER)) or (now, now))[1]
    headers[HEADER] = f"1;{now};{first}"


def _published(header: object) -> tuple[int, int] | None:
    """The last and the first publish in ns, or None where the header is not one of ours."""
    if not isinstance(header, str):
        return None
    match = _is_ours(header)
    return (int(match[1]), int(match[2])) if match else None


def _recorder(task: object) -> Influx | None:
    """The plugin that wants points of ``task``'s runs."""
    if not isinstance(task, Task) or getattr(task, "influx", True) is False:
        return None
    influx = find(task.app)
    return influx if influx and influx.records_tasks else None


def _on_start(task: Task[Any, Any], **_: Any) -> None:
    if _recorder(task):
        task.request.__dict__["influx_start"] = (
            time.time_ns(),
            time.perf_counter(),
            time.thread_time(),
        )


def _on_end(
    task: Task[Any, Any], state: str | None = None, retval: object = None, **_: Any
) -> None:
    request = task.request
    start = request.__dict__.pop("influx_start", None)
    influx = _recorder(task)
    # Without a state no end was reached: only the worker can tell what happened.
    if state is None or start is None or influx is None or request.is_eager:
        return
    began, clock, cpu = start
    fields: dict[str, Any] = {
        "runtime": time.perf_counter() - clock,
        "cpu": None if influx.is_green else time.thread_time() - cpu,
        "retries": request.retries or 0,
    }
    _add_wait(fields, influx, request, began)
    # A task may also give an exception back, as its result.
    exception = retval if state != "SUCCESS" and isinstance(retval, BaseException) else None
    if isinstance(exception, Retry) and isinstance(exception.exc, BaseException):
        exception = exception.exc
    _write(influx, task.name, request, state, fields, exception)


def _on_revoked(
    sender: Any = None, request: Any = None, terminated: bool = False, **_: Any
) -> None:
    """Expired, or revoked before its start; with ``terminated``, its child was ended."""
    influx = _recorder(sender)
    # A terminated greenlet still comes to its own postrun.
    if influx and not (terminated and influx.is_green):
        _write(influx, sender.name, request, "REVOKED", {"retries": request.retries or 0}, None)


def _on_unknown(sender: Any = None, message: Any = None, name: str = "", **sent: Any) -> None:
    influx = find(getattr(sender, "app", None))
    if influx and influx.records_tasks:
        context = Context(
            id=sent.get("id"),
            hostname=sender.hostname,
            delivery_info=message.delivery_info,
            retries=0,
        )
        _write(influx, name, context, "REJECTED", {"retries": 0}, NotRegistered(name))


def _add_wait(fields: dict[str, Any], influx: Influx, request: Context, began: int) -> None:
    """Add ``wait``, and ``age`` of a retry, where the message tells when it was published."""
    stamps = _published(request.get(HEADER))
    if stamps is None:
        return
    last, first = stamps
    ready = max(last, _eta_ns(request.eta))
    if began < ready:
        influx.count(CLAMPED)
    fields["wait"] = max(0, began - ready) / _NS
    if fields["retries"]:
        fields["age"] = max(0, began - first) / _NS


def _eta_ns(eta: object) -> int:
    """An ETA as Celery writes it (ISO 8601) in ns; 0 where there is none that can be read."""
    try:
        when = datetime.fromisoformat(eta.replace("Z", "+00:00")) if isinstance(eta, str) else None
    except ValueError:
        when = None
    if when is None:
        return 0
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return (when - _EPOCH) // timedelta(microseconds=1) * 1_000


def _write(
    influx: Influx,
    name: str,
    request: Context,
    state: str,
    fields: dict[str, Any],
    exception: BaseException | None,
) -> None:
    if influx.options.task_ids:
        fields["id"] = request.id
        fields["root_id"] = request.root_id
        fields["parent_id"] = request.parent_id
    tags = {
        "task": name,
        "queue": influx.queue_name(request.delivery_info or {}),
        "worker": request.hostname,
        "state": state,
        "exception": type(exception).__name__ if exception is not None else None,
    }
    influx.send_data(Point(CELERY_TASK.name, fields, tags))
