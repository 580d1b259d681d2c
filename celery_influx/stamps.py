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


#: Gives the present time in ns, unique within the process, between threads too.
Stamps = Callable[[], int]


def python_stamps(slot: int, clock: Callable[[], int] = time.time_ns) -> Stamps:
    """Such a clock: a closure, since that is where Python is quickest.

    Args:
        slot: 0 to 999, distinct among processes that write the same series.
        clock: Nanoseconds since 1970.
    """
    slot %= SLOTS
    before = 0

    def stamp() -> int:
        nonlocal before
        now = clock()
        now += slot - now % SLOTS
        # No lock: see `Buffer`. Where nobody may come in between there is no call; nor, for the
        # sake of Python 3.10, a jump: where it is late, all is looked at again after it.
        before = now = (
            now
            if not now <= before
            else now + (before + SLOTS - now) * (now <= before) * (before < now + _PUT_BACK)
        )
        return now

    return stamp


#: As quick as can be here. Both are held to the same tests.
make_stamps: Callable[[int], Stamps] = extension.Stamps if extension else python_stamps
