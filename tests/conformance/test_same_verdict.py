"""influxd and the listener, and with it decode, say the same of every row of the tables."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import requests

from celery_influx.line_protocol import encode
from celery_influx.line_reader import decode, parse, unreadable
from celery_influx.listener import Listener
from celery_influx.point import Point
from tests.conformance.hostile import Hostile
from tests.conformance.reading import exactly, read_back
from tests.servers import Influxd, wait_for

pytestmark = pytest.mark.once

MAX_DATAGRAM = 65_507
UNITS = {"u": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
WEEK = 7 * 24 * UNITS["h"]
PRECISIONS = ["", "ns", "n", "u", "ms", "s", "m", "h", "us", "NS", "xx", "µ"]
CHARACTERS = [
    " ", ",", "=", "\\", "\\\\", "\\,", "\\ ", "\\=", '\\"', '"', "\n", "\\\n", "\r", "\t", "\x0b",
    "\x0c", "\0", "\x01", "\x08", "\x1b", "\x7f", "#", "é", "\ufeff", "\u2028", "\xa0", "", "time",
    "_", "_field", "_measurement",
]  # fmt: skip
# A stray byte, one cut off, one too long, half of a surrogate pair, and one beyond Unicode.
NOT_UTF_8 = [b"\xff", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
# Each line has a place for its number, so that no two of them meet.
POSITIONS = {
    "measurement": "{}~{} f=1.5 1",
    "measurement's end": "{1}~{0},k=v f=1.5 1",
    "tag key": "m{1},{0}=v f=1.5 1",
    "tag value": "m{1},k={0} f=1.5 1",
    "field key": "m{1} {0}=1.5 1",
    "string value": 'm{1} s="{0}" 1',
}


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as one:
        yield one


_session = requests.Session()


def both(influxd: Influxd, database: str, listener: Listener, body: bytes, **params: str) -> None:
    """POST the body to both; the answers must be the same."""

    def answer(url: str, name: str) -> tuple[int, str]:
        found = _session.post(f"{url}/write", params={"db": name, **params}, data=body, timeout=10)
        return found.status_code, found.json()["error"] if found.content else ""

    assert answer(listener.http_url, "celery") == answer(influxd.http_url, database)


def settled(points: Iterable[Point], unit: int = 1) -> list[str]:
    """The points in order; of a time that a server gave, only what is left of a whole unit."""
    now = time.time_ns()
    found = []
    for point in points:
        assert isinstance(point.timestamp, int)
        fresh = abs(point.timestamp - now) < 2 * UNITS["h"]
        found.append(exactly(point._replace(timestamp=point.timestamp % unit) if fresh else point))
    return sorted(found)


def same_points(influxd: Influxd, database: str, listener: Listener) -> None:
    """influxd answers when the first shard has failed, and may be writing to others then."""
    wait_for(
        lambda: settled(read_back(influxd, database).values()) == settled(listener.points()),
        5,
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_each_character_in_each_position(influxd: Influxd, database: str, position: str) -> None:
    number = 0
    with Listener() as listener:
        for character in CHARACTERS:
            for shape in ("{}", "\\{}", "a{}b", "a\\{}b", "{}b", "\\{}b", "a{}", "a\\{}"):
                number += 1
                text = shape.format(character)
                line = POSITIONS[position].format(text, number)
                both(influxd, database, listener, line.encode())
        ours = {exactly(point): point for point in listener.points()}
    theirs = {exactly(point) for point in read_back(influxd, database).values()}

    assert theirs <= ours.keys()
    # Taken by influxd, and found by no query: the encoder must refuse just these.
    for lost in ours.keys() - theirs:
        with pytest.raises(ValueError, match=r"backslash|InfluxDB's own"):
            encode(ours[lost])


@pytest.mark.parametrize("position", POSITIONS)
def test_bytes_that_are_no_text_in_each_position(influxd: Influxd, position: str) -> None:
    before, after = POSITIONS[position].format("\0", 1).encode().split(b"\0")
    for number, raw in enumerate((NOT_UTF_8[0], *(b"a%bb" % raw for raw in NOT_UTF_8))):
        name = f"{position} {number}"
        influxd.query(f'CREATE DATABASE "{name}"')
        with Listener() as listener:
            both(influxd, name, listener, before + raw + after + b"\nneighbour f=1 1")

            theirs = read_back(influxd, name).values()
            assert settled(theirs) == settled(listener.points())
        influxd.query(f'DROP DATABASE "{name}"')


@pytest.mark.parametrize("line", [b"m\xff f=1 1", b"m \xff=1 1"], ids=repr)
def test_bytes_that_are_no_text_cost_a_shard_that_exists_all_its_points(
    tmp_path: Path, line: bytes
) -> None:
    """Why the listener refuses them always: influxd refuses them only in a new shard."""
    with Influxd(tmp_path, udp=False) as influxd, Listener() as listener:
        assert influxd.write(b"good f=1 1") == (204, "")
        assert influxd.write(line) == (204, "")
        assert influxd.count("good", "f") == 1

        influxd.stop()
        influxd.start()

        assert influxd.count("good", "f") == 0
        status, error = influxd.write(b"good f=1 1")
        assert (status, "contains invalid UTF-8" in error) == (500, True)
        assert listener.write(line)[0] == 500


@pytest.mark.parametrize(
    "value",
    """1i 9223372036854775807i -9223372036854775808i 9223372036854775808i -9223372036854775809i 1u
    18446744073709551615u NaN nan +Inf -Inf inf -0.0 1e300 5e-324 1.7976931348623157e308 1e400
    -1e400 1e-400 0.30000000000000004 1. .5 . -. - -i i +1 0x10 1_000 1e5i 1e 1e+ 1E5 1.5i 1.1.1
    t T true True TRUE tRUE f F false False FALSE tt falsch None null "" "a" "a"b "a""b" 'a' 00012
    000000000000000000000000000001i 9i9i 9i9 1ii -1e-5 1-1""".split(),  # noqa: SIM905 - quotes in quotes would be harder to read
)
def test_each_number(influxd: Influxd, listener: Listener, database: str, value: str) -> None:
    both(influxd, database, listener, f"m f={value} 1".encode())

    theirs = read_back(influxd, database).values()
    assert list(map(exactly, theirs)) == list(map(exactly, listener.points()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_time_bound(
    influxd: Influxd, listener: Listener, database: str, precision: str
) -> None:
    last = 9223372036854775806 // UNITS.get(precision, 1)
    for tick in (last, -last, last + 1, -last - 1, -last - 2, 0, -1, "+5", "1.5", "1e18", "-", "x"):
        both(influxd, database, listener, f"m f=1 {tick}".encode(), precision=precision)

    theirs = read_back(influxd, database)
    assert settled(theirs.values()) == settled(listener.points())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_time_it_is_the_servers_in_whole_units(
    influxd: Influxd, listener: Listener, database: str, precision: str
) -> None:
    unit = UNITS.get(precision, 1)
    earliest = time.time_ns() // unit * unit

    both(influxd, database, listener, b"m,t=a f=1\nm,t=b f=2 ", precision=precision)

    latest = time.time_ns()
    for points in (read_back(influxd, database).values(), listener.points()):
        assert [point.tags for point in points] == [{"t": "a"}, {"t": "b"}]
        for point in points:
            assert isinstance(point.timestamp, int)
            assert earliest <= point.timestamp <= latest
            assert point.timestamp % unit == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\n\n", b"# c", b"good f=1 1\nbad\ngood f=1 2\nworse", b"bad\nworse", b"m f=1 1\r\n",
        b"m f=1 1 m f=2 2", b"m,a=1,a=2 f=1", b"b,c=2,a=1 f=1,f=2 1", b"m f=1 1\nm f=1i 2\nn g=1",
        b"m,time=1 f=1\nn f=1", b"m time=1\nn f=1", b"m time=1,f=2 3", b"  m f=1 1  \n",
        b"\xef\xbb\xbfm f=1 1", b"m," + b"k" * 65530 + b"=v f=1", b"m " + b"f" * 65531 + b"=1",
        b"m " + b"f" * 65530 + b"=1 1", b"m f=1,f=t 5", b"b,a=1,c=2 f=1 1\nb,c=2,a=1 g=2 1",
        b"_ f=1 1\n_x f=1 1\n_field f=1 1\n_measurement f=1 1\ntime f=1 1\n#x f=1 1\n\\#x f=1 1",
        b"m f=1 1\n\n \nn f=1 2\n\n", b"i f=1i 1\ni f=1.5 2", b"m f=t,g=1 1\nm g=1 2",
        b"m,t=" + b"v" * 65526 + b" f=1 1", b"m,t=" + b"v" * 65524 + b"\\, f=1 1",
        b"m,t=" + b"v" * 65525 + b"\\, f=1 1",
        b"i f=1 1\ni f=t 2\nj f=1 3\nj f=t 4\nk f=1 5", b'm f="x" 1\nm f=t 2\nm f=2 3',
        b'm s="' + b"s" * 200_000 + b'" 1', b"m f=2 -9223372036000000000\nm f=3 9223372036000000000",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_each_body(influxd: Influxd, listener: Listener, database: str, body: bytes) -> None:
    for each in (b"m f=1 9", b"old f=1 9", body):
        both(influxd, database, listener, each)

    same_points(influxd, database, listener)


@pytest.mark.parametrize("before", [b"", b"old f=1 1", b"old f=1 %d" % (9 * WEEK)], ids=repr)
@pytest.mark.parametrize("conflicts", [1, 2, 3])
def test_two_types_for_new_fields_store_nothing_of_a_shard_until_it_knows_them(
    influxd: Influxd, listener: Listener, database: str, before: bytes, conflicts: int
) -> None:
    points = (b"m%d f=1 1\nm%d f=t 2" % (number, number) for number in range(conflicts))
    body = b"\n".join([*points, b"last f=1 3", b"later f=1 %d" % (9 * WEEK)])

    for each in (before, *[body] * 3):
        both(influxd, database, listener, each)

        same_points(influxd, database, listener)
    assert listener.count("last") == 1


def test_a_field_has_a_type_of_its_own_in_each_week(
    influxd: Influxd, listener: Listener, database: str
) -> None:
    both(influxd, database, listener, b"m f=1 0")
    for day in range(-8, 9):
        both(influxd, database, listener, b"m f=t %d" % (day * WEEK // 7))


def test_a_tag_and_a_field_of_one_name_are_both_kept(
    influxd: Influxd, database: str, listener: Listener
) -> None:
    both(influxd, database, listener, b"m,a=x a=1 1")

    assert listener.points() == [Point("m", {"a": 1.0}, {"a": "x"}, 1)]
    found = influxd.query('SELECT "a"::field, "a"::tag FROM m', database)
    assert found[0]["values"] == [[1, 1, "x"]]


def test_points_older_than_the_retention_are_dropped_alone(influxd: Influxd) -> None:
    database = influxd.udp_database
    influxd.query(f'DROP DATABASE "{database}"')
    influxd.query(f'CREATE DATABASE "{database}" WITH DURATION 1h')
    now = time.time_ns()
    old, ancient, coming = now - 2 * UNITS["h"], -(10**18), now + 10**18
    with Listener(retention=3600) as listener:
        both(influxd, database, listener, b"m f=1 %d" % now)
        for body in (
            b"m,t=%b f=1 %d\nm,t=%b f=2 %d\nm,t=%b f=3 %d" % (name, old, name, now, name, ancient)
            for name in (b"a", b"b")
        ):
            both(influxd, database, listener, body)
        both(influxd, database, listener, b"m,t=c f=1 %d\nbad" % old)
        both(influxd, database, listener, b"m,t=d f=1 %d\nm,t=d f=t %d" % (old, now))
        both(influxd, database, listener, b"m,t=e f=1 %d" % coming)
        datagram = b"m,t=f f=1 1\nm,t=g f=2 %d" % now
        send(influxd, listener, datagram, b"fence ok=t %d" % now)

        theirs = read_back(influxd, database).values()
        kept = {(point.tags or {}).get("t") for point in theirs}
        assert sorted(map(exactly, theirs)) == sorted(map(exactly, listener.points()))
    influxd.query(f'DROP DATABASE "{database}"')
    influxd.query(f'CREATE DATABASE "{database}"')
    assert kept == {None, "a", "b", "e", "g"}


def test_each_bad_request(influxd: Influxd, listener: Listener) -> None:
    zipped = {"Content-Encoding": "gzip"}
    large = b"#" * 25_000_001

    def answers(url: str, name: str) -> list[tuple[int | str | None, ...]]:
        found: list[tuple[int | str | None, ...]] = []
        for params, options in (
            ({"db": name, "rp": "nope"}, {"data": b"m f=1"}),
            ({"db": "nodb"}, {"data": b"m f=1"}),
            ({}, {"data": b"m f=1"}),
            ({"db": name}, {"data": b"x", "headers": zipped}),
            ({"db": name}, {"data": gzip.compress(b"m f=1 1"), "headers": zipped}),
            ({"db": name}, {"data": gzip.compress(large, 1), "headers": zipped}),
            ({"db": name}, {"data": large}),
            ({"db": name}, {"data": iter([large])}),
            ({"db": name}, {"data": b"bad\n" + "é".encode() * 700}),
        ):
            answer = requests.post(f"{url}/write", params=params, timeout=10, **options)
            error = answer.json().get("error") if answer.content else None
            found.append((answer.status_code, error, answer.headers.get("X-Influxdb-Error")))
        paths = ("/ping", "/ping?verbose=true", "/write", "/health", "/api/v2/write")
        found += [(requests.get(url + path, timeout=10).status_code,) for path in paths]
        return [*found, (requests.head(f"{url}/ping", timeout=10).status_code,)]

    assert answers(listener.http_url, "celery") == answers(influxd.http_url, influxd.udp_database)


@pytest.mark.parametrize(
    "datagram",
    [
        b"x f=1 1\nbad\nx f=1 2", b"x f=1 1\nx,time=1 f=1 2", b"x f=1 1\nold f=t 2", b"x f=1 1\n\n",
        b"x f=1 1 x f=1 2", b"x f=1 1\r\nx f=1 2", b"x f=1 1\nx f=NaN 2", b"", b"\x1f\x8b\x08x",
        b"x f=1 -1", b"x f=1 99999999999999999999", b"x f=1 1\nx f=t 2", b"x f=1 -9200000000000000000",
        b'x s="' + b"s" * (MAX_DATAGRAM - 8) + b'" 1', b"x f=1\nx,t=v f=2", b"\n\nx f=1 1\n# c\n\nx f=1 2",
        b"x,\xff=v f=1 1\nx f=1 1", b"x,k=\xff f=1 1\nx f=1 1", b'x s="\xff" 1\nx f=1 1',
    ],
    ids=lambda datagram: repr(datagram[:30]),
)  # fmt: skip
def test_each_datagram(influxd: Influxd, datagram: bytes) -> None:
    with Listener() as listener:
        same_of_a_datagram(influxd, listener, datagram)


@pytest.mark.parametrize("line", [b"x\xff f=1 1", b"x \xff=1 1"], ids=repr)
def test_bytes_that_are_no_text_cost_a_datagram_all_its_points(
    influxd: Influxd, listener: Listener, line: bytes
) -> None:
    database = influxd.udp_database
    influxd.query(f'DROP DATABASE "{database}"')
    influxd.query(f'CREATE DATABASE "{database}"')

    _, failed = batches(influxd)

    # In influxd they cost the whole batch, and that may be more than one datagram.
    datagram = line + b"\nx f=1 1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(datagram, ("127.0.0.1", influxd.udp_port))
        wait_for(lambda: batches(influxd)[1] > failed, 10)
        sock.sendto(datagram, ("127.0.0.1", listener.udp_port))
    send(influxd, listener, b"fence ok=t 1")

    for points in (read_back(influxd, database).values(), listener.points()):
        assert [point.measurement for point in points] == ["fence"]


@pytest.mark.parametrize("precision", ["n", "u", "us", "ms", "s"])
def test_each_precision_of_datagrams(tmp_path: Path, precision: str) -> None:
    nanoseconds, seconds = b"x f=1 1700000000000000000", b"x f=1 1700000000"
    with Influxd(tmp_path, udp_precision=precision) as influxd:
        for datagram in (
            b"x f=1 1", seconds, nanoseconds, b"x f=1 1\n" + nanoseconds, b"x f=1 -1", b"x f=1",
        ):  # fmt: skip
            with Listener(udp_precision=precision) as listener:
                same_of_a_datagram(influxd, listener, datagram, UNITS.get(precision, 1))


def send(influxd: Influxd, listener: Listener, *datagrams: bytes) -> None:
    """Send datagrams to both, the last of which writes a point ``fence``; wait for all of them."""
    before = sum(batches(influxd))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for port in (influxd.udp_port, listener.udp_port):
            for datagram in datagrams:
                sock.sendto(datagram, ("127.0.0.1", port))
    listener.wait_for(lambda: listener.count("fence"))
    wait_for(lambda: influxd.count("fence", "ok"), 10)
    # It may be seen before others of its batch, which are written to other shards meanwhile.
    wait_for(lambda: sum(batches(influxd)) > before, 10)


def batches(influxd: Influxd) -> tuple[int, int]:
    """How many batches of datagrams influxd has stored, and how many it could not."""
    (found,) = influxd.query("SHOW STATS FOR 'udp'")
    row = dict(zip(found["columns"], found["values"][0], strict=True))
    return row["batchesTx"], row["batchesTxFail"]


def same_of_a_datagram(
    influxd: Influxd, listener: Listener, datagram: bytes, unit: int = 1
) -> None:
    """Send it to both, in a database with a shard, and one more that shows that it was read."""
    database = influxd.udp_database
    influxd.query(f'DROP DATABASE "{database}"')
    influxd.query(f'CREATE DATABASE "{database}"')
    old = b"old f=1 1\nold f=1 -1"
    for body in old.split(b"\n"):
        assert influxd.write(body, database)[0] == 204
    listener.write(old)

    send(influxd, listener, datagram, b"fence ok=t 1")

    theirs = read_back(influxd, database).values()
    assert settled(theirs, unit) == settled(listener.points(), unit)


def broken(hostile: Hostile, number: int, breaks: int) -> str:
    """A line broken in so many places; every second one never was whole."""
    pieces = ["m", ",", "=", " ", "\\", '"', "1", "i", "t", "\n", "\t", "\0", "#", "-", ".", "e"]
    line = f'm{number},a={hostile.mild()} f=1,g="x y" 1' if number % 2 else ""
    for _ in range(breaks if line else 12):
        place = hostile.below(len(line) + 1)
        line = line[:place] + str(hostile.one_of(pieces)) + line[place:]
    return line


def test_as_many_lines_cannot_be_read_at_a_glance_as_when_they_are_read() -> None:
    hostile = Hostile(4)
    whole = 0
    for number in range(6_000):
        body = "\n".join(broken(hostile, number, breaks) for breaks in range(number % 3)).encode()

        found = unreadable(body)

        reasons = parse(body)[1]
        assert found == sum(why.startswith("unable to parse") for why in reasons), body
        whole += body != b"" and not reasons
    assert 500 < whole < 5_000


def test_random_lines_are_read_as_influxd_reads_them(influxd: Influxd, database: str) -> None:
    """Lines broken at random, each sent on its own, and one good line after it."""
    hostile = Hostile(3)
    session = requests.Session()
    with Listener() as listener:
        for number in range(800):
            line = broken(hostile, number, 4)
            body = f"{line}\nz{number} f=1 1".encode()
            if any("slice bounds" in reason for reason in parse(body)[1]):
                continue  # would end influxd
            answer = session.post(
                f"{influxd.http_url}/write", params={"db": database}, data=body, timeout=10
            )
            error = answer.json()["error"] if answer.content else ""
            assert listener.write(body) == (answer.status_code, error), body


def test_decode_reads_what_encode_wrote_for_a_whole_alphabet() -> None:
    for code in [*range(0x300), 0x2028, 0xFEFF, 0xFFFF, 0x10FFFF]:
        point = Point("m", {f"a{chr(code)}b": chr(code)}, {f"t{chr(code)}": "v"}, 1)
        if chr(code) not in "\n\\":
            assert decode(encode(point)) == point
