"""What becomes of a batch: attempts by the transport, what a failed one means, and the account.

A transport makes one attempt and says what came of it. Of one that says whether points arrived
(HTTP), what failed for a reason that may pass is tried again. Without a spool that is one batch at
a time: meanwhile the others wait in the buffer, which drops the oldest. With one, all that cannot
be sent goes there, and comes back when the server does and no newer line waits.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING

from celery_influx.buffer import joined
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
from celery_influx.errors import SendError, shorten
from celery_influx.parts import Parts
from celery_influx.report import Report
from celery_influx.transports import Transport

if TYPE_CHECKING:
    from celery_influx.spool import Spool


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
    **dict.fromkeys(("301", "302", "303", "307", "308"), Fate.ACCESS),
    **dict.fromkeys(("400", "422", *_TOO_LONG), Fate.SPLIT),
    "conflict": Fate.AGAIN,
}
#: In the words by which a server says why it does not take a line: each is a cause of its own.
_REFUSALS = ("unable to parse", "field type conflict", "retention policy", "max-values-per-tag")
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

    One batch at a time: after ``deliver`` or ``catch_up``, and as long as lines are ``held``,
    ``retry`` is to be called, ``wait`` seconds later. Each call makes one attempt at most.

    Args:
        name: The database's name, for the log.
        transport: Makes the attempts.
        counters: The writer's row for this database.
        report: Where failures are said, once a minute per cause.
        retry_age: Seconds after the first failed attempt for which a batch is tried again.
        retry_tries: Most attempts of a batch that a server which is there answers with an error.
        spool: Where batches go that cannot be sent.
        spool_first: Have each batch on disk before its first attempt.
        clock: Seconds, monotonic.
        spread: A number from 0 to 1, another each time.

    Attributes:
        failed: Lines that did not go out, lost or rejected, up to now.
        spooled: Lines of ``deliver`` that went to the spool, up to now.
        most_lines: Of a payload: as many as the server does not say is too long.
        is_away: The last attempt came to nobody who could take anything.
    """

    #: Seconds: the longest wait after the first failure. After each more it is twice as long.
    FIRST_WAIT = 0.5
    #: Seconds: no attempt follows at once.
    SHORTEST_WAIT = 0.01
    #: Seconds: nor is any wait longer than this, but where the server asks for it.
    LONGEST_WAIT = 30.0
    #: Seconds: and it may not ask for more.
    LONGEST_WISH = 3_600.0
    #: Most requests by which the bad lines of one batch are looked for, and most that are too long
    #: one after the other.
    MOST_REQUESTS = 64
    #: Most searches, ended by an outage, of which it is remembered how far they were.
    MOST_SEARCHES = 100

    def __init__(
        self,
        name: str,
        transport: Transport,
        counters: memoryview,
        report: Report,
        *,
        retry_age: float = 0.0,
        retry_tries: int = 1,
        spool: Spool | None = None,
        spool_first: bool = False,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._name = name
        self._transport = transport
        self._counters = counters
        self._report = report
        self._retry_age = retry_age
        self._retry_tries = retry_tries
        self._spool = spool
        self._spool_first = spool_first
        self._is_open = False
        self._clock = clock
        self._spread = spread
        self.failed = self.spooled = 0
        self.most_lines = sys.maxsize
        self._parts = Parts()  # of the batch
        # Of the oldest batch in the spool: its first line, failures while others were taken, and
        # when it is due.
        self._head: list[bytes] = []
        self._head_failures = 0
        self._head_due = 0.0
        self._took_others = False
        # By the first line of what an outage left of a search, and is on disk: how far that was.
        self._searches: dict[bytes, tuple[int, int, int]] = {}
        self._is_kept = False  # the batch is in the spool, whatever becomes of its attempt
        # Part of a batch that was too long, in lines; None: no such batch is in hand.
        self._largest_taken: int | None = None
        # For each line of the batch that was found by halves: the cause, and the server's words.
        # Not the errors: each would keep the frames that it came through, and the answers in them.
        self._refused: list[tuple[str, str]] = []
        self._answered()
        self._begin()

    def _answered(self) -> None:
        """The server is there."""
        self._failures = 0
        self._last_failure = self._due = 0.0
        self._hurried = self._asked_to_wait = self.is_away = False

    def _begin(self, *lists: list[bytes], is_head: bool = False) -> None:
        """The next batch. Nothing has failed yet, of this one."""
        self._parts.clear()
        self._parts.add(*lists)
        self._is_head = is_head  # and stands in the spool, until it is done with
        self._size = self.held
        self._answers = 0
        self._first_failure: float | None = None
        self._repeated = False
        self._refusal = ""  # the last one

    @property
    def max_bytes(self) -> int:
        """Longest payload the transport takes now."""
        return self._transport.max_bytes

    @property
    def burst(self) -> int:
        """Most payloads that are delivered at once."""
        return self._transport.burst

    def open(self) -> None:
        """Open the spool, if there is one; first of all, and in the thread that uses it."""
        try:
            if self._spool:
                self._spool.open()
            self._is_open = True
        except Exception as error:  # noqa: BLE001 - pathlib, too, raises RuntimeError at a loop of links
            self._spool = None
            self._report.warn(
                "spool open",
                "%s: no spool, so points wait in memory only: %s; expected a 'spool_dir' in which "
                "this user may write",
                self._name,
                error,
            )

    @property
    def spools(self) -> bool:
        """Whether what cannot be sent goes to disk."""
        return self._spool is not None

    @property
    def is_behind(self) -> bool:
        """Whether batches wait in the spool."""
        return self._spool is not None and self._spool.bytes > 0

    @property
    def held(self) -> int:
        """Lines that are to be tried again."""
        return len(self._parts)

    @property
    def undecided(self) -> int:
        """Of the lines that ``deliver`` was given, those that are to be tried again."""
        return 0 if self._is_head else self.held

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
        self._begin(*lists)
        if self._transport.confirms:
            if not (self._spool and self.wait and self._put_aside()):
                if self._spool and self._spool_first:
                    self._on_disk(self._spool.hold, self._parts.lines())
                if not self.wait:  # else it is held, for there is no room on disk
                    self.retry()
            return
        try:
            self._write(*lists)
        except SendError as error:
            self._counters[ERRORS] += 1
            count = self._lose()
            self._report.warn(
                f"send {error.cause}", "%s: %s; %d lines lost", self._name, error, count
            )
        self._parts.clear()

    def catch_up(self) -> bool:
        """Make one attempt at the oldest batch in the spool; whether there was one."""
        if not self._spool or self._parts or self._head_due > self._clock():
            return False
        lines = self._spool.head()
        if lines is None:
            return False
        if lines[:1] != self._head:  # the last one was done with, or dropped, or stands elsewhere
            self._head, self._head_failures = lines[:1], 0
        self._begin(lines, is_head=True)
        if lines and lines[0] in self._searches:
            self._parts.go_on(*self._searches.pop(lines[0]))
        self.retry()
        return True

    def retry(self) -> None:
        """Make one attempt at what is left of the batch."""
        try:
            self._write(self._parts.first)
        except SendError as error:
            self._see_to(error)
        else:
            self._answered()
            self._took_others = self._took_others or not self._is_head
            self._learn_length(len(self._parts.first))
            self._parts.taken()
        requests = max(self._parts.requests, self._parts.too_long_in_a_row)
        if self._parts and requests >= self.MOST_REQUESTS:
            self._say_refused()
            count, why = self.held, f"found no end of bad lines: {self._refusal}"
            self._parts.clear()
            self._reject(count)
            self._say_rejected("no end", count, count, why)
        if not self._parts:
            self._done()

    def _done(self) -> None:
        """Nothing of the batch is left, here or in the spool."""
        self._say_refused()
        # If nothing of it was taken, as where an outage began, nothing is known.
        self.most_lines, self._largest_taken = self._largest_taken or self.most_lines, None
        if self._spool and self._is_head:
            self._is_head = False
            self._head.clear()
            self._spool.pop()
        elif self._spool and self._spool_first:
            self._on_disk(self._spool.release)

    def _learn_length(self, taken: int) -> None:
        """How many lines the server takes at once, by what it took: one long line tells nothing."""
        if self._largest_taken is not None:
            self._largest_taken = max(self._largest_taken, taken)
        elif taken >= self.most_lines:
            self.most_lines += taken // 64 + 1  # it may take more by now

    def _write(self, *lists: list[bytes]) -> None:
        """One attempt: all went out, but for what the server says it rejected."""
        payloads = [joined(lines) for lines in lists]
        count, size = sum(map(len, lists)), sum(map(len, payloads))
        rejected = min(self._transport.write(*payloads), count)
        counters = self._counters
        counters[PAYLOADS] += len(payloads)
        counters[BYTES] += size
        counters[SENT] += count - rejected
        if rejected:
            why = getattr(self._transport, "rejection", None) or "no reason given"
            self._reject(rejected)
            self._say_rejected("partial", rejected, count, why)

    def _see_to(self, error: SendError) -> None:
        """An attempt at the first part has failed."""
        fate = fate_of(error.cause)
        if fate in (Fate.AGAIN, Fate.SPLIT, Fate.FINAL):
            self._answered()
        self._counters[ERRORS] += 1
        self._counters[_COUNTERS.get(fate, ERRORS_REFUSED)] += 1
        if fate is Fate.AGAIN and not self._repeated:
            self._repeated = True  # InfluxDB has taken the rest by then, and says what it did not
            self._parts.repeated()
        elif fate in (Fate.AGAIN, Fate.SPLIT):
            self._split(error)
        elif fate is Fate.FINAL:
            self._give_up_on(error, "")
        else:
            self._hold(fate, error)

    def _hold(self, fate: Fate, error: SendError) -> None:
        """Have it tried again, if it may be."""
        self._last_failure = now = self._clock()
        if self._first_failure is None:
            self._first_failure = now
        age = now - self._first_failure
        self._failures += 1
        self._answers += fate is Fate.BUSY and not self._hurried
        self._hurried = False
        self.is_away = fate is not Fate.BUSY
        if self._is_head and self._took_others:
            self._hold_head(fate, error)
            return
        self._took_others = False  # or an outage's first attempt at the head would count
        count, delay = self.held, self._delay(fate, error.retry_after)
        if not self._spool and self._answers >= self._retry_tries:
            self._give_up_on(error, f" after {self._answers} attempts")
            self._obey(error, delay)
            return
        if self._put_aside():
            where = "and all that follow are in the spool"
        elif age >= self._retry_age:
            self._give_up_on(error, f" after {age:.0f} s" if age else "")
            self._obey(error, delay)
            return
        else:
            # Where the server asks for longer than that, it is asked once more at the end.
            delay = min(delay, self._retry_age - age)
            where = "the others wait"
        self._due = now + delay
        self._say_again(error, count, delay, where)

    def _say_again(self, error: SendError, count: int, delay: float, others: str) -> None:
        self._report.warn(
            f"send {error.cause}",
            "%s: %s; %d lines are tried again, in %.1f s; %s",
            self._name,
            error,
            count,
            delay,
            others,
        )

    def _hold_head(self, fate: Fate, error: SendError) -> None:
        """The server takes other batches, and not the oldest one in the spool: they do not wait."""
        self._took_others = False
        self._head_failures += 1
        self._failures = self._head_failures
        delay = self._delay(fate, error.retry_after)
        self._answered()
        if self._head_failures >= self._retry_tries:
            self._give_up_on(error, f" after {self._head_failures} attempts")
        else:
            self._head_due = self._clock() + delay
            self._say_again(error, self.held, delay, "others are taken")
            self._put_aside()
        self._obey(error, delay)

    def _obey(self, error: SendError, delay: float) -> None:
        """The server's wish is for all batches, whatever becomes of the one that it met."""
        if error.retry_after is not None:
            self._due, self._asked_to_wait = self._clock() + delay, True

    def _put_aside(self) -> bool:
        """Have what is left of the batch in the spool, and not here; whether it is."""
        if not self._spool:
            return False
        lines = self._parts.lines()
        if self._is_head and len(lines) == self._size:
            self._is_head = False  # it stays where it is
        elif self._is_head:
            if not self._on_disk(self._spool.replace, lines):
                return False
            self._is_head = False
        elif not self._is_kept:
            if not self._on_disk(self._spool.append, lines):
                return False
            self.spooled += len(lines)
        search = self._parts.search
        if lines and search:
            if len(self._searches) >= self.MOST_SEARCHES:
                self._searches.clear()  # the spool has dropped most of them
            self._searches[lines[0]] = search
        self._parts.clear()
        return True

    def _on_disk(self, change: Callable[..., None], *args: list[bytes]) -> bool:
        try:
            change(*args)
        except OSError as error:
            self._report.warn("spool write", "%s: the spool fails: %s", self._name, error)
            return False
        return True

    def _delay(self, fate: Fate, retry_after: float | None) -> float:
        """Seconds before the next attempt: random, lest all workers come at one moment."""
        self._asked_to_wait = retry_after is not None
        if fate is Fate.ACCESS:
            delay = self.LONGEST_WAIT * (1 + self._spread()) / 2
        else:
            longest = self.FIRST_WAIT * 2.0 ** min(self._failures - 1, 30)
            delay = self._spread() * min(longest, self.LONGEST_WAIT)
        return max(delay, min(retry_after or 0.0, self.LONGEST_WISH), self.SHORTEST_WAIT)

    def _split(self, error: SendError) -> None:
        """The first part is refused whole: look for what spoils it."""
        parts = self._parts
        self._refusal = str(error)
        too_long = error.cause in _TOO_LONG
        if parts.too_long() if too_long else parts.refused():
            self._reject(1)
            self._refused.append((error.cause, self._refusal))
        elif too_long:
            self._largest_taken = self._largest_taken or 0

    def _say_refused(self) -> None:
        """Name the lines of the batch that were found by halves."""
        if self._refused:
            why = shorten("; ".join(dict.fromkeys(words for _, words in self._refused)))
            self._say_rejected(self._refused[-1][0], len(self._refused), self._size, why)
            self._refused.clear()

    def _reject(self, rejected: int) -> None:
        self._counters[REJECTED] += rejected
        self.failed += rejected

    def _say_rejected(self, cause: str, rejected: int, count: int, why: str) -> None:
        known = next((words for words in _REFUSALS if words in why), "")
        self._report.warn(
            f"rejected {cause} {known}",
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
            self._lose(),
            after,
        )

    def _lose(self) -> int:
        count = 0 if self._is_kept else self.held
        self._parts.clear()
        self._answered()  # as far as the next one is concerned
        self._counters[LOST] += count
        self.failed += count
        return count

    def give_up(self, lists: Iterable[list[bytes]]) -> None:
        """Something failed that nobody foresaw: count as lost what is held, and ``lists``."""
        self._counters[ERRORS] += 1
        self._parts.add(*lists)
        self._lose()
        self._done()

    def end(self) -> None:
        """No more attempts: what is held goes to the spool, or is lost."""
        if self._parts and not self._put_aside():
            self._lose()
        self._done()

    def can_keep(self, timeout: float) -> bool:
        """Whether there is an open spool, and no other thread that hangs at its disk."""
        return self._is_open and self._spool is not None and self._spool.is_free(timeout)

    def keep(self, lines: list[bytes]) -> bool:
        """At the end: have ``lines`` in the spool; whether they are."""
        return self._spool is not None and self._on_disk(self._spool.append, lines)

    def keep_attempt(self) -> int:
        """At the end, while another thread hangs in an attempt: have that batch in the spool.

        Returns:
            How many lines are there now: they are sent twice, should it succeed yet.
        """
        lines = [] if self._is_head else self._parts.lines()
        self._is_kept = bool(lines) and self.keep(lines)
        return len(lines) if self._is_kept else 0

    def reject(self, lines: int) -> None:
        """Count ``lines`` that are longer than any payload."""
        self._reject(lines)
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
        """Close the transport and the spool."""
        try:
            self._transport.close()
        finally:
            if self._spool:
                self._spool.close()
