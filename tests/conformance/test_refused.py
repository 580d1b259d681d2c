"""No way of writing a refused point makes influxd hold it: a refusal costs nobody a point.

The lines are made here, without the encoder, in each way in which a client might escape a name.
"""

from __future__ import annotations

import functools
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pytest

from celery_influx.errors import PointError
from celery_influx.line_protocol import encode
from celery_influx.line_reader import parse
from celery_influx.point import Point
from tests.conformance.hostile import SAMPLE, Hostile, reason
from tests.conformance.reading import exactly, read_back
from tests.servers import Influxd

pytestmark = pytest.mark.once

#: Why no line can be written of some refused points. Points of all other reasons are offered.
NOTHING_TO_OFFER = {
    "field: ... is of type": "line protocol has floats, integers, booleans and strings only",
    "timestamp: expected": "its times are integers; an integer made of these is another time",
    "no fields": "a line without fields is none, and NaN and None are no field's value",
    "'\\ud800": "no UTF-8 is half of a surrogate pair, and influxd answers in UTF-8; what it makes"
    " of the bytes that some write for it is seen in test_same_verdict.py",
}
PER_REASON = 20
WAYS = 12
#: Lines of a point beside those that write all of its names in the same way: with the ways, and
#: the order of tags and fields, mixed at random.
MIXED = 6
#: influxd leaves a field of this name out, but only after it has counted its quotes and commas.
DUMMY = b' time=",,,,",'
#: Said of points that influxd could be made to hold with it. The encoder does not write it:
#: nobody gave it, and other servers keep it.
SAVED_BY_DUMMY = {
    "field key begins with a tab or NUL",
    "backslashes, quotes and newlines in its names",
}
CONTROLS = 60
PER_DATABASE = 250


@functools.lru_cache(100)
def spellings(text: str, special: str) -> list[str]:
    """A name in each plausible way; ``special`` are the characters with a meaning in its place."""

    def escape(characters: str, text: str = text) -> str:
        return re.sub(f"[{re.escape(characters)}]", r"\\\g<0>", text)

    return [
        escape(special),
        escape(special, text.replace('\\"', '\\\\"')),
        escape(special + "\\"),
        escape(special, re.sub(r'\\(?=[ ,="\\\n]|\Z)', r"\\\\", text)),
        escape(special + '"'),
        escape(special + '="\n#\t\0'),
        escape(special, text.replace("\n", "\\n")),
        escape(special, text.replace("\\", "\\\\\\")),
        re.sub(rf"(?<!\\)[{special}]", r"\\\g<0>", text),
        re.sub(f"[{special}]", r"\\\\\g<0>", text),
        '"' + escape('"\\') + '"',
        text,
    ]


def values(value: Any) -> list[str]:
    """A field's value in each plausible way."""
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, int):
        return [f"{value}i", f"{value}u", str(value)]
    if isinstance(value, float):
        return [repr(value)]
    return ['"' + re.sub(chars, r"\\\g<0>", value) + '"' for chars in (r'["\\]', '"', r'["\\\n]')]


def written(
    point: Point,
    choose: Callable[[list[str]], str],
    order: Callable[[Any], int],
    between: bytes = b" ",
) -> bytes:
    """The point as a line, each part in the way that ``choose`` takes."""
    head = [choose(spellings(point.measurement, " ,"))]
    for key, value in sorted((point.tags or {}).items(), key=order):
        head.append(f"{choose(spellings(key, ' ,='))}={choose(spellings(value, ' ,='))}")
    body = []
    for key, value in sorted(point.fields.items(), key=order):
        # In field keys alone the backslash of \" is lost.
        first, second, *others = spellings(key, " ,=")
        body.append(f"{choose([second, first, *others])}={choose(values(value))}")
    return ",".join(head).encode() + between + f"{','.join(body)} {point.timestamp}".encode()


def why_not(point: Point) -> str:
    """Why the encoder refuses the point, "" if it does not."""
    try:
        encode(point)
    except PointError as error:
        return reason(str(error))
    return ""


def writable(point: Point) -> Point:
    """What can be written of the point: no None, NaN or empty tag, nothing without a field type."""
    fields = {}
    for key, given in point.fields.items():
        value = float(given) if isinstance(given, Decimal) else given
        if type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
            fields[key] = value
    tags = {key: value for key, value in (point.tags or {}).items() if value}
    return point._replace(fields=fields, tags=tags or None)


class Offer(NamedTuple):
    """One line for influxd, and the point that it might make of it."""

    number: int
    database: str
    line: bytes
    point: Point
    why: str
    """Why the encoder refuses the point, "" for one that it takes."""
    given: int
    """The number of the hostile point that it was made of."""


class Offers:
    """Makes lines of points, each in its own measurement, so that none can hide another's."""

    def __init__(self) -> None:
        self._hostile = Hostile(5)
        self._number = 10_000_000

    def of(self, given: int, point: Point, why: str) -> Iterator[Offer]:
        """Each way to write a point that is refused for ``why``."""
        point = writable(point)
        any_time = not why.startswith("timestamp")
        names_at_fault = any_time and not why.startswith("field: ...")
        # Where the measurement is at fault, its number must not mend it.
        for shape in ("{0}~{1}", "{1}~{0}", "{1}"):
            numbered = functools.partial(self._numbered, point, shape, any_time)
            if why_not(numbered()) == why:
                break
        else:
            return
        seen = set()
        for way in range(-1, WAYS + MIXED if names_at_fault else 3):
            one = numbered()
            if way < 0:
                line = written(one, lambda ways: ways[0], lambda _: 0, DUMMY)
            elif way < WAYS:
                line = written(one, lambda ways, way=way: ways[way % len(ways)], lambda _: 0)
            else:
                line = written(one, self._hostile.one_of, lambda _: self._hostile.below(1000))
            bare = line.replace(b"%d" % self._number, b"")
            # Some would end the server: see the tests of decode.
            if bare in seen or any("slice bounds" in text for text in parse(line)[1]):
                continue
            seen.add(bare)
            database = f"all{self._number // PER_DATABASE}" if "0" in shape else f"own{given}"
            yield Offer(self._number, database, line, one, why, given)
            self._number += 1

    def _numbered(self, point: Point, shape: str, any_time: bool) -> Point:
        name = shape.format(self._number, point.measurement)
        return Point(name, point.fields, point.tags, self._number if any_time else point.timestamp)


def write(server: Influxd, offers: list[Offer]) -> set[int]:
    """Send each line by a request of its own, a bad line after it.

    The numbers of those after which the bad line was seen as one of its own.
    """
    for database in {offer.database for offer in offers}:
        server.query(f'CREATE DATABASE "{database}"')
    harmless = set()
    # Many requests at once on one connection: the server answers them one after the other.
    for start in range(0, len(offers), 50):
        some = offers[start : start + 50]
        requests = []
        for offer in some:
            body = offer.line + b"\nbad"
            head = f"POST /write?db={offer.database} HTTP/1.1\r\nHost: i\r\n"
            requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with socket.create_connection(("127.0.0.1", server.http_port), 30) as connection:
            connection.sendall(b"".join(requests))
            connection.shutdown(socket.SHUT_WR)
            answers = b"".join(iter(lambda: connection.recv(65_536), b"")).split(b"HTTP/1.1 ")[1:]
        for offer, answer in zip(some, answers, strict=True):
            if b"unable to parse 'bad'" in answer:
                harmless.add(offer.number)
    return harmless


def held(server: Influxd, offers: list[Offer]) -> set[int]:
    """The numbers of those whose point is there exactly."""
    stored = {
        database: set(map(exactly, read_back(server, database).values()))
        for database in {offer.database for offer in offers}
    }
    return {offer.number for offer in offers if exactly(offer.point) in stored[offer.database]}


class Trial(NamedTuple):
    """What was offered, what influxd holds of it, and all reasons why points were refused."""

    offers: list[Offer]
    held: set[int]
    reasons: Counter[str]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Of each reason in REFUSALS.md the first points, and some that are not refused."""
    hostile, maker = Hostile(), Offers()
    reasons: Counter[str] = Counter()
    offers: list[Offer] = []
    for number in range(SAMPLE):
        point = hostile.point()
        why = why_not(point)
        if why.startswith(tuple(NOTHING_TO_OFFER)) or r"\ud800" in repr(point):
            reasons[why] += 1
        elif why or r"\\" in repr(point):
            if reasons[why] < (PER_REASON if why else CONTROLS):
                offers += maker.of(number, point, why)
            reasons[why] += 1
    with Influxd(tmp_path_factory.mktemp("refused"), udp=False) as server:
        harmless = write(server, offers)
        found = held(server, offers)
        # Some are found only before a restart, and others only after it.
        server.stop()
        server.start()
        return Trial(offers, harmless & found & held(server, offers), reasons)


def test_no_refused_point_is_held_however_it_is_written(trial: Trial) -> None:
    refused = [offer for offer in trial.offers if offer.why and offer.number in trial.held]
    assert [offer for offer in refused if DUMMY not in offer.line] == []

    offered = {offer.why for offer in trial.offers}
    assert not [w for w in offered if w.startswith(tuple(NOTHING_TO_OFFER))]
    for why in trial.reasons.keys() - offered:
        assert why.startswith(tuple(NOTHING_TO_OFFER)), why


def test_each_point_that_is_not_refused_is_held_when_it_is_written_so(trial: Trial) -> None:
    controls = {offer.given for offer in trial.offers if not offer.why}

    assert len(controls) == CONTROLS
    assert {o.given for o in trial.offers if not o.why and o.number in trial.held} == controls


def test_which_points_only_a_field_that_nobody_gave_would_save_is_known(trial: Trial) -> None:
    saved = {offer.why for offer in trial.offers if offer.why and offer.number in trial.held}

    assert len(saved) == len(SAVED_BY_DUMMY)
    assert all(why.startswith(tuple(SAVED_BY_DUMMY)) for why in saved), saved
