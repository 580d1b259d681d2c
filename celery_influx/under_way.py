"""A run of a task under way in this process: what is known of it, and its clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery_influx.speedups import extension
from celery_influx.task_points import Facts


class Run:
    """A run under way, kept with its request.

    Attributes:
        influx: Whose it is.
        task, id: What runs.
        facts: What its point has so far.
        marks: Where it is kept; not beyond its end.
        began: ns of the wall when it started; with its process's pid it names the run.
        clock: ns of the clock when its body started; 0: it has not, or nobody knows when.
        is_eager: It is no message's: it runs where it was called.
        outer: The run of the same thread in the midst of which it is, if it is eager.
        over: Its point is written, or it has none.
    """

    __slots__ = (
        "_cpu_clock",
        "began",
        "clock",
        "facts",
        "id",
        "influx",
        "is_eager",
        "marks",
        "outer",
        "over",
        "task",
    )

    def __init__(
        self,
        influx: Any,
        task: Any,
        task_id: str | None,
        facts: Facts,
        marks: dict[str, Any],
        began: int,
    ) -> None:
        self.influx = influx
        self.task = task
        self.id = task_id
        self.facts = facts
        self.marks = marks
        self.began = began
        self.clock = self._cpu_clock = 0
        self.is_eager = self.over = False
        self.outer: Run | None = None

    def start(self) -> None:
        """Its body starts now."""
        self._cpu_clock = time.thread_time_ns()
        self.clock = time.perf_counter_ns()

    def stop(self) -> tuple[int | None, int | None]:
        """How long that is ago in ns, and how much of it this thread used of a CPU."""
        if not self.clock:
            return None, None
        return time.perf_counter_ns() - self.clock, time.thread_time_ns() - self._cpu_clock


#: As quick as can be here. Both are held to the same tests.
make_run: type[Run] = extension.Run if extension else Run
#: The run of an ordinary message, kept in its request; ``None`` of any other, and without the
#: extension of all. Of influx, task, its id and name, and the request's dict.
ordinary_run: Callable[[Any, Any, str, str, dict[str, Any]], Run | None] = (
    extension.ordinary_run if extension else lambda *_: None
)
