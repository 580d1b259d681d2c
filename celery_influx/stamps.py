"""Timestamps that no other point of this worker has.

InfluxDB overwrites a point that has the measurement, tags and timestamp of another. So a stamp
goes up by at least 1,000 ns within a process, and its last three digits are the process's slot.
Only a clock that is put back, by a second or more, is followed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from celery_influx.speedups import extension

SLOTS = 1_000
#: A clock that jumps back so many ns was put right: to go on from the old time would give all
#: points one and the same time until it has caught up.
_PUT_BACK = 1_000_000_000


class Stamps:
    """Call it for the present time in ns, unique within the process, between threads too.

    Args:
        slot: 0 to 999, distinct among processes that write the same series.
        clock: Nanoseconds since 1970.
    """

    def __init__(self, slot: int, clock: Callable[[], int] = time.time_ns) -> None:
        self.slot = slot % SLOTS
        self._clock = clock
        self._last = 0

    def __call__(self) -> int:
        """The next stamp, in ns since 1970."""
        now = self._clock()
        now += self.slot - now % SLOTS
        # No lock: see `Buffer`. Neither a call nor an `if`: in these lines nobody comes in between.
        last = self._last
        self._last = now = now + (last + SLOTS - now) * (now <= last) * (last < now + _PUT_BACK)
        return now


#: As quick as can be here. Both are held to the same tests.
make_stamps: type[Stamps] = extension.Stamps if extension else Stamps
