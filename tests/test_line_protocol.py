"""encode and decode on their own; tests/conformance/ holds them against influxd."""

from __future__ import annotations

import enum
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_influx.errors import DecodeError, FieldError, PointError
from celery_influx.line_protocol import Encoder, encode
from celery_influx.line_reader import MAX_TIME, MIN_TIME, decode, parse
from celery_influx.point import Point, Precision

F = {"f": 1.5}


class Word(str):
    """A str subclass, as enum.StrEnum makes them."""

    __slots__ = ()


class Colour(Word, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Plain(enum.Enum):
    HALF = 0.5


class Liar(str):
    """Claims to be equal to everything."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("cpu")


class Broken:
    """Nothing can be got out of it."""

    def __str__(self) -> str:
        raise KeyError("no text")

    __repr__ = __str__


def test_a_point_becomes_one_line() -> None:
    point = Point("cpu load", {"a b": 1.5, "n": 3, "ok": True, "s": 'x"\\'}, {"h,1": "=v"}, 17)

    assert encode(point) == rb'cpu\ load,h\,1=\=v a\ b=1.5,n=3i,ok=true,s="x\"\\" 17'


def test_a_point_without_tags_and_time_has_neither_in_its_line() -> None:
    assert encode(Point("m", F)) == b"m f=1.5"
    assert decode(b"m f=1.5") == Point("m", F, None, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, b"true"), (False, b"false"), (3, b"3i"), (Level.HIGH, b"3i"), (-(2**63), b"-9223372036854775808i"),
        (2**63 - 1, b"9223372036854775807i"), (1e300, b"1e+300"), (-0.0, b"-0.0"), (Plain.HALF, b"0.5"),
        (Colour.RED, b'"red"'), (Word("w"), b'"w"'), (Decimal("1.25"), b"1.25"), ("a\nb\0", b'"a\nb\0"'),
        ("", b'""'),
    ],
)  # fmt: skip
def test_a_field_value_is_written_by_what_it_is(value: object, text: bytes) -> None:
    assert encode(Point("m", {"f": value})) == b"m f=" + text


def test_numpy_scalars_are_written_as_what_they_hold() -> None:
    np = pytest.importorskip("numpy")
    values = {
        "a": np.float64(0.1), "b": np.float32(0.5), "c": np.int64(2), "d": np.uint8(3),
        "e": np.bool_(True), "g": np.str_("x"), "h": np.array(4),
    }  # fmt: skip

    line = encode(Point("m", values, {"t": np.int64(5)}, np.int64(6)))

    assert line == b'm,t=5 a=0.1,b=0.5,c=2i,d=3i,e=true,g="x",h=4i 6'
    for refused in (np.datetime64("2020-01-01"), np.bytes_(b"x"), np.array([1]), np.uint64(2**63)):
        with pytest.raises(FieldError):
            encode(Point("m", {"f": refused}))


@pytest.mark.parametrize(
    "value",
    [2**63, -(2**63) - 1, 10**5000, b"x", [1], {}, datetime(2020, 1, 1), object(), 1j, Broken(),
     timedelta(1)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_of_no_field_type_is_refused_with_advice(value: object) -> None:
    with pytest.raises(FieldError, match=r"point 'm': field 'f': .*Send "):
        encode(Point("m", {"f": value}))


def test_nan_and_infinity_are_left_out_and_counted_and_none_is_only_left_out() -> None:
    counts: list[int] = []
    nan, inf = float("nan"), float("inf")
    encoder = Encoder(on_left_out=counts.append)

    line = encoder.encode(Point("m", {"a": nan, "b": inf, "c": -inf, "d": None, "f": 1}))
    encoder.encode(Point("m", {"a": None, "f": 1}))
    encoder.encode(Point("m", {"a": Decimal("NaN"), "b": Decimal("sNaN"), "f": 1}))

    assert line == b"m f=1i"
    assert counts == [3, 2]


@pytest.mark.parametrize("fields", [{}, {"a": None}, {"a": float("nan")}])
def test_a_point_without_fields_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="point 'checkout': no fields; InfluxDB stores only"):
        encode(Point("checkout", fields, {"t": "v"}))


def test_empty_and_none_tags_are_left_out_and_other_values_become_text() -> None:
    tags = {"a": "", "b": None, "c": 1, "d": True, "e": Word("w"), "g": 0.5, "h": Colour.RED}

    assert encode(Point("m", F, tags)) == b"m,c=1,d=True,e=w,g=0.5,h=red f=1.5"


def test_constant_tags_are_on_every_point_and_the_points_own_win() -> None:
    line = Encoder(tags={"host": "h 1", "none": None, "worker": "w"}).encode

    assert line(Point("m", F)) == rb"m,host=h\ 1,worker=w f=1.5"
    assert line(Point("m", F, {"t": "v"})) == rb"m,host=h\ 1,worker=w,t=v f=1.5"
    assert line(Point("m", F, {"host": "x"})) == b"m,host=x,worker=w f=1.5"
    assert line(Point("m", F, {"host": None})) == b"m,worker=w f=1.5"
    assert line(Point("m", F, MappingProxyType({"host": ""}))) == b"m,worker=w f=1.5"


@pytest.mark.parametrize("tags", [{"time": "x"}, {"": "x"}, {"a": "x\n"}, {1: "x"}, "tags"])
def test_constant_tags_that_cannot_be_stored_are_refused_at_once(tags: Any) -> None:
    with pytest.raises(PointError, match="constant tags"):
        Encoder(tags=tags)


def test_constant_tags_with_a_backslash_are_written_too() -> None:
    assert Encoder(tags={"p": "c:\\x"}).encode(Point("m", F)) == rb"m,p=c:\x f=1.5"


def test_the_clock_is_asked_only_for_points_without_a_time() -> None:
    times = iter([5_000_000_007])
    encoder = Encoder(clock=lambda: next(times), precision=Precision.S)

    assert encoder.encode(Point("m", F, None, 2_999_999_999)) == b"m f=1.5 2"
    assert encoder.encode(Point("m", F)) == b"m f=1.5 5"


@pytest.mark.parametrize(
    ("precision", "text"),
    [("ns", b"-1500000001"), ("u", b"-1500001"), ("ms", b"-1501"), ("s", b"-2")],
)
def test_times_are_rounded_down_to_the_precision(precision: str, text: bytes) -> None:
    line = Encoder(precision=Precision(precision)).encode(Point("m", F, None, -1_500_000_001))

    assert line == b"m f=1.5 " + text


def test_datetimes_are_exact_and_naive_ones_are_utc() -> None:
    east = timezone(timedelta(hours=2))

    def written(time: datetime) -> bytes:
        return encode(Point("m", F, None, time)).split()[-1]

    assert written(datetime(2262, 4, 11, 23, 47, 16, 854775)) == b"9223372036854775000"
    assert written(datetime(2001, 9, 9, 3, 46, 40, 1, tzinfo=east)) == b"1000000000000001000"
    assert written(datetime(1969, 12, 31, 23, 59, 59, 999999)) == b"-1000"


@pytest.mark.parametrize("time", [MIN_TIME, MAX_TIME, 0, -1])
def test_times_up_to_the_bounds_are_written(time: int) -> None:
    assert decode(encode(Point("m", F, None, time))).timestamp == time


@pytest.mark.parametrize(
    "time",
    [MIN_TIME - 1, MAX_TIME + 1, 10**30, True, 1.5, 1e18, "1", datetime(2300, 1, 1), Broken()],
    ids=lambda value: type(value).__name__,
)
def test_other_times_are_refused(time: Any) -> None:
    with pytest.raises(PointError, match="timestamp"):
        encode(Point("m", F, None, time))


def test_rounding_down_must_not_leave_the_bounds() -> None:
    with pytest.raises(PointError, match="timestamp"):
        Encoder(precision=Precision.S).encode(Point("m", F, None, MIN_TIME))


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (Point("", F), "measurement '' is empty"),
        (Point("#m", F), "begins with #"),
        (Point("\tm", F), "begins with a tab or NUL"),
        (Point("\0m", F), "begins with a tab or NUL"),
        (Point("m\\", F), "ends in a backslash"),
        (Point("a\\ b", F), "backslash before a comma"),
        (Point('a\\"b', F), "backslash before a comma"),
        (Point("a\nb", F), "newline"),
        (Point("_series", F), "InfluxDB's own"),
        (Point("a#!~#b", F), "#!~"),
        (Point("\ud800", F), "surrogate"),
        (Point("m", F, {"": "v"}), "tag key '' is empty"),
        (Point("m", F, {"time": "v"}), "time column"),
        (Point("m", F, {"k\\": "v"}), "tag key .* ends in a backslash"),
        (Point("m", F, {"k": "v\n"}), "tag 'k': value .* newline"),
        (Point("m", F, {"k": "v#!~"}), "#!~"),
        (Point("m", F, {"k": "v" * 65530}), "too long|bytes together"),
        (Point("m", F, {"k": "v" * 40000, "l": "v" * 40000}), "bytes together"),
        (Point("m", {"": 1}), "field key '' is empty"),
        (Point("m", {"time": 1}), "time column"),
        (Point("m", {"f\\": 1}), "ends in a backslash"),
        (Point("m", {"a\\,b": 1}), "backslash before a comma"),
        (Point("m", {"\tf": 1}), "begins with a tab or NUL; add a field"),
        (Point("m", {"_name": 1}), "InfluxDB's own"),
        (Point("m", {"f": "\udfff"}), "surrogate"),
        (Point(1, F), "measurement 1: expected a str"),  # type: ignore[arg-type]
        (Point("m", []), "fields .*: expected a mapping"),  # type: ignore[arg-type]
        (Point("m", F, "t"), "tags 't': expected a mapping"),  # type: ignore[arg-type]
        (Point("m", F, {1: "v"}), "tags: key 1: expected a str"),  # type: ignore[dict-item]
        (Point("m", {1: 1}), "fields: key 1: expected a str"),  # type: ignore[dict-item]
        (Point("m", F, {"k": Broken()}), "tag 'k': str"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_and_why(point: Point, reason: str) -> None:
    with pytest.raises(PointError, match=reason) as caught:
        encode(point)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "point",
    [
        Point("a\\b", F), Point("a\\\nb", F), Point("a=b", F), Point('"m"', F), Point("a\0", F),
        Point(" ", F), Point("a\rb\x0b\x0c", F), Point("time", F), Point("_tags", F),
        Point("m", F, {"a\\ b": "c\\,d", 'e\\"': "\\="}), Point("m", F, {"\0": "\t"}),
        Point("m", F, {"a\\\nb": "c\\\nd"}),
        Point("m", {'a\\"b': 1, "c\\\\,d": 2, "e\\f": 3}), Point("m", {"\tf": 1, "g": 2}),
        Point("m", {"\0": 1, "g": 2}), Point("m", {"f#!~#": 1}), Point("m#!", F),
        Point("m", {"s": "x" * 200_000}), Point("m", {"f" * 65530: 1}),
        Point("m", F, {"a": "x\\ y", "b": "z"}),
    ],
)  # fmt: skip
def test_odd_names_that_influxdb_stores_are_written(point: Point) -> None:
    line = encode(point)

    assert decode(line) == point
    assert parse(line + b"\nn g=1") == ([point, Point("n", {"g": 1.0})], [])


def test_the_order_of_tags_is_changed_where_that_saves_the_point() -> None:
    tags = {"b,": ":", "é": "-\\ \\\\,/", "😀,= a": "\\=1"}
    point = Point("/", {'"\\😀"=': "'bb", "host": '"', '"é': "😀"}, tags)

    assert parse(encode(point) + b"\nn g=1") == ([point, Point("n", {"g": 1.0})], [])


def test_a_line_never_swallows_the_next_one() -> None:
    opens_quotes = b'm,c=p\\\\ q\\\\="r f=1.5'
    assert decode(opens_quotes) == Point("m", F, {"c": 'p\\ q\\="r'})
    assert len(parse(opens_quotes + b"\nn g=1")[0]) == 0

    with pytest.raises(PointError, match=r"tag 'c': value .* has a backslash before"):
        encode(Point("m", F, {"c": 'p\\ q\\="r'}))


def test_keys_that_lie_are_taken_by_their_text() -> None:
    encode(Point("cpu", F, {"cpu": "cpu"}))

    assert encode(Point(Liar("a b"), {Liar("c,"): Liar("d")})) == b'a\\ b c\\,="d"'
    with pytest.raises(PointError, match="twice"):
        encode(Point("m", Pairs([("a", 1), (Word("a"), 2)])))


class Pairs(Mapping[str, Any]):
    """A mapping that may hold a key twice, or raise."""

    def __init__(self, pairs: list[tuple[str, Any]] | None) -> None:
        self.pairs = pairs

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1

    def items(self) -> Any:
        if self.pairs is None:
            raise RuntimeError("gone")
        return self.pairs


def test_a_mapping_that_raises_is_a_point_error() -> None:
    with pytest.raises(PointError, match="cannot be read"):
        encode(Point("m", Pairs(None)))


def test_ever_new_names_do_not_fill_the_memory() -> None:
    encoder = Encoder()
    for number in range(10_000):
        encoder.encode(Point(f"m{number}", {f"f{number}": 1}, {f"k{number}": f"v{number}"}))

    tracemalloc.start()
    for number in range(20_000):
        encoder.encode(Point(f"n{number}", {f"g{number}": 1}, {f"l{number}": f"w{number}"}))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 3_000_000


# -- decode and parse --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"m", "unable to parse 'm': missing fields"),
        (b",a=b f=1", "missing measurement"),
        (b"m, f=1", "missing tag key"),
        (b"m,a f=1", "missing tag value"),
        (b"m,a= f=1", "missing tag value"),
        (b"m,a=b=c f=1", "invalid tag format"),
        (b"m,a=b,a=c f=1", "duplicate tags"),
        (b"m f", "invalid field format"),
        (b"m f=", "missing field value"),
        (b"m =1", "missing field key"),
        (b"m f=1,", "invalid field format"),
        (b'm f="', "unbalanced quotes"),
        (b"m f=1x", "invalid number"),
        (b"m f=1u", "invalid number"),
        (b"m f=1e400", "invalid float"),
        (b"m f=x", "invalid boolean"),
        (b"m f=9223372036854775808i", 'parsing "9223372036854775808": value out of range'),
        (b"m f=1 x", "bad timestamp"),
        (b"m f=1 1 2", "point is invalid"),
        (b"m f=1 9223372036854775807", "time outside range"),
        (b"m f=1 " + b"9" * 5000, "value out of range"),
        (b"m f=1,f=t", "field type conflict"),
        (b"m,time=1 f=1", 'invalid tag key: input tag "time" on measurement "m" is invalid'),
        (b"m time=1", 'invalid field name: input field "time" on measurement "m" is invalid'),
        (b"m\xff f=1", "contains invalid UTF-8"),
        (rb'm a\\="=\="', "engine: unable to parse bool value"),
        # Sent to influxd 1.6.7, this line ends the server.
        (rb'm a\\="b="', "engine: slice bounds out of range"),
        (b"", "expected one line"),
        (b"# m f=1", "expected one line"),
        (b"m f=1\nm f=1", "expected one line"),
    ],
)
def test_decode_refuses_in_influxds_words(line: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(line)
    assert reason in str(caught.value)


def test_the_unit_moves_the_time_bounds() -> None:
    assert decode(b"m f=1 9223372036", 1_000_000_000).timestamp == 9223372036
    with pytest.raises(DecodeError, match="time outside range"):
        decode(b"m f=1 9223372037", 1_000_000_000)


def test_parse_skips_comments_and_blanks_and_keeps_the_good_lines() -> None:
    points, refused = parse(b'\n# x\n \t a f=1\nbad\nb f="x\ny" 2\n\n')

    assert points == [Point("a", {"f": 1.0}), Point("b", {"f": "x\ny"}, None, 2)]
    assert refused == ["unable to parse 'bad': missing fields"]


def test_a_field_time_is_dropped_alone() -> None:
    assert decode(b"m time=1,f=2") == Point("m", {"f": 2.0})


# -- properties --------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text(
    '\\, ="\n\t\0#ab', max_size=8
)
values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names
)
points = st.builds(
    Point,
    names,
    st.dictionaries(names, values, min_size=1, max_size=4),
    st.none() | st.dictionaries(names, names.filter(bool), min_size=1, max_size=4),
    st.none() | st.integers(MIN_TIME, MAX_TIME),
)


@given(points, points)
@settings(max_examples=300, deadline=None)
def test_what_is_encoded_is_decoded_as_it_was(point: Point, other: Point) -> None:
    lines = []
    kept = []
    for one in (point, other):
        try:
            lines.append(encode(one))
        except PointError:
            continue
        kept.append(one)
        back = decode(lines[-1])
        assert repr(sorted(back.fields.items())) == repr(sorted(one.fields.items()))
        assert back == one

    assert parse(b"\n".join(lines)) == (kept, [])


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | values | st.floats() | st.binary() | st.decimals() | st.text() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.builds(Point, anything, anything, anything, anything))
@settings(max_examples=400, deadline=None)
def test_whatever_is_given_only_a_point_error_is_raised(point: Point) -> None:
    for encoder in (encode, Encoder(tags={"a": "b\\c"}, precision=Precision.MS).encode):
        try:
            line = encoder(point)
        except PointError:
            continue
        decode(line)


@given(st.binary(max_size=60) | st.text('m,a=1 "\\\n\t', max_size=40).map(os.fsencode))
@settings(max_examples=600, deadline=None)
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    points, refused = parse(payload)

    assert all(isinstance(point, Point) and point.fields for point in points)
    assert all(isinstance(reason, str) for reason in refused)
