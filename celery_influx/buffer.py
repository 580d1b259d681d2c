"""Where encoded lines wait: bounded in lines and bytes, the oldest dropped first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from celery_influx.speedups import extension


class Buffer:
    """A first-in, first-out queue of lines for many writers and one reader.

    Args:
        max_lines: Most lines that wait.
        max_bytes: Most bytes that wait, a newline counted for each line.

    Attributes:
        bytes: Bytes that wait.
        put_lines: Lines ever put.
        taken: Lines ever taken, those that were too long among them.
        dropped: Lines ever dropped, because the buffer was full or was cleared.
    """

    def __init__(self, max_lines: int, max_bytes: int) -> None:
        self.max_lines = max_lines
        self.max_bytes = max_bytes
        self.bytes = 0
        self.put_lines = 0
        self.taken = 0
        self.dropped = 0
        self._lines: deque[bytes] = deque()
        # Reentrant: a finaliser or signal handler may send a point from inside `put` or `take`,
        # at any call there. So no call stands between reading and writing a number below.
        self._lock = threading.RLock()

    def put(self, lines: Sequence[bytes]) -> int:
        """Append ``lines``; the number of (oldest) lines dropped for them."""
        dropped = 0
        count = len(lines)
        with self._lock:
            for line in lines:
                self._lines.append(line)
                size = len(line) + 1
                self.bytes += size
            self.put_lines += count
            while (
                self.bytes > self.max_bytes or len(self._lines) > self.max_lines
            ) and self._lines:
                size = len(self._lines.popleft()) + 1
                self.bytes -= size
                dropped += 1
            self.dropped += dropped
        return dropped

    def take(self, max_lines: int, max_bytes: int) -> tuple[list[bytes], int]:
        """Remove one payload's worth of the oldest lines, as ``pack`` says."""
        with self._lock:
            taken, too_long, size = pack(self._lines, max_lines, max_bytes)
            count = len(taken) + too_long
            self.bytes -= size
            self.taken += count
        return taken, too_long

    def clear(self) -> int:
        """Drop all that waits; the number of lines."""
        with self._lock:
            lines, self._lines = self._lines, deque()
            dropped = len(lines)
            size = sum(map(len, lines)) + dropped
            self.bytes -= size
            self.dropped += dropped
        return dropped

    def __len__(self) -> int:
        return len(self._lines)

    def __repr__(self) -> str:
        return f"<Buffer lines={len(self)}/{self.max_lines} bytes={self.bytes}/{self.max_bytes}>"


def pack(lines: deque[bytes], max_lines: int, max_bytes: int) -> tuple[list[bytes], int, int]:
    """Take whole lines from the left that make one payload when joined by newlines.

    Returns:
        The lines; how many were discarded because one alone is longer than ``max_bytes``; and
        how many bytes left ``lines`` altogether, a newline counted for each line.
    """
    taken: list[bytes] = []
    too_long = 0
    gone = 0
    room = max_bytes + 1
    while lines and len(taken) < max_lines:
        line = lines.popleft()
        size = len(line) + 1
        if size <= room:
            taken.append(line)
            room -= size
        elif size <= max_bytes + 1:
            lines.appendleft(line)
            break
        else:
            too_long += 1
        gone += size
    return taken, too_long, gone


#: As quick as can be here. Both are held to the same tests.
make_buffer: type[Buffer] = extension.Buffer if extension else Buffer
