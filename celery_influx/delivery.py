"""What becomes of a batch: attempts by the transport, what a failed one means, and the account.

A transport makes one attempt and says what came of it. Of one that says whether points arrived
(HTTP), what failed for a reason that may pass is tried again, here, one batch at a time: meanwhile
the others wait in the buffer, which drops the oldest.
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto

from celery_influx.counters import (
    BYTES,
    ERRORS,
    ERRORS_ACCESS,
    ERRORS_BUSY,
    ERRORS_NO_ANSWER,
    ERRORS_REFUSED,
    LOST,
    PAYLOADS,
    REJECTED,
    SENT,
)
from celery_influx.errors import SendError
from celery_influx.report import Report
from celery_influx.transports import Transport


class Fate(Enum):
    """What a failed attempt means."""

    NO_ANSWER = auto()  # nobody there, or not in time
    BUSY = auto()  # not now, says the server; it says so, too, to what it never takes
    ACCESS = auto()  # not before an operator has mended something
    AGAIN = auto()  # once more and at once: InfluxDB takes the rest then
    SPLIT = auto()  # one line, or the number of them, spoils it for all
    FINAL = auto()  # never


_TOO_LONG = ("413", "EMSGSIZE")
#: By the cause of a ``SendError``: an HTTP status, or a word of the transport's.
_FATES = {
    **dict.fromkeys(("408", "425", "429"), Fate.BUSY),
    **dict.fromkeys(("401", "403", "404", "tls", "secret"), Fate.ACCESS),
    **dict.fromkeys(("400", "422", *_TOO_LONG), Fate.SPLIT),
    "conflict": Fate.AGAIN,
}
_COUNTERS = {
    Fate.NO_ANSWER: ERRORS_NO_ANSWER,
    Fate.BUSY: ERRORS_BUSY,
    Fate.ACCESS: ERRORS_ACCESS,
}


def fate_of(cause: str) -> Fate:
    """What a ``SendError`` of a transport that says whether points arrived means."""
    if not cause.isdecimal():
        return _FATES.get(cause, Fate.NO_ANSWER)
    return _FATES.get(cause, Fate.BUSY if cause[0] == "5" else Fate.FINAL)


class Delivery:
    """Hands batches to ``transport`` and counts what came of them in ``counters``.

    One batch at a time: after ``deliver``, and as long as lines are ``held``, ``retry`` is to be
    called, ``wait`` seconds later. Each of these calls makes one attempt.

    Args:
        name: The database's name, for the log.
        transport: Makes the attempts.
        counters: The writer's row for this database.
        report: Where failures are said, once a minute per cause.
        retry_age: Seconds after the first failed attempt for which a batch is tried again.
        retry_tries: Most attempts of a batch that a server which is there answers with an error.
        clock: Seconds, monotonic.
        spread: A number from 0 to 1, another each time.

    Attributes:
        failed: Lines that did not go out, lost or rejected, up to now.
        most_lines: Of a payload: as many as the server does not say is too long.
        is_away: The last attempt came to nobody who could take anything.
    """

    #: Seconds: the longest wait after the first failure. After each more it is twice as long.
    FIRST_WAIT = 0.5
    #: Seconds: no attempt follows at once.
    SHORTEST_WAIT = 0.01
    #: Seconds: nor is any wait longer than this, but where the server asks for it.
    LONGEST_WAIT = 30.0
    #: Most requests by which the bad lines of one batch are looked for.
    MOST_REQUESTS = 64

    def __init__(
        self,
        name: str,
        transport: Transport,
        counters: memoryview,
        report: Report,
        *,
        retry_age: float = 0.0,
        retry_tries: int = 1,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._name = name
        self._transport = transport
        self._counters = counters
        self._report = report
        self._retry_age = retry_age
        self._retry_tries = retry_tries
        self._clock = clock
        self._spread = spread
        self.failed = 0
        self.most_lines = sys.maxsize
        self.is_away = False
        self._parts: deque[list[bytes]] = deque()  # of the batch, in order
        self._begin()

    def _begin(self) -> None:
        """Nothing has failed yet, of this batch."""
        self._failures = self._answers = self._requests = 0
        self._first_failure = self._last_failure = self._due = 0.0
        self._hurried = False
        self._repeated = self._asked_to_wait = False
        self._halved = False  # one of the first two parts has a bad line
        self._refusal = ""

    @property
    def max_bytes(self) -> int:
        """Longest payload the transport takes now."""
        return self._transport.max_bytes

    @property
    def burst(self) -> int:
        """Most payloads that are delivered at once."""
        return self._transport.burst

    @property
    def held(self) -> int:
        """Lines that are to be tried again."""
        return sum(map(len, self._parts))

    @property
    def wait(self) -> float:
        """Seconds until the next attempt is due; 0: it is."""
        return max(0.0, self._due - self._clock())

    def hurry(self, *, at_once: bool = False) -> None:
        """Somebody waits: let the next attempt be due soon, if the server has not asked to wait.

        ``at_once``: now; else they could call this as often as they like.
        """
        if not self._asked_to_wait:
            soon = 0.0 if at_once else self._last_failure + self.FIRST_WAIT
            self._due = min(self._due, soon)
            self._hurried = True  # and so it counts for less

    def deliver(self, *lists: list[bytes]) -> None:
        """Send a batch, each list as one payload."""
        self._begin()
        self._parts.extend(lists)
        if self._transport.confirms:
            self.retry()
            return
        try:
            self._write(*lists)
        except SendError as error:
            self._counters[ERRORS] += 1
            count = self.lose()
            self._report.warn(
                f"send {error.cause}", "%s: %s; %d lines lost", self._name, error, count
            )
        self._parts.clear()

    def retry(self) -> None:
        """Make one attempt at what is left of the batch."""
        self.is_away = False
        try:
            self._write(self._parts[0])
        except SendError as error:
            self._see_to(error)
        else:
            self._parts.popleft()
            self._requests += bool(self._requests)  # from the first refusal on
            if self._halved:  # then it is the other half that is spoilt
                self._halve()
        if self._parts and self._requests >= self.MOST_REQUESTS:
            count = self.held
            self._parts.clear()
            self._reject(count, count, f"found no end of bad lines: {self._refusal}", "no end")

    def _write(self, *lists: list[bytes]) -> None:
        """One attempt: all went out, but for what the server says it rejected."""
        payloads = [b"\n".join(lines) for lines in lists]
        count, size = sum(map(len, lists)), sum(map(len, payloads))
        rejected = min(self._transport.write(*payloads), count)
        counters = self._counters
        counters[PAYLOADS] += len(payloads)
        counters[BYTES] += size
        counters[SENT] += count - rejected
        if rejected:
            self._reject(
                rejected, count, getattr(self._transport, "rejection", None) or "no reason given"
            )

    def _see_to(self, error: SendError) -> None:
        """An attempt at the first part has failed."""
        fate = fate_of(error.cause)
        self._counters[ERRORS] += 1
        self._counters[_COUNTERS.get(fate, ERRORS_REFUSED)] += 1
        if fate is Fate.AGAIN and not self._repeated:
            self._repeated = True  # InfluxDB has taken the rest by then, and says what it did not
        elif fate in (Fate.AGAIN, Fate.SPLIT):
            self._split(error)
        elif fate is Fate.FINAL:
            self._give_up_on(error, "")
        else:
            self._hold(fate, error)

    def _hold(self, fate: Fate, error: SendError) -> None:
        """Have it tried again, if it may be."""
        self._last_failure = now = self._clock()
        if not self._failures:
            self._first_failure = now
        age = now - self._first_failure
        self._failures += 1
        self._answers += fate is Fate.BUSY and not self._hurried
        self._hurried = False
        self.is_away = fate is not Fate.BUSY
        if self._answers >= self._retry_tries:
            self._give_up_on(error, f" after {self._answers} attempts")
        elif age >= self._retry_age:
            self._give_up_on(error, f" after {age:.0f} s" if age else "")
        else:
            # Where the server asks for longer than that, it is asked once more at the end.
            delay = min(self._delay(fate, error.retry_after), self._retry_age - age)
            self._due = now + delay
            self._report.warn(
                f"send {error.cause}",
                "%s: %s; %d lines are tried again, in %.1f s; the others wait",
                self._name,
                error,
                self.held,
                delay,
            )

    def _delay(self, fate: Fate, retry_after: float | None) -> float:
        """Seconds before the next attempt: random, lest all workers come at one moment."""
        self._asked_to_wait = retry_after is not None
        if fate is Fate.ACCESS:
            delay = self.LONGEST_WAIT * (1 + self._spread()) / 2
        else:
            longest = self.FIRST_WAIT * 2.0 ** min(self._failures - 1, 30)
            delay = self._spread() * min(longest, self.LONGEST_WAIT)
        return max(delay, retry_after or 0.0, self.SHORTEST_WAIT)

    def _split(self, error: SendError) -> None:
        """The first part is refused whole: look for what spoils it, by halves."""
        parts = self._parts
        self._refusal = str(error)
        too_long = error.cause in _TOO_LONG
        self._requests += not too_long  # that comes to an end by itself
        if self._halved:
            # Of the other half nothing is known; so it goes with all that comes after it.
            first, other = parts.popleft(), parts.popleft()
            rest = parts.popleft() if parts else []
            parts.extendleft(filter(None, (other + rest, first)))
            self._halved = False
        if len(parts[0]) == 1:
            parts.popleft()
            self._reject(1, 1, self._refusal)
        else:
            self._halve()
            if too_long:  # and not one of its lines: that tells nothing of the other half
                self._halved = False
                self.most_lines = min(self.most_lines, len(parts[0]))

    def _halve(self) -> None:
        """Somewhere in the first part is a bad line."""
        lines = self._parts[0]
        half = len(lines) // 2
        self._halved = bool(half)
        if half:
            self._parts.popleft()
            self._parts.extendleft((lines[half:], lines[:half]))

    def _reject(self, rejected: int, count: int, why: str, cause: str = "rejected") -> None:
        self._counters[REJECTED] += rejected
        self.failed += rejected
        self._report.warn(
            cause,
            "%s: the server rejected %d of %d lines: %s",
            self._name,
            rejected,
            count,
            why,
        )

    def _give_up_on(self, error: SendError, after: str) -> None:
        self._report.warn(
            f"given up {error.cause}",
            "%s: %s; %d lines lost%s",
            self._name,
            error,
            self.lose(),
            after,
        )

    def lose(self) -> int:
        """Give up what is held; how many lines."""
        count = self.held
        self._parts.clear()
        self._due = 0.0
        self._counters[LOST] += count
        self.failed += count
        return count

    def give_up(self, lists: Iterable[list[bytes]]) -> None:
        """Something failed that nobody foresaw: count as lost what is held, and ``lists``."""
        self._counters[ERRORS] += 1
        self._parts.extend(lists)
        self.lose()

    def reject(self, lines: int) -> None:
        """Count ``lines`` that are longer than any payload."""
        self._counters[REJECTED] += lines
        self.failed += lines
        address = self._transport.address
        self._report.warn(
            "too long",
            "%s: %d lines are longer than the %d bytes of one payload to %s, and were rejected; "
            "send shorter string fields and tags, or %s",
            self._name,
            lines,
            self.max_bytes,
            address,
            "use the transport http" if address.startswith("udp:") else "set 'batch_bytes' higher",
        )

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
