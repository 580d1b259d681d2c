"""Seeded points that try to break the encoder, and what it says of them.

``python -m tests.conformance.hostile`` writes REFUSALS.md anew.
"""

from __future__ import annotations

import decimal
import random
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.errors import PointError
from celery_influx.line_protocol import encode
from celery_influx.line_reader import parse
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.relay import RelayEnd
from celery_influx.stamps import make_stamps

SEED = 20_160_707
REFUSALS = Path(__file__).with_name("REFUSALS.md")
SAMPLE = 20_000

ORDINARY = ["a", "b", "cpu", "host", "queue", "é", "日本", "😀", "_", "1", "-", ".", ":", "/", "'"]
SPECIAL = [" ", ",", "=", "\\", "\\\\", '"', " ", ",", "=", "\\", '"']
ODD = ["\n", "\r", "\t", "\0", "\x0b", "\x7f", "\x85", "\u2028", "\ufeff", "#", "#!~", "\ud800"]
MILD = [" ", ",", "=", '"', ", ", "= =", "\r"]
WORDS = ["time", "_name", "_series", "_field", "t", "f=1", " f=1 1", "i", "#", ""]
MISLEADING = ["a", "a", "\\ ", "\\=", "\\,", '\\"', "\\\n", "\n", " ", ",", "=", '"', '"']
VALUES: list[Any] = [
    0.0, -0.0, 1.5, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1e22, -1e-7,
    float("nan"), float("inf"), 0, 1, -1, 2**63 - 1, -(2**63), 2**63, 10**400, True, False, None,
    decimal.Decimal("1.25"), decimal.Decimal("NaN"), b"x", [], datetime(2020, 1, 1),
]  # fmt: skip
TIMES: list[Any] = [
    None, 0, 1, -1, 1_700_000_000_123_456_789, 9223372036854775806, -9223372036854775806,
    9223372036854775807, 10**30, 1.5, True, "1", datetime(1969, 12, 31, 23, 59, 59, 1),
]  # fmt: skip


class Hostile:
    """An endless, repeatable supply. Only ``Random.random`` is used: it is the same everywhere."""

    def __init__(self, seed: int = SEED) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit`` - 1."""
        return int(self._random() * limit)

    def one_of(self, values: list[Any]) -> Any:
        """One of ``values``."""
        return values[int(self._random() * len(values))]

    def mild(self) -> str:
        """A name with nothing worse in it than separators and quotes."""
        name = str(self.one_of(ORDINARY))
        return name if self.below(2) else name + str(self.one_of(MILD)) + name

    def name(self) -> str:
        """A name: every fourth ordinary, the others with something special in it."""
        kind = self.below(16)
        if kind < 4:
            return str(self.one_of(ORDINARY))
        if kind == 15:
            return str(self.one_of(WORDS))
        pool = ORDINARY + SPECIAL + (ODD if kind > 10 else [])
        return "".join(self.one_of(pool) for _ in range(1 + self.below(6)))

    def point(self) -> Point:
        """Up to six tags and three fields, any time; seven points of eight have only mild names."""
        name = self.mild if self.below(8) else self.name
        tags = {name(): name() for _ in range(self.below(7))}
        fields = {
            name(): name() if self.below(4) else self.one_of(VALUES)
            for _ in range(1 + self.below(3))
        }
        time = self.below(10**18) if self.below(8) else self.one_of(TIMES)
        return Point(name(), fields, tags or None, time)


class Misleading(Hostile):
    """Points whose names mislead influxd about where the line and its fields end."""

    def name(self) -> str:
        """Mostly of what has a meaning, but no backslash last."""
        return "".join(str(self.one_of(MISLEADING)) for _ in range(1 + self.below(3)))

    def point(self) -> Point:
        """Up to five tags, up to three fields."""
        tags = {self.name(): self.name() for _ in range(self.below(6))}
        fields = {self.name(): self.below(2) == 1 or self.name() for _ in range(1 + self.below(3))}
        return Point(self.mild(), fields, tags or None, self.below(10**18))

    def line(self, point: Point) -> bytes:
        """The point in some order, escaped in some way that could give it back."""

        def name(text: str) -> str:
            return re.sub("[ ,=]", r"\\\g<0>", text)

        def key(match: re.Match[str]) -> str:
            unit, bare = match[0], self.below(8)
            return unit if (bare and unit == '"') or (not bare and unit in " ,") else f"\\{unit}"

        def string(match: re.Match[str]) -> str:
            unit = match[0]
            escape = "" if unit == '"' or (unit == "\\" and self.below(2)) else "\\"
            return escape + unit.replace('"', '\\"')

        def field(pair: tuple[str, Any]) -> str:
            begin = re.sub(r'\\?[ ,="]', key, pair[0])
            return f"{begin}=" + (
                "t" if pair[1] is True else '"{}"'.format(re.sub(r'\\?"|\\', string, pair[1]))
            )

        def shuffled(mapping: Any) -> list[tuple[str, Any]]:
            return sorted(mapping.items(), key=lambda _: self._random())

        tags = (f",{name(key)}={name(text)}" for key, text in shuffled(point.tags or {}))
        head = re.sub("[ ,]", r"\\\g<0>", point.measurement) + "".join(tags)
        return f"{head} {','.join(map(field, shuffled(point.fields)))} {point.timestamp}".encode()


_NEIGHBOUR = Point("neighbour", {"f": "a", "g": 1}, {"t": "a"}, 1)


def outcomes(count: int, seed: int = SEED) -> Counter[str]:
    """Encode ``count`` hostile points; how many were encoded, or why not, without the names."""
    hostile = Hostile(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        try:
            encode(hostile.point())
        except PointError as error:
            found[reason(str(error))] += 1
        else:
            found["encoded"] += 1
    return found


def sent(count: int, seed: int) -> Counter[str]:
    """Send ``count`` hostile points by a database that is not strict; its account.

    Every 16 of them stand between two neighbours in what would be one datagram, of which the
    reader then must take each line for one point, and the neighbours for what they are.
    """
    lines: list[bytes] = []
    relay = RelayEnd(lambda line, begun: lines.append(line) is None, -1, 0)
    counters = Counters(1)

    def begin() -> None:
        database.begin(
            counters.row(0),
            lambda: counters.total(0),
            make_stamps(1),
            {},
            relay,
        )

    database = Database(DatabaseOptions(field_types=False), settle=begin)
    hostile = Hostile(seed)
    found: Counter[str] = Counter()
    for _ in range(count // 16):
        lines.clear()
        database.send_data(_NEIGHBOUR)
        for _ in range(16):
            database.send_data(hostile.point())
        database.send_data(_NEIGHBOUR)
        points, refused = parse(b"\n".join(lines))
        assert refused == []
        assert len(points) == len(lines), lines
        assert points[0] == points[-1] == _NEIGHBOUR, lines
        found["lines"] += len(lines)
    account = database.stats()
    return found + Counter({name: account[name] for name in ("points", "rejected")})


_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""


def reason(text: str) -> str:
    """An error text with the point's own words taken out."""
    text = re.sub(rf"^point {_QUOTED}: ", "", text)
    text = re.sub(rf"^(measurement|tag key|field key|tag) {_QUOTED}", r"\1", text)
    text = re.sub(rf"^(field|tag): value {_QUOTED}", r"\1 value", text)
    text = re.sub(r"^field '?[^:]*: .* (is of type|does not fit)", r"field: ... \1", text)
    text = re.sub(rf"^field {_QUOTED}: .* (is of type|does not fit)", r"field: ... \1", text)
    return re.sub(r"^timestamp \S+( \S+\))?: ", "timestamp: ", text)


def report(count: int = SAMPLE) -> str:
    """REFUSALS.md."""
    rows = "".join(f"| {number} | {text} |\n" for text, number in outcomes(count).most_common())
    return (
        f"# What the encoder refuses\n\nOf {count:,} hostile points (seed {SEED}), by\n"
        "`python -m tests.conformance.hostile`. In one point of eight nearly every name holds\n"
        "a separator, a backslash or a control character. What is encoded the tests hold against\n"
        "influxd. Of the 366 points of the public line-protocol-corpus 2 are refused, for a tag\n"
        "`time`, with which influxd drops the point, too (`test_corpus.py`). Not counted are its 14\n"
        "points with unsigned integers, which InfluxDB 1.x has not.\n\n"
        "No way of writing a refused point makes influxd hold it and leaves its neighbours alone\n"
        "(`test_refused.py`), but for one: before points of which `backslashes, quotes and newlines\n"
        "in its names` or `a tab or NUL` is said, a field `time`, which influxd leaves out, can help.\n"
        "It is not written: nobody gave it, and other servers keep it. Nor is a field written twice,\n"
        "of which influxd keeps the last, or a string with a bare quote, of which it cuts off\n"
        "whatever comes last.\n\n"
        f"| points | outcome |\n|---|---|\n{rows}"
    )


if __name__ == "__main__":
    REFUSALS.write_text(report(), encoding="utf-8")
