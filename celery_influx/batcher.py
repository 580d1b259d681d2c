"""The one thread per database: wait for lines, take a payload's worth, deliver; drain at last."""

from __future__ import annotations

import contextlib
import logging
import operator
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from celery_influx.buffer import Buffer
from celery_influx.counters import DROPPED
from celery_influx.delivery import Delivery
from celery_influx.report import Report

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def is_green() -> bool:
    """Whether threads are greenlets here: gevent and eventlet replace ``time.sleep``, too."""
    return time.sleep.__module__ != "time"


def _held() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _wake(sleeper: threading.Lock) -> None:
    """Let who waits for it go on, or the next who would wait."""
    with contextlib.suppress(RuntimeError):  # it is awake
        sleeper.release()


def _sleep(sleeper: threading.Lock, timeout: float) -> None:
    sleeper.acquire(timeout=timeout)


class Batcher:
    """Empties ``buffer`` into ``delivery``.

    Woken by count or bytes (the writer calls ``wake``), or by time (``flush_interval``), it
    sends until nothing waits: a burst is not held back for the next interval.

    Args:
        name: The database's name, for the thread and the log.
        buffer: Where the lines wait.
        delivery: Where they go.
        counters: This process's row for the database.
        report: Where failures are said.
        batch_size: Most lines in one payload.
        flush_interval: Longest time a line waits, in seconds.
        clock: Seconds; with ``sleep``, for tests of long outages.
        sleep: Waits until the lock is released, so many seconds at most.

    Attributes:
        owner: Lives as long as the thread does.
    """

    #: Seconds that `close` has for what other threads send while it closes.
    AFTERWARDS = 0.25
    #: Seconds of work after which the other greenlets get a turn, where threads are greenlets.
    TURN = 0.001

    def __init__(
        self,
        name: str,
        buffer: Buffer,
        delivery: Delivery,
        counters: memoryview,
        report: Report,
        *,
        batch_size: int,
        flush_interval: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[threading.Lock, float], object] = _sleep,
    ) -> None:
        self.owner: object = None
        self._name = name
        self._buffer = buffer
        self._delivery = delivery
        self._counters = counters
        self._report = report
        self._batch_size = batch_size
        self._flush_interval = flush_interval
        self._clock = clock
        self._sleep = sleep
        # Not an Event or a Condition, for these have a lock inside: see `Buffer`. Whoever waits
        # acquires a lock for the second time, and is woken by its release.
        self._wanted = False
        self._hurried = False  # somebody waits for what is to be tried again
        self._doze = _held()
        self._flushes: list[threading.Lock] = []
        # Lines taken from the buffer whose fate is known, and of these, the ones that did not go
        # out, and the ones that are on disk. Earlier batchers are done with theirs.
        self._settled = buffer.taken, 0, 0
        self._settled_before = self._settled  # close was called
        self._in_hand: list[list[bytes]] = []  # taken, and not yet handed to `delivery`
        self._green = is_green()
        self._turn = 0.0  # when the others had theirs
        self._deadline: float | None = None  # set by close: when to stop, however much waits
        self._is_left = False  # to close the transport itself, for close has given up
        self._last = 0  # and the line to stop at, which waited last when it was called
        self._thread = threading.Thread(target=self._run, name=f"celery_influx {name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Send what waits, now. Cheap to call again."""
        if not self._wanted:
            self._wanted = True
            _wake(self._doze)

    def flush(self, timeout: float) -> bool:
        """Send all that waits now; whether all of it went out within ``timeout`` seconds."""
        buffer = self._buffer
        deadline = time.monotonic() + timeout
        target = buffer.put_lines
        failures = buffer.dropped + sum(self._settled[1:])
        self._hurried = self._wanted = True
        _wake(self._doze)
        progress = _held()
        self._flushes.append(progress)
        try:
            while self._settled[0] + buffer.dropped < target:
                now = time.monotonic()
                left = deadline - now
                closed = self._deadline is not None and now >= self._deadline
                if left <= 0 or closed or not self._thread.is_alive():
                    return False
                progress.acquire(timeout=min(left, threading.TIMEOUT_MAX))
        finally:
            self._flushes.remove(progress)
        return buffer.dropped + sum(self._settled[1:]) == failures

    def finish(self, deadline: float) -> None:
        """Ask the thread to send what waits until ``deadline`` (``time.monotonic``), and to end."""
        if self._deadline is None:
            self._last = self._buffer.put_lines
            self._settled_before = self._settled
            self._deadline = deadline
            self._hurried = True
        _wake(self._doze)

    def close(self, timeout: float) -> bool:
        """Send all that waits and end the thread; whether all went out in ``timeout`` seconds.

        What is still waiting then is dropped and counted. The log's last line says how many these
        are, and those that failed by now.
        """
        self.finish(time.monotonic() + timeout)
        # Where no time is given it still has to come out of its wait.
        self._thread.join(max(timeout, 0.05))
        self._is_left = self._thread.is_alive()
        if self._is_left:
            # It hangs in an attempt; being a daemon it does not hold the process up.
            logger.warning("%s: an attempt to send did not end within %.1f s", self._name, timeout)
        elif len(self._buffer):
            # Lines that came after the thread's last look; of some threads they never end.
            self._last = sys.maxsize
            self._deadline = min(self._deadline or 0, time.monotonic() + self.AFTERWARDS)
            self._drain()
            self._delivery.end()
            self._settle()
        hanging = self._buffer.taken - self._settled[0]
        kept_of_it = kept = dropped = 0
        if self._delivery.can_keep(self.AFTERWARDS):
            kept_of_it = self._delivery.keep_attempt()
            kept, dropped = self._keep()
        dropped += self._buffer.clear()
        self._counters[DROPPED] += dropped
        self._wake_flushes()
        _, failed, spooled = map(operator.sub, self._settled, self._settled_before)
        fates = {
            "dropped": dropped,
            "in attempts that failed": failed,
            "in an attempt that has not ended": hanging - kept_of_it,
            "kept on disk": spooled + kept_of_it + kept,
        }
        unsent = sum(fates.values())
        if unsent:
            logger.warning(
                "%s: %d lines could not be sent within %.1f s at the end: %s",
                self._name,
                unsent,
                timeout,
                ", ".join(f"{count} {fate}" for fate, count in fates.items() if count),
            )
        if self.hangs():
            return False  # the thread closes the transport, should it ever come back
        self._close_transport()
        return not unsent

    def _keep(self) -> tuple[int, int]:
        """Have on disk what still waits; how many lines are, and how many could not be."""
        delivery = self._delivery
        kept = 0
        while len(self._buffer):
            lines, too_long = self._buffer.take(self._batch_size, delivery.max_bytes)
            if too_long:
                delivery.reject(too_long)
            if lines and not delivery.keep(lines):
                return kept, len(lines)
            kept += len(lines)
        return kept, 0

    def hangs(self) -> bool:
        """After ``close``: whether the thread is still in an attempt, and so in the transport."""
        return self._thread.is_alive()

    def _is_over(self) -> bool:
        if self._deadline is None:
            return False
        delivery = self._delivery
        if not delivery.held and self._settled[0] + self._buffer.dropped >= self._last:
            return True
        left = self._deadline - time.monotonic()
        # There is no use in a wait for somebody who is away, or for what comes too late.
        waits = delivery.wait > 0 and not self._hurried
        return left <= 0 or (waits and (delivery.is_away or delivery.wait > left))

    def _run(self) -> None:
        self._step(self._delivery.open)
        rest = self._flush_interval
        while self._deadline is None:
            self._sleep(self._doze, rest)
            self._wanted = False
            self._drain()
            rest = self._catch_up()
        self._drain()  # for the end may have come before the first wait
        self._delivery.end()
        self._settle()
        if self._is_left:
            self._close_transport()

    def _close_transport(self) -> None:
        try:
            self._delivery.close()
        except Exception:  # noqa: BLE001 - nothing is lost by it
            self._report.warn("close", "%s: closing failed", self._name, exc_info=True)

    def _drain(self) -> None:
        """Send until nothing waits; in the end, until all is out that waited at ``close``."""
        more = True
        waiting = self._buffer.put_lines
        while more and not self._is_over():
            before = self._buffer.taken
            is_held = bool(self._delivery.held)
            if (
                self._delivery.is_behind
                and not is_held
                and before + self._buffer.dropped >= waiting
            ):
                return  # what has come since has time; else what is on disk never had its turn
            self._step(self._retry if is_held else self._deliver_next)
            more = is_held or self._buffer.taken > before

    def _catch_up(self) -> float:
        """Send what is in the spool while no line has waited for long; seconds to rest then."""
        delivery = self._delivery
        until = self._clock() + self._flush_interval
        left = self._flush_interval
        while left > 0 and self._deadline is None and not self._wanted:
            if delivery.wait or not self._step(delivery.catch_up):
                return min(left, delivery.wait or left)
            while delivery.held and self._deadline is None:
                self._step(self._retry)  # the server has found bad lines in it
            left = until - self._clock()
        return 0.0

    def _step(self, work: Callable[[], _T]) -> _T | None:
        """Do it, and whatever comes of it, account for it and go on."""
        done = None
        try:
            done = work()
        except BaseException:  # noqa: BLE001 - a thread that dies takes every later point along
            lists, self._in_hand = self._in_hand, []
            self._delivery.give_up(lists)
            self._report.warn(
                "batcher", "%s: sending failed unexpectedly", self._name, exc_info=True
            )
        self._settle()
        self._give_way()
        return done

    def _retry(self) -> None:
        self._await_next_attempt()
        if not self._is_over():
            self._delivery.retry()

    def _deliver_next(self) -> None:
        """Take the next lines, and deliver them."""
        delivery, lists = self._delivery, self._in_hand
        max_bytes = delivery.max_bytes
        batch_size = min(self._batch_size, delivery.most_lines)
        for _ in range(delivery.burst):
            lines, too_long = self._buffer.take(batch_size, max_bytes)
            if too_long:
                delivery.reject(too_long)
            if not lines:
                break
            lists.append(lines)
        self._give_way()  # taking 5,000 lines takes 2 ms; sending them, as many again
        if lists:
            given = tuple(lists)
            lists.clear()
            if self._hurried and delivery.spools:
                delivery.hurry(at_once=self._deadline is not None)
            self._hurried = False
            delivery.deliver(*given)

    def _await_next_attempt(self) -> None:
        """Until it is due, or must be now, or no time is left."""
        delivery = self._delivery
        while delivery.wait and not self._is_over():
            if self._hurried:
                self._hurried = False
                delivery.hurry(at_once=self._deadline is not None)
                continue
            self._wanted = True  # so that nobody wakes it for the sake of the buffer
            self._sleep(self._doze, delivery.wait)
        self._wanted = False
        if len(self._buffer):
            self._wanted = True  # who put it may have wanted to

    def _settle(self) -> None:
        delivery = self._delivery
        self._settled = self._buffer.taken - delivery.undecided, delivery.failed, delivery.spooled
        self._wake_flushes()

    def _wake_flushes(self) -> None:
        for progress in tuple(self._flushes):
            _wake(progress)

    def _give_way(self) -> None:
        """Among greenlets: let the others run, which nothing else does while UDP takes it all."""
        if self._green and time.monotonic() - self._turn > self.TURN:
            time.sleep(0.0001)  # gevent's sleep(0) passes over timers for 5 ms and more
            self._turn = time.monotonic()
