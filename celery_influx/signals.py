"""Celery's signals → celery_task points. Nothing is kept of a run after its end.

What only the worker itself knows (hard time limits, killed children) these signals do not tell:
see ``verdicts``.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

from celery import Celery, Task, current_task, signals
from celery.app.task import Context
from celery.exceptions import (
    Ignore,
    NotRegistered,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
)

from celery_influx import ordinary, tasks
from celery_influx.counters import CLAMPED
from celery_influx.plugin import Influx, at_exit, find, installed
from celery_influx.runs import LOST
from celery_influx.speedups import extension
from celery_influx.task_points import Facts
from celery_influx.under_way import Run, make_run

logger = logging.getLogger(__name__)

#: Name of the one header: "1;<ns of this publish>;<ns of the first publish>". Flat, small and
#: scalar; whoever does not know it can leave it alone, and so do we with another version's.
HEADER = "celery_influx"
#: Stands for the task's name in points of messages in which none could be read.
UNREADABLE = "(unreadable)"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def connect() -> None:
    """Connect all receivers, once per process; each looks whether the task's app has the plugin."""
    for signal, receiver in (
        (signals.before_task_publish, _on_publish),
        (signals.task_postrun, on_task_end),
        (signals.task_revoked, _on_revoked),
        (signals.task_rejected, _on_rejected),
        (signals.task_internal_error, _on_internal_error),
        (signals.import_modules, _on_child_start),
        (signals.worker_process_shutdown, _on_child_end),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"celery_influx.{receiver.__name__}")
    _find_ours()
    atexit.register(_on_exit)
    os.register_at_fork(after_in_child=_greenlets.clear)


def attach(app: Celery) -> None:
    """Have ``app``'s loader tell of each run that starts: Celery calls it right before the body.

    A receiver of ``task_prerun`` costs several times as much; and what one raises Celery swallows,
    while a soft time limit that comes in here the task has as if it had come in its body.
    """
    go_on = app.loader.on_task_init
    known: dict[int, Task[Any, Any]] = {}  # those whose runs this app records

    def on_task_init(task_id: str, task: Task[Any, Any]) -> None:
        try:
            _begin(task_id, task)
            influx = recorder(task) if id(task) not in known else None
            if influx and influx is find(app):
                known[id(task)] = task
        except SoftTimeLimitExceeded:
            with suppress(Exception):
                _begin(task_id, task)  # it has a point all the same
            raise
        except Exception:
            logger.exception("celery_influx: a run of %s has no point", task.name)
            _unrecorded(task_id, task.request)
        go_on(task_id, task)

    app.loader.on_task_init = quickest.task_init(  # type: ignore[method-assign]
        _runs, on_task_init, known, app, go_on, (SoftTimeLimitExceeded,)
    )


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
    parts = header.split(";", 3)
    if len(parts) != 3 or parts[0] != "1" or not header.isascii():
        return None
    _, last, first = parts
    if len(last) < 20 > len(first) and last.isdigit() and first.isdigit():
        return int(last), int(first)
    return None


def recorder(task: object) -> Influx | None:
    """The plugin that wants points of ``task``'s runs."""
    if not isinstance(task, Task) or getattr(task, "influx", True) is False:
        return None
    influx = find(task.app)
    return influx if influx and influx.records_tasks else None


#: Runs under way, by the identity of their requests: these are the tasks' own, to copy, to pickle
#: or to dump. A run keeps its request alive, and so keeps others from having that identity.
_runs: dict[int, Run] = {}
#: Ids of the tasks whose runs ended last.
_ended: deque[str] = deque(maxlen=100)
#: Names of tasks of which nobody told us that a run starts.
_unheard: set[str] = set()


def _begin(task_id: str, task: Task[Any, Any]) -> None:
    """Begin a run, or go on where that was cut short."""
    influx = recorder(task)
    if influx is None:
        return
    request = task.request_stack.top or task.request
    run = _runs.get(id(request))
    if run is None:
        run = _run_of(influx, task, task_id, request)
    elif run.clock:
        return
    if not run.is_eager:
        influx.start_run(run, goes_back=bool(task.acks_late))
    if influx.is_green and not run.over:
        _greenlets[id(run)] = _Greenlet(run)
    run.start()


def _run_of(influx: Influx, task: Task[Any, Any], task_id: str, request: Context) -> Run:
    """The run of any message."""
    if request.is_eager and not influx.options.eager:
        return _unrecorded(task_id, request)
    now = time.time_ns()
    wait, age = _waited(request, now)
    clamped = wait is not None and wait < 0
    wait = 0 if clamped else wait
    facts = facts_of(influx, task.name, request, request.retries, wait, age)
    run = make_run(influx, task_id, facts, now)
    run.is_eager = bool(request.is_eager)
    _keep(run, request)
    if clamped:
        influx.count(CLAMPED)
    return run


def _unrecorded(task_id: str, request: Context) -> Run:
    """A run that has no point."""
    run = make_run(None, task_id, (("", "", None), 0, None, None, None), 0)
    run.is_eager = run.over = True
    _keep(run, request)
    return run


def _keep(run: Run, request: Context) -> None:
    run.request = request
    _runs[id(request)] = run


def _begin_unheard(task_id: str, task: Task[Any, Any], **_: Any) -> None:
    if task.name in _unheard:
        _begin(task_id, task)


def _on_end(
    task: Task[Any, Any],
    task_id: str = "",
    state: str | None = None,
    retval: object = None,
    **_: Any,
) -> None:
    request = task.request_stack.top or task.request
    run = _runs.get(id(request))
    if run is None:
        if recorder(task) is None:
            return
        _begin(task_id, task)
        run = _runs[id(request)]
        run.clock = 0  # nobody knows when
        if state is not None:  # where there is none, a soft time limit may have come before
            _unheard.add(task.name)
            signals.task_prerun.connect(
                _begin_unheard, weak=False, dispatch_uid="celery_influx._begin_unheard"
            )
    cut_short = False
    try:
        if not run.over:
            _end(run, state, retval)
    except Exception:
        # `_on_end_again` may get through with it, where it is called.
        connected = any(each is _on_end_again for _, each in signals.task_postrun.receivers)
        cut_short = not run.over and (connected or quickest is not ordinary)
        raise
    finally:
        if not cut_short:
            _runs.pop(id(request), None)
            _ended.append(task_id)


def _end(run: Run, state: str | None, retval: object) -> None:
    runtime, cpu = run.stop()
    influx: Influx = run.influx
    greenlet = None
    if influx.is_green:
        cpu = None  # the thread's is that of all its greenlets
        greenlet = _greenlets.pop(id(run), None)
        if greenlet is None:
            return  # the process exits, and its point is written
    name = None
    if state != "SUCCESS":  # a task may also give an exception back, as its result
        exception = retval if isinstance(retval, BaseException) else None
        if state is None:
            exception = _raised()
            if influx.watches_runs and isinstance(exception, (SystemExit, KeyboardInterrupt)):
                return  # this child ends, and the worker knows why
            state = _STATES.get(type(exception), "FAILURE")
            if greenlet and not isinstance(exception, Exception):
                # Told apart by name, for the library need not be installed.
                kind = type(exception).__name__
                if kind == "GreenletExit":
                    greenlet.end_killed(runtime)
                    return
                if kind == "Timeout":
                    exception = TimeLimitExceeded()
        if isinstance(exception, Retry) and isinstance(exception.exc, BaseException):
            exception = exception.exc
        name = None if exception is None else type(exception).__name__
    if run.is_eager:
        run.over = True
        influx.write_run(run.facts, state, name, runtime, cpu)
    else:
        influx.end_run(run, state, name, runtime, cpu)


def guard() -> None:
    """Where tasks run in processes: let no soft time limit that comes in our receivers do harm.

    It may come wherever Python code runs, and Celery swallows what a receiver raises. So what was
    not done at a run's end is done by one more receiver, for the limit comes only once.
    """
    if quickest is ordinary:  # the extension's calls it by itself
        signals.task_postrun.connect(_on_end_again, weak=False, dispatch_uid="celery_influx._guard")
        _find_ours()


def shorten() -> None:
    """In a worker: have Celery's tracer call our receivers itself, where it has no others to tell.

    The way through its signal costs more than all that is done there. What the tracer calls is not
    public: so where it is not as we know it, it is left alone, and the signal goes its own way.
    """
    from celery.app import trace

    if getattr(trace, "send_postrun", None) == signals.task_postrun.send:
        trace.send_postrun = _send_postrun


def _send_postrun(**said: Any) -> list[Any]:
    """``task_postrun.send``. It returns what the tracer does not look at."""
    try:
        if signals.task_postrun.receivers != _ours:
            return signals.task_postrun.send(**said)
        on_task_end(**said)
    except Exception:
        logger.exception("celery_influx: at the end of a run of %s", said.get("sender"))
        with suppress(Exception):  # it is logged; a soft time limit comes but once
            _on_end_again(**said)
    return []


#: Those of the signal's receivers that are ours, as it keeps them.
_ours: list[Any] = []


def _find_ours() -> None:
    mine = on_task_end, _on_end_again
    _ours[:] = [pair for pair in signals.task_postrun.receivers if pair[1] in mine]


def _on_end_again(task: Task[Any, Any], **named: Any) -> None:
    # One that was run in place has ended in the midst of another.
    if _runs and id(task.request) in _runs:
        try:
            _on_end(task, **named)
        finally:
            _runs.pop(id(task.request), None)  # nobody comes after this


#: As quick as can be here. Both are held to the same tests.
quickest: Any = extension or ordinary
on_task_end: Callable[..., None] = quickest.task_end(_runs, _on_end, _on_end_again, _ended.append)


#: What a task says of its run by raising it.
_STATES = {Retry: "RETRY", Ignore: "IGNORED", Reject: "REJECTED"}


class _Greenlet:
    """A run in a greenlet: Celery may kill it, or end its process and say nothing of it.

    ``verdict``: state and exception, from who killed it. ``awaits_verdict``: who is still at it,
    while eventlet's greenlets end at once, and gevent's later.
    """

    __slots__ = ("_runtime", "awaits_verdict", "id", "run", "verdict")

    def __init__(self, run: Run) -> None:
        self.id = run.id
        self.run = run
        self.awaits_verdict = False
        self.verdict: tuple[str, str | None] | None = None
        self._runtime: int | None = None

    def end_killed(self, runtime: int | None) -> None:
        """Write its point, now or as soon as there is a verdict."""
        self._runtime = runtime
        if not self.awaits_verdict:
            self.end("FAILURE")

    def judge(self, verdict: tuple[str, str | None] | None) -> None:
        """Take the verdict, or none from who came to none."""
        self.verdict = verdict
        awaited, self.awaits_verdict = self.awaits_verdict, False
        if awaited and self._runtime is not None:
            self.end("FAILURE")

    def end(self, state: str) -> None:
        """Write its point; ``state`` is of one without a verdict."""
        run = self.run
        state, exception = self.verdict or (state, LOST)
        runtime = run.stop()[0] if self._runtime is None else self._runtime
        run.influx.write_run(run.facts, state, exception, runtime)


#: Runs under way in greenlets, by their requests' identity.
_greenlets: dict[int, _Greenlet] = {}


@contextmanager
def killing(task_id: str, state: str, exception: str | None) -> Iterator[None]:
    """Celery kills a task meanwhile; what its greenlet comes to if Celery gets through with it.

    From a signal's handler it may not: such a one must not block, and waits all the same.
    """
    killed = [each for each in _greenlets.values() if each.id == task_id]
    for each in killed:
        each.awaits_verdict = True
    verdict = None
    try:
        yield
        verdict = (state, exception)
    finally:
        for each in killed:
            each.judge(verdict)


def exit_first() -> None:
    """Have what is to be done at exit done before all that was registered meanwhile.

    For a restart by SIGHUP Celery has the process become another one then.
    """
    for last in (at_exit, _on_exit):
        atexit.unregister(last)
        atexit.register(last)


def _on_exit() -> None:
    """What still runs in a worker's greenlets ends with its process."""
    if not _greenlets:
        return
    from celery.worker.state import active_requests

    # Early or late, the broker gives out again what it has not heard of.
    back = {request.id for request in active_requests if not request.message.acknowledged}
    while _greenlets:
        _, lost = _greenlets.popitem()
        lost.end("RETRY" if lost.id in back else "FAILURE")


def _raised() -> BaseException | None:
    """What the task's body raised, where Celery came to no end of the run.

    That may have made Celery fail in turn, as the result could not be stored: the body's own is
    then the last that was raised through the same frame of Celery's.
    """
    raised = found = sys.exc_info()[1]
    frame = found.__traceback__.tb_frame if found and found.__traceback__ else None
    while raised:
        if raised.__traceback__ and raised.__traceback__.tb_frame is frame:
            found = raised
        raised = raised.__context__
    return found


def _on_revoked(
    sender: Any = None, request: Any = None, terminated: bool = False, **_: Any
) -> None:
    """Expired, or revoked before its start. With ``terminated`` there was a run, and has an end."""
    influx = recorder(sender)
    if influx and not terminated:
        _write_unstarted(influx, sender.name, request, "REVOKED", None, request.retries)


def _on_internal_error(
    sender: Any, task_id: str, request: dict[str, Any], exception: Exception, **_: Any
) -> None:
    """Celery failed at a task: before its run began, or when that has its point already.

    Or in between: a soft time limit has come before we heard of the end.
    """
    influx = recorder(sender)
    if not influx:
        return
    run = None
    if isinstance(exception, SoftTimeLimitExceeded):
        # One that was run in place in the midst of another may have its id, and comes last.
        found = [run for run in list(_runs.values()) if run.id == task_id]
        run = found[-1] if found else None
    if run:
        _runs.pop(id(run.request), None)
        if not run.over:
            _end(run, "FAILURE", exception)
        _ended.append(task_id)
    elif task_id not in _ended and not request.get("is_eager"):
        context = Context(request)
        _write_unstarted(influx, sender.name, context, "FAILURE", exception, context.retries)


def on_unknown(consumer: Any, message: Any, _: Exception) -> None:
    """A worker's ``consumer`` has no such task."""
    headers = message.headers or {}
    about = headers if "task" in headers else message.payload  # protocol 1
    name = about["task"]
    on_refused(consumer, message, NotRegistered(name), name, about["id"])


def _on_rejected(sender: Any = None, message: Any = None, exc: Any = None, **_: Any) -> None:
    on_refused(sender, message, exc)


def on_refused(
    consumer: Any,
    message: Any,
    error: BaseException | None,
    name: str = "",
    task_id: str | None = None,
) -> None:
    """A worker's ``consumer`` could make no task of a message. ``name``: the task's, if known."""
    influx = find(getattr(consumer, "app", None))
    if not influx or not influx.records_tasks:
        return
    headers = message.headers or {}
    if not name and headers.get("task") in consumer.app.tasks:
        name = headers["task"]
    context = Context(
        id=task_id or headers.get("id"),
        hostname=consumer.hostname,
        delivery_info=message.delivery_info,
    )
    _write_unstarted(influx, name or UNREADABLE, context, "REJECTED", error)


def _write_unstarted(
    influx: Influx,
    name: str,
    request: Any,
    state: str,
    exception: BaseException | None,
    retries: int | None = 0,
) -> None:
    facts = facts_of(influx, name, request, retries)
    influx.write_run(facts, state, None if exception is None else type(exception).__name__)


def _on_child_start(sender: Any = None, **_: Any) -> None:
    """In a pool child that was spawned, and inherits no tasks: register the helpers there, too."""
    influx = find(sender)
    if influx and os.environ.get("FORKED_BY_MULTIPROCESSING"):  # Celery's own sign of it
        tasks.register(sender, influx)
        guard()
        shorten()


def _on_child_end(**_: Any) -> None:
    for influx in installed():
        influx.leave_pool()


def _waited(request: Context, now: int) -> tuple[int | None, int | None]:
    """How long the run waited, and of a retry since the first publish, in ns; None: unknown."""
    stamps = _published(request.__dict__.get(HEADER))
    if stamps is None:
        return None, None
    last, first = stamps
    wait = now - (max(last, _eta_ns(request.eta)) if request.eta else last)
    return wait, max(0, now - first) if request.retries else None


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


def facts_of(
    influx: Influx,
    name: str,
    request: Any,
    retries: int | None,
    wait: int | None = None,
    age: int | None = None,
) -> Facts:
    """What is known of a run before its end, from Celery's context or worker's request."""
    # Eager, it runs in the middle of another, or in no worker: Celery has the machine's name for
    # it. In a worker each point has the worker's without us.
    worker = None if getattr(request, "is_eager", False) else request.hostname
    series = name, influx.queue_name(request.delivery_info or {}), worker
    ids = None
    if influx.options.task_ids:
        ids = request.id, request.root_id, request.parent_id
    return series, retries or 0, wait, age, ids
