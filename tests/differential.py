"""The encoder in C held against the one in Python: the same bytes or error, point by point.

``python -m tests.differential COUNT SEED`` tries so many points, on whichever extension is found.
"""

from __future__ import annotations

import random
import struct
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from celery_influx import _speedups
from celery_influx.field_types import FieldTypes, TypeTable
from celery_influx.line_protocol import make_encode
from celery_influx.line_reader import MAX_TIME, MIN_TIME
from celery_influx.point import Point
from tests.conformance.hostile import Hostile

#: Constant tags, unit, whether points without a time get one, and whether fields have types.
Setting = tuple[dict[str, str], int, bool, bool]
SETTINGS: list[Setting] = [
    ({}, 1, False, False),
    ({}, 1, True, False),
    ({}, 1, True, True),
    ({"host": "web 1", "worker": "celery@web"}, 1, True, True),
    ({"a": "1", "é": "ü"}, 1_000_000_000, True, False),
    ({"worker": "w"}, 1_000, False, True),
    ({"dir": "c:\\x", "a": "1"}, 1, True, False),
    ({"dir": "c:\\x", "a": "1"}, 1, True, True),
]


class Word(str):
    """A str that is none exactly."""

    __slots__ = ()


class Row(tuple[Any, ...]):
    """A tuple that gives other things than it holds."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(("other", {"f": 1}, None, 1))


class Side:
    """One encoder with a clock of its own; what it makes of a point."""

    def __init__(self, setting: Setting, speedups: Any) -> None:
        constant, unit, clocked, typed = setting
        self._left_out = 0
        self._conflicts: list[tuple[str, list[str]]] = []
        self._time = 1_700_000_000_000_000_000
        clock: Callable[[], int] | None = self._clock if clocked else None
        types = FieldTypes(TypeTable(), self._conflict, self._conflict) if typed else None
        self._encode = make_encode(constant, unit, clock, self._leave_out, speedups, types)

    def _clock(self) -> int:
        self._time += 1_001
        return self._time

    def _leave_out(self, count: int) -> None:
        self._left_out += count

    def _conflict(self, measurement: str, conflicts: Any) -> None:
        self._conflicts.append((measurement, conflicts))

    def outcome(self, point: Any) -> tuple[object, ...]:
        """The line, or the error and its text; fields left out, and the clock, by then."""
        self._conflicts.clear()
        try:
            made: object = self._encode(point)
        except Exception as error:
            made = (type(error), str(error))
        return made, self._left_out, self._time, self._conflicts


class Pair:
    """Both encoders of one setting."""

    def __init__(self, setting: Setting) -> None:
        self._python = Side(setting, None)
        self._c = Side(setting, _speedups)

    def check(self, point: Any) -> None:
        """Raise where they differ."""
        ours, theirs = self._c.outcome(point), self._python.outcome(point)
        assert ours == theirs, f"{point!r}\nC:      {ours}\nPython: {theirs}"


class Wild(Hostile):
    """Hostile points with every kind of number, of length, and of object.

    Every second name is one that was given before, the same object.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._given = ["a"] * 256

    def mild(self) -> str:
        """As before, and again."""
        return self._or_again(super().mild())

    def name(self) -> str:
        """As before, and again."""
        return self._or_again(super().name())

    def _or_again(self, name: str) -> str:
        place = self.below(512)
        if place >= 256:
            return self._given[place - 256]
        self._given[place] = name
        return name

    def float(self) -> float:
        """Any bits; or of few digits; or what clocks give."""
        kind = self.below(4)
        if kind == 0:
            return float(struct.unpack("<d", struct.pack("<Q", int(self._random() * 2**64)))[0])
        if kind == 1:
            return (self.below(2_000_001) - 1_000_000) / 10.0 ** self.below(12)
        if kind == 2:
            return self._random() * 10.0 ** (self.below(40) - 20)
        return self._random()

    def integer(self) -> int:
        """Of any length, beyond 64 bits, too."""
        return (1 - 2 * self.below(2)) * int(self._random() * 2.0 ** self.below(66))

    def short(self) -> int:
        """Of up to 63 bits."""
        return self.integer() % 2**63

    def odd(self) -> Any:
        """What is no plain value."""
        kind = self.below(8)
        if kind == 0:
            return Word(self.name())
        if kind == 1:
            return self.name() * (1 << self.below(14))  # a line may have 65,535 bytes
        return [None, True, False, Decimal(self.integer()), b"x", (), object, self.name()][kind]

    def value(self) -> Any:
        """A field's or a tag's value."""
        kind = self.below(16)
        if kind < 5:
            return self.float()
        if kind < 9:
            return self.integer()
        return self.odd() if kind == 15 else self.mild() if kind < 13 else self.name()

    def mapping(self, most: int) -> Any:
        """Fields or tags; now and then in no dict."""
        found = {
            Word(self.name()) if not self.below(200) else self.name(): self.value()
            for _ in range(self.below(most + 1))
        }
        kind = self.below(200)
        return UserDict(found) if kind == 0 else MappingProxyType(found) if kind == 1 else found

    def ordinary(self) -> Point:
        """With nothing strange in it but numbers and separators."""
        tags = {self.mild(): self.mild() for _ in range(self.below(5))}
        fields: dict[str, Any] = {"count": self.short()}
        fields |= {
            self.mild(): (self.float, self.short, self.mild)[self.below(3)]()
            for _ in range(self.below(3))
        }
        return Point(self.mild(), fields, tags, self.below(2**53) * 997 if self.below(4) else None)

    def time(self) -> Any:
        """A stamp, none, one near the limits, or what is none."""
        kind = self.below(16)
        if kind < 10:
            return self.below(2**53) * 997
        edge = (MIN_TIME, MAX_TIME)[self.below(2)] + self.below(5) - 2
        return edge if kind == 10 else self.value() if kind == 11 else None

    def anything(self) -> Any:
        """A point; seldom something that only looks like one."""
        kind = self.below(400)
        if kind >= 80:
            return self.ordinary()
        if kind >= 40:
            return self.point()
        measurement = Word(self.name()) if kind == 39 else self.name()
        parts = (measurement, self.mapping(4), self.mapping(4) if kind % 3 else None, self.time())
        if kind > 2:
            return Point(*parts)
        return (Row(parts), parts[:3], list(parts))[kind]


def differ(count: int, seed: int) -> int:
    """Try ``count`` points on each setting's pair in turn; the count, or AssertionError."""
    wild = Wild(seed)
    pairs = [Pair(setting) for setting in SETTINGS]
    for number in range(count):
        pairs[number % len(pairs)].check(wild.anything())
    return count


def differ_in_floats(count: int, seed: int) -> int:
    """The same for doubles of random bits, many in each point."""
    bits = random.Random(seed)
    pair = Pair(SETTINGS[0])
    for _ in range(count // 100):
        values = struct.unpack("<100d", bits.randbytes(800))
        pair.check(Point("m", {str(place): value for place, value in enumerate(values)}))
    return count


if __name__ == "__main__":
    amount, start = map(int, sys.argv[1:])
    print(f"{_speedups.__file__}: {differ(amount, start)} points and", end=" ")
    print(f"{differ_in_floats(amount, start)} doubles, no difference")
