"""A run of a task under way in this process: what is known of it, and its clocks."""

from __future__ import annotations

import time
from typing import Any

from celery_influx.speedups import extension
from celery_influx.task_points import Facts


class Run:
    """A run under way.

    Attributes:
        influx: Whose it is.
        id: The task's.
        facts: What its point has so far.
        began: ns of the wall when it started; with its process's pid it names the run.
        clock: ns of the clock when its body started; 0: it has not, or nobody knows when.
        cpu_clock: ns of its thread's CPU time at that moment.
        is_eager: It is no message's: it runs where it was called.
        over: Its point is written, or it has none.
        request: Celery's, of the task.
    """

    # Here, for they cost time where each run has its own.
    clock = cpu_clock = 0
    is_eager = over = False
    request: Any = None

    def __init__(self, influx: Any, task_id: str, facts: Facts, began: int) -> None:
        self.influx = influx
        self.id = task_id
        self.facts = facts
        self.began = began

    def start(self) -> None:
        """Its body starts now."""
        self.cpu_clock = time.thread_time_ns()
        self.clock = time.perf_counter_ns()

    def stop(self) -> tuple[int | None, int | None]:
        """How long that is ago in ns, and how much of it this thread used of a CPU."""
        if not self.clock:
            return None, None
        return time.perf_counter_ns() - self.clock, time.thread_time_ns() - self.cpu_clock


#: As quick as can be here. Both are held to the same tests.
make_run: type[Run] = extension.Run if extension else Run
