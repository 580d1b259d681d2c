"""What encode writes is what influxd stores, whatever the transport and the precision."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest

from celery_influx.database import Database
from celery_influx.errors import PointError
from celery_influx.line_reader import parse
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point, Precision
from tests.conformance.encoders import both_encode
from tests.conformance.hostile import Hostile, Misleading
from tests.conformance.reading import exactly, key_of, read_back
from tests.servers import Influxd, wait_for

pytestmark = pytest.mark.once

COUNT = 400
encode = both_encode()


def hostile_lines(seed: int) -> list[tuple[Point, bytes]]:
    """Points that the encoder takes, each a measurement of its own, with their lines.

    Own measurements, since the first type of a field wins.
    """
    hostile = Hostile(seed)
    found: list[tuple[Point, bytes]] = []
    while len(found) < COUNT:
        name, fields, tags, _ = hostile.point()
        tags = {key: value for key, value in (tags or {}).items() if value}
        name = f"{name}~{len(found)}" if len(found) % 2 else f"{len(found)}~{name}"
        fields = {k: v for k, v in fields.items() if type(v) in (int, float, str, bool)}
        fields = {
            key: value
            for key, value in fields.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        point = Point(name, fields, tags or None, len(found) - 200)
        try:
            line = encode(point)
        except PointError:
            continue
        found.append((point, line))
    return found


def payloads(lines: list[tuple[Point, bytes]]) -> list[bytes]:
    """Three hostile lines at a time, an ordinary one before, between and after them."""
    found = []
    for start in range(0, len(lines), 3):
        parts = [b"neighbour ok=%di %d" % (start * 10, start * 10)]
        for number, (_, line) in enumerate(lines[start : start + 3], start * 10 + 1):
            parts += [line, b"neighbour ok=%di %d" % (number, number)]
        found.append(b"\n".join(parts))
    return found


def check(influxd: Influxd, database: str, lines: list[tuple[Point, bytes]]) -> None:
    """Every neighbour is stored, and every point just as given, and nothing else."""
    stored = read_back(influxd, database)
    neighbours = [key for key in stored if key[0] == "neighbour"]
    assert len(neighbours) == sum(p.count(b"neighbour ok=") for p in payloads(lines))
    for key in neighbours:
        assert stored.pop(key).fields == {"ok": key[2]}
    for point, line in lines:
        found = stored.pop(key_of(point), None)
        assert found is not None, (point, line)
        assert exactly(found) == exactly(point), line
    assert stored == {}


def test_hostile_points_sent_by_http_are_stored_exactly(influxd: Influxd, database: str) -> None:
    lines = hostile_lines(1)
    for payload in payloads(lines):
        assert influxd.write(payload, database) == (204, "")

    check(influxd, database, lines)


def test_hostile_points_sent_by_udp_are_stored_and_survive_a_restart(tmp_path: Path) -> None:
    lines = hostile_lines(2)
    neighbours = sum(p.count(b"neighbour ok=") for p in payloads(lines))
    with Influxd(tmp_path / "influxd") as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for payload in payloads(lines):
                sock.sendto(payload, ("127.0.0.1", server.udp_port))
        wait_for(lambda: server.count("neighbour", "ok") == neighbours, 20)
        check(server, server.udp_database, lines)

        # Names are read from disk by other code of influxd's than from the wire.
        server.stop()
        server.start()
        check(server, server.udp_database, lines)


@pytest.mark.parametrize(
    "seed", [10, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(11, 21))]
)
def test_each_point_that_some_line_gives_is_encoded_and_stored_exactly(
    influxd: Influxd, database: str, seed: int
) -> None:
    misleading = Misleading(seed)
    neighbour = Point("neighbour", {"ok": 1}, None, 1)
    lines = []
    for number in range(2_000):
        point = misleading.point()._replace(measurement=f"m{number}", timestamp=number)
        if parse(misleading.line(point) + b"\n" + encode(neighbour)) == ([point, neighbour], []):
            lines.append((point, encode(point)))

    assert len(lines) > 200
    for payload in payloads(lines):
        assert influxd.write(payload, database) == (204, "")
    check(influxd, database, lines)


@pytest.mark.parametrize(
    "point",
    [
        Point("m", {'a"b': "x", "c": "y"}, {"k\\ ": "v", "l": " \\=v"}, 1),
        Point(
            "m", {"f": 1.5}, {'"\\ ': "\\ ", "o": "v", "p": "v", "q": "v", "r": "v", " ": '"'}, 1
        ),
        Point("m", {"f": True, "g\\,": True, '\\="h': True}, {",": "\\="}, 1),
        Point("m", {"\\=t,f": 1.5}, None, 1),
        Point("m", {'f\n"g': True, '"': " \\\n"}, {"k\\ ": "v"}, 1),
        Point("m", {'é"😀11': "\\\\", "queue": "_"}, {'""a\\ ': " _", "b": " \\=é "}, 1),
        Point("m", {"f": "x"}, {"' \na": 'h"', "#": "'\"-\\\\.", "é\0=\\ ": ":b c"}, 1),
    ],
)
def test_a_line_is_written_so_that_it_ends_where_the_point_does(
    influxd: Influxd, database: str, point: Point
) -> None:
    line = encode(point)

    assert influxd.write(line + b"\nneighbour f=1 1", database) == (204, "")

    found = {exactly(one) for one in read_back(influxd, database).values()}
    assert found == {exactly(point), exactly(Point("neighbour", {"f": 1.0}, None, 1))}


def test_a_tag_and_a_field_may_have_the_same_name(influxd: Influxd, database: str) -> None:
    influxd.write(encode(Point("m", {"a": 1}, {"a": "x"}, 1)), database)

    found = influxd.query('SELECT "a"::field, "a"::tag FROM m', database)

    assert found[0]["values"] == [[1, 1, "x"]]


@pytest.mark.parametrize("precision", list(Precision))
def test_times_arrive_rounded_down_in_each_precision(
    influxd: Influxd, database: str, precision: Precision
) -> None:
    times = [1_700_000_000_123_456_789, 0, -1, 9_223_372_036_000_000_000, -9_223_372_036 * 10**9]
    encode = both_encode(precision=precision)
    lines = b"\n".join(encode(Point("m", {"f": 1}, None, time)) for time in times)

    assert influxd.write(lines, database, precision=precision.value) == (204, "")

    unit = precision.nanoseconds
    expected = sorted(time // unit * unit for time in times)
    assert [row["time"] for row in influxd.rows("m", database)] == expected


def test_datagrams_that_are_filled_up_with_newlines_are_stored_whole(influxd: Influxd) -> None:
    options = DatabaseOptions(host="127.0.0.1", udp_port=influxd.udp_port, datagram_bytes=1_432)
    database = Database(options)
    database.send_data(
        Point("burst", {"f": number, "text": "x" * (number % 90)}, None, number)
        for number in range(1_000)
    )
    assert database.close()
    assert database.stats()["payloads"] > 40

    wait_for(lambda: influxd.count("burst", "f") == 1_000, 20, "all points")
    assert [row["f"] for row in influxd.rows("burst")] == list(range(1_000))
