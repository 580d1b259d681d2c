"""An ordinary run of a task at its start and at its end, each in as few calls as can be.

Ordinary is a run that is no retry, has no ETA, came by the default exchange and succeeds, of a task
that had one before. What is done for it stands here in a row; for any other, and for all that is
out of the ordinary, ``signals`` does the same step by step, and nothing is done here before that.
The extension has the same two in C.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import Celery, Task

from celery_influx.task_points import quick_run_line
from celery_influx.under_way import Run


def task_init(
    runs: dict[int, Run],
    slow: Callable[[str, Any], None],
    tasks: dict[int, Task[Any, Any]],
    app: Celery,
    go_on: Callable[[str, Any], None],
    passing: tuple[type[Exception], ...],
) -> Callable[[str, Any], None]:
    """A loader's ``on_task_init``.

    Args:
        runs: Runs under way, by the identity of their requests.
        slow: Does it for any run, and ends what was cut short here.
        tasks: Those of ``app`` that had a run, by identity.
        app: Who has the plugin.
        go_on: What was the loader's; to be called afterwards, as ``slow`` does.
        passing: What a signal's handler may raise in here that is the task's own.
    """
    time_ns, thread_time_ns, perf_counter_ns = (
        time.time_ns,
        time.thread_time_ns,
        time.perf_counter_ns,
    )

    def on_task_init(task_id: str, task: Any) -> None:
        begun = False
        try:
            # `request_stack.top`, where Celery keeps it: that is not public, so it is only read.
            local = task.request_stack._local  # noqa: SLF001
            request = local.__storage__[local.__ident_func__()]["stack"][-1]
            said = request.__dict__
            header = said["celery_influx"]
            digits = header[2:21] + header[22:]
            delivery = said["delivery_info"]
            influx = app.influx  # type: ignore[attr-defined]
            now = time_ns()
            wait = now - int(header[2:21])
            if (
                wait >= 0
                and influx.quick
                and tasks[id(task)] is task
                and len(header) == 41
                and header[:2] == "1;"
                and header[21] == ";"
                and digits.isascii()
                and digits.isdigit()
                and delivery["routing_key"]
                and not delivery["exchange"]
                and not said["retries"]
                and not said.get("eta")
                and not said.get("is_eager")
                and id(request) not in runs
                and getattr(task, "influx", True) is not False
            ):
                series = task.name, delivery["routing_key"], said["hostname"]
                run = Run(influx, task_id, (series, 0, wait, None, None), now)
                run.request = request
                runs[id(request)] = run
                relay = influx.quick[1]
                if relay:
                    relay.put_start(task_id, now, run.facts, bool(task.acks_late))
                run.cpu_clock = thread_time_ns()
                run.clock = perf_counter_ns()
                begun = True
        except passing:
            slow(task_id, task)
            raise
        except Exception:  # noqa: BLE001, S110 - a message may hold anything
            pass
        (go_on if begun else slow)(task_id, task)

    return on_task_init


def task_end(
    runs: dict[int, Run],
    slow: Callable[..., None],
    again: Callable[..., None],  # noqa: ARG001 - for C alone, that can call it where none comes between
    ended: Callable[[str], None],
) -> Callable[..., None]:
    """A receiver of ``task_postrun``.

    Args:
        runs: Runs under way, by the identity of their requests.
        slow: Does it for any run, and ends what was cut short here.
        again: Does what is left of it where ``slow`` was cut short.
        ended: Called with the task's id.
    """
    thread_time_ns, perf_counter_ns = time.thread_time_ns, time.perf_counter_ns

    def on_task_end(
        task: Any,
        task_id: str = "",
        state: str | None = None,
        retval: object = None,
        **_: object,
    ) -> None:
        run = None
        try:
            local = task.request_stack._local  # noqa: SLF001
            number = id(local.__storage__[local.__ident_func__()]["stack"][-1])
            run = runs[number]
            if state == "SUCCESS" and run.clock and not run.over and not run.is_eager:
                runtime = perf_counter_ns() - run.clock
                cpu = thread_time_ns() - run.cpu_clock
                database = run.influx.quick[0]
                head = database.heads[run.facts[0], state, None]
                if head:
                    stamps, unit = database.stamps, database.unit
                    line = quick_run_line(head, run.facts, runtime, cpu, stamps, unit)
                    run.influx.write_end(run, line)
        except Exception:  # noqa: BLE001, S110 - a soft time limit may come, too
            pass
        if run is None or not run.over:
            slow(task, task_id, state, retval)
            return
        runs.pop(number, None)
        ended(task_id)

    return on_task_end
