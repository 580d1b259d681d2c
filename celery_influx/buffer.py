"""Where encoded lines wait: bounded in lines and bytes, the oldest dropped first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from celery_influx.speedups import extension


class Buffer:
    """A first-in, first-out queue of lines for many writers and one reader.

    It has no lock, on purpose. Celery's handler of SIGQUIT runs inside whatever the main thread,
    or a greenlet of it, does just then, and waits there for the tasks to end: if that held a lock,
    a task that sends its last point would wait for it for ever. So every number here is changed
    by one statement without a call, within which Python gives neither the interpreter away nor
    a signal to its handler.

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
        # From so many on `send` does more than to append. Beyond the limits while somebody was
        # called to take, and has not yet: once is enough.
        self._due_lines, self._due_bytes = self._wake = max_lines + 1, max_bytes + 1

    def put(self, lines: Sequence[bytes]) -> int:
        """Append ``lines``; the number of (oldest) lines dropped for them."""
        size = count = 0
        for line in lines:
            size += len(line) + 1
            count += 1
        # Up to the end of `extend` nobody comes in between: who counts 10 lines can wait for 10.
        self.bytes += size
        self.put_lines += count
        self._lines.extend(lines)
        return self._keep_to_limits()

    def sender(
        self,
        encode: Callable[[Any], bytes],
        points: memoryview,
        wake_lines: int,
        wake_bytes: int,
        reject: Callable[[Exception], None],
        after_put: Callable[[int], None],
    ) -> Callable[[Any], None]:
        """The quickest way in for a point: a closure, since that is where Python is quickest.

        Args:
            encode: Gives a point's line.
            points: One cell, that counts them.
            wake_lines: So many waiting lines call for ``after_put``.
            wake_bytes: And so many bytes. Both are below the buffer's limits.
            reject: Called with what ``encode`` raises.
            after_put: Called with the number of lines that were dropped.
        """
        lines = self._lines
        append = lines.append
        self._due_lines, self._due_bytes = self._wake = wake_lines, wake_bytes

        def send(point: Any) -> None:
            try:
                line = encode(point)
            except Exception as error:  # noqa: BLE001 - a user's object may raise anything
                reject(error)
                return
            size = len(line) + 1
            points[0] += 1
            self.bytes += size  # see `put`
            self.put_lines += 1
            append(line)
            if self.bytes >= self._due_bytes or len(lines) >= self._due_lines:
                try:
                    self._due_lines, self._due_bytes = self.max_lines + 1, self.max_bytes + 1
                    after_put(self._keep_to_limits())
                except BaseException:
                    self._due_lines, self._due_bytes = wake_lines, wake_bytes
                    raise

        return send

    def _keep_to_limits(self) -> int:
        """Drop the oldest lines while there are too many; how many."""
        dropped = 0
        while self.bytes > self.max_bytes or len(self._lines) > self.max_lines:
            if not self._drop():
                break  # another thread has them, and has not yet said so in `bytes`
            dropped += 1
        return dropped

    def take(self, max_lines: int, max_bytes: int) -> tuple[list[bytes], int]:
        """Remove the oldest lines that make one payload when joined by newlines.

        Returns:
            The lines, and how many were discarded because one alone is longer than ``max_bytes``.
        """
        self._due_lines, self._due_bytes = self._wake
        taken: list[bytes] = []
        too_long = 0
        room = max_bytes + 1
        while len(taken) < max_lines:
            try:
                line = self._lines.popleft()
            except IndexError:
                break
            size = len(line) + 1
            if room < size <= max_bytes + 1:
                self._lines.appendleft(line)
                break
            self.bytes -= size
            self.taken += 1
            if size <= room:
                taken.append(line)
                room -= size
            else:
                too_long += 1
        return taken, too_long

    def clear(self) -> int:
        """Drop all that waits; the number of lines."""
        self._due_lines, self._due_bytes = self._wake
        dropped = 0
        for _ in range(len(self._lines)):
            dropped += self._drop()
        return dropped

    def _drop(self) -> bool:
        """Drop the oldest line; whether there was one."""
        try:
            line = self._lines.popleft()
        except IndexError:
            return False
        size = len(line) + 1
        self.bytes -= size
        self.dropped += 1
        return True

    def __len__(self) -> int:
        return len(self._lines)

    def __repr__(self) -> str:
        return f"<Buffer lines={len(self)}/{self.max_lines} bytes={self.bytes}/{self.max_bytes}>"


#: As quick as can be here. Both are held to the same tests.
make_buffer: type[Buffer] = extension.Buffer if extension else Buffer


def joined(lines: Any) -> bytes:
    """As one payload, which what the extension's ``take`` gives already is."""
    return b"\n".join(lines) if type(lines) is list else lines.joined
