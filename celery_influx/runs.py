"""What runs in which pool child, as the worker knows it: so that a killed run has its point, too.

A child says when a run starts, and its end goes with the run's point. Of a run whose child died
without that, the worker writes the point, as soon as two things are known: that nothing more
comes from the child, and what Celery made of the run's message.
"""

from __future__ import annotations

import logging
import marshal
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from celery_influx.task_points import Facts

logger = logging.getLogger(__name__)

#: Celery's name for what happens to a run whose child died.
LOST = "WorkerLostError"


def start_frame(pid: int, run_id: str | None, began: int, facts: Facts, goes_back: bool) -> bytes:
    """A child's word that a run starts: its task's id, the time in ns, and what its point has.

    ``goes_back``: if the worker ends before the run does, the queue gives it out again.
    """
    values = pid, run_id, began, facts, goes_back
    try:
        return marshal.dumps(values)
    except ValueError:  # a subclass of str, for instance
        return marshal.dumps(_plain(values))


def verdict_frame(pid: int, run_id: str, state: str, exception: str | None, facts: Facts) -> bytes:
    """The worker's word on a run in the child ``pid``, with what is known of one never started."""
    return marshal.dumps(_plain((pid, run_id, time.time_ns(), state, exception, facts)))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value if value is None or isinstance(value, int) else str.__str__(str(value))


#: A run as Celery's request knows it: pid, task's id, retries. The next try is another one.
_Name = tuple[int, str, int]


class _Run:
    """One run of a task.

    ``ended``: its point is written; ``seen``: when its child last lived, and ``died``: when that
    died, as near as is known; in ns.
    """

    # Here, for they cost time where each run has its own.
    ended = False
    died = 0
    stopped = 0
    verdict: tuple[str, str | None] | None = None

    def __init__(self, pid: int, run_id: str, began: int, facts: Facts, goes_back: bool) -> None:
        self.pid = pid
        self.id = run_id
        self.began = began
        self.seen = time.time_ns()
        self.facts = facts
        self.goes_back = goes_back

    @property
    def name(self) -> _Name:
        return self.pid, self.id, self.facts[1]


class _Verdict(NamedTuple):
    """What Celery made of a task that has not started; ``at``: when, in ns."""

    at: int
    state: str
    exception: str | None
    facts: Facts


class Runs:
    """The last run of each child. Only the thread that reads the relay's pipe may use it.

    Args:
        write: Called with the facts of a run that was killed, its state, exception and runtime in
            ns (``None``: it never started); it makes the point.
        patience: Longest that Celery may take to find that a child and its run are lost, in
            seconds. It does so at once; with a broker that is not asynchronous, after its
            ``worker_lost_wait``.
        gone: Whether the child of that pid has ended. It must leave it to the pool to wait for it.
    """

    #: Seconds from one look at the children to the next.
    INTERVAL = 0.05
    #: Dead children whose run is remembered, for what Celery may still say of it.
    MOST_DEAD = 1_000
    #: Runs remembered after their child has started the next one.
    MOST_OVER = 1_000

    def __init__(
        self,
        write: Callable[[Facts, str, str | None, int | None], None],
        patience: float = 15.0,
        gone: Callable[[int], bool] | None = None,
    ) -> None:
        self._write = write
        self._patience = patience
        self._gone = gone or has_ended
        self._living: dict[int, _Run] = {}
        self._dead: dict[int, _Run] = {}
        self._open: dict[int, _Run] = {}  # of the dead, those that have no point yet
        self._early: dict[_Name, _Verdict] = {}  # on tasks that a child has, and starts or does not
        self._over: deque[_Name] = deque(maxlen=self.MOST_OVER)  # before their children's last one
        self._found: dict[int, int] = {}  # pid → when it was found dead; perhaps not all is read
        self._looked = 0.0

    # -- what comes by the pipe ------------------------------------------------------------------

    def started(self, frame: bytes) -> None:
        """Take a ``start_frame``. It may come twice."""
        run = _Run(*marshal.loads(frame))  # noqa: S302 - by our own children
        last = self._living.get(run.pid)
        if last and last.began == run.began:
            return
        # A task that starts once more shows what became of its run in a child that died, found
        # dead by now or not: the pool or the queue gave it out again. In one that lives, both run.
        same = []
        for runs in (self._open, self._living):
            for before in runs.values():
                if before.id == run.id and before.pid != run.pid and not before.verdict:
                    same.append(before)  # noqa: PERF401 - a call more, for each run there is
        for before in same:
            if before.died or self._gone(before.pid):
                self._judge(before, "RETRY", LOST)
        if last:
            # Its end did not come; or it is of a child that died, and that had the same pid.
            if not last.ended:
                self._give_up(last)
            self._over.append(last.name)
        if self._early:
            early = self._early.pop(run.name, None)
            if early:
                run.verdict = early.state, early.exception
            self._pass_over(run.pid)
        self._living[run.pid] = run

    def ended(self, pid: int, began: int) -> bool:
        """A run in this child has ended; whether the point that came with it is its first."""
        run = self._living.get(pid)
        if run is None or run.began != began:
            return True  # its start did not come
        first, run.ended = not run.ended, True
        return first

    def judged(self, frame: bytes) -> None:
        """Take a ``verdict_frame``."""
        pid, run_id, at, state, exception, facts = marshal.loads(frame)  # noqa: S302
        name = pid, run_id, facts[1]
        run = self._find(name)
        if run:
            # What is killed on purpose has had its time by now, however long it takes to die.
            run.stopped = min(run.died or at, at)
            self._judge(run, state, exception)
        elif not pid:
            self._point(facts, state, exception, None)  # no child has had it
        elif name not in self._over:
            # This is the only word of the task: its body never starts, or its start comes yet.
            self._early[name] = _Verdict(at, state, exception, facts)
            other = self._living.get(pid)
            if other and not other.ended:  # the child has gone on
                self._pass_over(pid)

    def _find(self, name: _Name) -> _Run | None:
        pid = name[0]
        for runs in (self._living, self._dead):
            run = runs.get(pid)
            if run and run.name == name:
                return run
        # The pool may not have seen which child had taken it; nor may we, that it is dead. One that
        # was given out again, or has its point, comes last; not at all where the child is known.
        lost = [
            run
            for run in (*self._dead.values(), *self._living.values())
            if run.name[1:] == name[1:] and not (pid and run.ended)
        ]
        lost.sort(key=lambda run: (run.ended, bool(run.verdict)))
        return next((run for run in lost if run.died or self._gone(run.pid)), None)

    # -- children that die -----------------------------------------------------------------------

    @property
    def wait(self) -> float | None:
        """Seconds after which ``look`` wants to be called again; None: not before more comes."""
        waits = self._found or self._open or self._early
        if waits or not all(run.ended for run in self._living.values()):
            return self.INTERVAL
        return None

    def look(self) -> None:
        """See which children have died. What they wrote before is in the pipe by now."""
        now = time.monotonic()
        if now - self._looked < self.INTERVAL:
            return
        self._looked = now
        for pid in (*self._living, *(name[0] for name in self._early)):
            if pid in self._found:
                continue
            run, at = self._living.get(pid), time.time_ns()
            if self._gone(pid):
                # In a busy worker this thread waits its turn: the last look may be long ago.
                self._found[pid] = (run.seen + at) // 2 if run else at
            elif run:
                run.seen = at
        overdue = time.time_ns() - int(self._patience * 1e9)
        for name, verdict in list(self._early.items()):
            if verdict.at < overdue:
                self._pass_over(name[0])
        for run in list(self._open.values()):
            if run.died < overdue:
                self._settle(run, "FAILURE", LOST)

    def bury(self) -> None:
        """All has been read that was in the pipe at the last ``look``."""
        for pid, died in self._found.items():
            self._pass_over(pid)
            run = self._living.pop(pid, None)
            if run is None:
                continue
            run.died = died
            self._dead[pid] = run
            if not run.ended:
                self._open[pid] = run
                if run.verdict:
                    self._settle(run, *run.verdict)
        self._found.clear()
        while len(self._dead) > self.MOST_DEAD:
            self._give_up(self._dead.pop(next(iter(self._dead))))

    def close(self) -> None:
        """The worker ends, and so have its children."""
        # Celery has not come to a verdict on these, nor to acknowledging their messages late.
        for run in (*self._open.values(), *self._living.values()):
            self._give_up(run, "RETRY" if run.goes_back else "FAILURE")
        for pid in {name[0] for name in self._early}:
            self._pass_over(pid)
        self._living.clear()
        self._dead.clear()
        self._found.clear()

    def _pass_over(self, pid: int) -> None:
        """The child's tasks on which there is a verdict, and that have not started, never will."""
        for name in [name for name in self._early if name[0] == pid]:
            verdict = self._early.pop(name)
            self._over.append(name)  # Celery may say so twice
            self._point(verdict.facts, verdict.state, verdict.exception, None)

    def _judge(self, run: _Run, state: str, exception: str | None) -> None:
        run.verdict = (state, exception)
        if run.died and not run.ended:
            self._settle(run, state, exception)

    def _give_up(self, run: _Run, state: str = "FAILURE") -> None:
        if not run.ended:
            run.died = run.died or time.time_ns()
            self._settle(run, *(run.verdict or (state, LOST)))

    def _settle(self, run: _Run, state: str, exception: str | None) -> None:
        run.ended = True
        self._open.pop(run.pid, None)
        runtime = max(0, (run.stopped or run.died) - run.began)
        self._point(run.facts, state, exception, runtime)

    def _point(self, facts: Facts, state: str, exception: str | None, runtime: int | None) -> None:
        try:
            self._write(facts, state, exception, runtime)
        except Exception:
            # With `influx_strict`, for instance. The other runs must not suffer from it.
            logger.exception("the point of a killed run of %s could not be written", facts[0])


def has_ended(pid: int) -> bool:
    """Whether this process's child ``pid`` has ended; its pool may have waited for it or not."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
