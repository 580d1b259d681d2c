"""What is left of a batch, in parts, and the search for lines that spoil it, by halves."""

from __future__ import annotations

from collections import deque


class Parts:
    """The parts of one batch, in order; each is to be one payload.

    A part that is refused for some of its lines is halved. When the first half has gone through,
    the other one has a bad line and is halved again unasked; when it is refused, nothing is known
    of the other one, which goes with all that comes after it.

    Attributes:
        requests: Payloads since the first refusal, itself among them.
        too_long_in_a_row: Payloads since the last one that was not too long.
    """

    def __init__(self) -> None:
        self._parts: deque[list[bytes]] = deque()
        self._begin()

    def _begin(self) -> None:
        self.requests = self.too_long_in_a_row = 0
        self._halved = False  # one of the first two parts has a bad line

    def add(self, *lists: list[bytes]) -> None:
        """Begin, or go on, with these."""
        self._parts.extend(lists)

    @property
    def search(self) -> tuple[int, int, int] | None:
        """How far a search is, for ``go_on``; None where nothing was refused or too long."""
        if not (self.requests or self.too_long_in_a_row):
            return None
        return len(self.first), self.requests, self.too_long_in_a_row

    def go_on(self, length: int, requests: int, too_long_in_a_row: int) -> None:
        """What was added is left of a search that was so far when it ended."""
        # Whole, it would be refused again, and that would count.
        lines = list(self._parts.popleft())
        self._parts.extendleft(filter(None, (lines[length:], lines[:length])))
        self.requests, self.too_long_in_a_row = requests, too_long_in_a_row

    @property
    def first(self) -> list[bytes]:
        """The part that is next."""
        return self._parts[0]

    def lines(self) -> list[bytes]:
        """All that is left."""
        return [line for part in tuple(self._parts) for line in part]

    def clear(self) -> None:
        """Nothing is left, and nothing is known of what comes next."""
        self._parts.clear()
        self._begin()

    def taken(self) -> None:
        """The first one went through."""
        self._parts.popleft()
        self.requests += bool(self.requests)
        self.too_long_in_a_row = 0
        if self._halved:
            self._halve()

    def repeated(self) -> None:
        """The first one goes once more."""
        self.requests += 1

    def refused(self) -> bool:
        """The first one has a bad line; whether it was that line alone, which is out now."""
        self.requests += 1
        self.too_long_in_a_row = 0
        self._join_what_is_unknown()
        if len(self.first) == 1:
            self._parts.popleft()
            return True
        self._halve()
        return False

    def too_long(self) -> bool:
        """The first one has too many lines, or too long a one; whether it was that alone.

        Good lines take as many requests as the server's limit makes of them, and so none counts.
        """
        self.too_long_in_a_row += 1
        self._join_what_is_unknown()
        if len(self.first) == 1:
            self._parts.popleft()
            return True
        self._halve()
        self._halved = False  # and not one of its lines is bad
        return False

    def _join_what_is_unknown(self) -> None:
        if self._halved:
            first, other, *rest = self._parts
            after = rest[0] if rest else []
            self._parts = deque(filter(None, (first, [*other, *after], *rest[1:])))
            self._halved = False

    def _halve(self) -> None:
        """Somewhere in the first part is a bad line."""
        lines = list(self._parts[0])
        half = len(lines) // 2
        self._halved = bool(half)
        if half:
            self._parts.popleft()
            self._parts.extendleft((lines[half:], lines[:half]))

    def __len__(self) -> int:
        return sum(map(len, self._parts))
