"""encode and decode on their own; tests/conformance/ holds them against influxd."""

from __future__ import annotations

import enum
import os
import tracemalloc
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_influx.errors import DecodeError, FieldError, PointError
from celery_influx.field_types import FieldTypes, TypeTable
from celery_influx.line_protocol import Encoder, encode, make_encode
from celery_influx.line_reader import MAX_TIME, MIN_TIME, decode, parse
from celery_influx.point import Point, Precision
from tests.servers import load

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
        ("", b'""'), (Decimal("0.1000000000000000000001"), b"0.1"), (Decimal(2**64), b"1.8446744073709552e+19"),
        (Decimal("1e-400"), b"0.0"), (Decimal("-1.79769313486231575e308"), b"-1.7976931348623157e+308"),
    ],
)  # fmt: skip
def test_a_field_value_is_written_by_what_it_is(value: object, text: bytes) -> None:
    assert encode(Point("m", {"f": value})) == b"m f=" + text


def test_numpy_scalars_are_written_as_what_they_hold() -> None:
    np = load("numpy")
    values = {
        "a": np.float64(0.1), "b": np.float32(0.5), "c": np.int64(2), "d": np.uint8(3),
        "e": np.bool_(True), "g": np.str_("x"), "h": np.array(4), "i": np.float16(0.5),
        "j": np.longdouble(1.5), "k": np.array(np.longdouble(0.25)), "l": np.longdouble("nan"),
        "m": -np.longdouble("inf"),
    }  # fmt: skip

    line = encode(Point("m", values, {"t": np.int64(5)}, np.int64(6)))

    assert line == b'm,t=5 a=0.1,b=0.5,c=2i,d=3i,e=true,g="x",h=4i,i=0.5,j=1.5,k=0.25 6'
    for refused in (
        np.datetime64("2020-01-01"), np.bytes_(b"x"), np.array([1]), np.array([1.5]), np.uint64(2**63),
        np.clongdouble(1), np.longdouble("1e4000"),
    ):  # fmt: skip
        with pytest.raises(FieldError):
            encode(Point("m", {"f": refused}))


def test_nan_and_infinity_are_left_out_and_counted_and_none_is_only_left_out() -> None:
    counts: list[int] = []
    nan, inf = float("nan"), float("inf")
    encoder = Encoder(on_left_out=counts.append)

    line = encoder.encode(Point("m", {"a": nan, "b": inf, "c": -inf, "d": None, "f": 1}))
    encoder.encode(Point("m", {"a": None, "f": 1}))
    encoder.encode(Point("m", {"a": Decimal("NaN"), "b": Decimal("sNaN"), "f": 1}))
    encoder.encode(Point("m", {"a": Decimal("-Infinity"), "f": 1}))

    assert line == b"m f=1i"
    assert counts == [3, 2, 1]


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


@pytest.mark.parametrize(
    ("fields", "tags"),
    [
        (
            {'"\\😀"=': "'bb", "host": '"', '"é': "😀"},
            {"b,": ":", "é": "-\\ \\\\,/", "😀,= a": "\\=1"},
        ),
        ({" ": 1}, {'"\\ ': "\\ ", "p": "v", "q": "v", "r": "v", "s": "v", " ": '"'}),
        ({"f": "a\nb"}, {f"d\\ {number}": '"' for number in range(40)}),
        (dict.fromkeys("abcdef", 'x, y = "z"\\n' * 99), {'"\\ ': "\\ ", " ": '"'}),
        ({'\\="': True, "\\,a": '"'}, None),
    ],
    ids=["first", "six tags", "40 that mislead", "long strings", "fields"],
)
def test_the_order_of_tags_and_fields_is_changed_where_that_saves_the_point(
    fields: dict[str, Any], tags: dict[str, str] | None
) -> None:
    point = Point("/", fields, tags)

    assert parse(encode(point) + b"\nn g=1") == ([point, Point("n", {"g": 1.0})], [])


def test_an_order_that_is_not_there_is_not_looked_for_too_long() -> None:
    tags = {f"d{number}": "p\\ q" + "\\," * number for number in range(1, 40)}

    with pytest.raises(PointError, match="would together end the line at another place"):
        encode(Point("m", {"f": "a\nb"}, tags))


def test_a_line_never_swallows_the_next_one() -> None:
    opens_quotes = b'm,c=p\\\\ q\\\\="r f=1.5'
    assert decode(opens_quotes) == Point("m", F, {"c": 'p\\ q\\="r'})
    assert len(parse(opens_quotes + b"\nn g=1")[0]) == 0

    with pytest.raises(PointError):
        encode(Point("m", F, {"c": 'p\\ q\\="r'}))


def test_keys_that_lie_are_taken_by_their_text() -> None:
    encode(Point("cpu", F, {"cpu": "cpu"}))

    assert encode(Point(Liar("a b"), {Liar("c,"): Liar("d")})) == b'a\\ b c\\,="d"'


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


def test_nor_do_they_where_their_types_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FieldTypes, "MOST", 50)
    types = FieldTypes(TypeTable(), lambda *_: None, lambda *_: None)
    encode_typed = make_encode({}, 1, None, None, None, types)

    def encode_each(numbers: range) -> None:
        for number in numbers:
            for _ in range(2):  # what is kept is kept at the second time
                encode_typed(Point(f"m{number}", {f"f{number}": 1}, {"k": "v"}))

    encode_each(range(4_200))
    tracemalloc.start()
    encode_each(range(4_200, 12_200))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 5_000_000


def test_what_types_were_kept_and_are_not_any_more_no_encoder_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FieldTypes, "MOST", 200)
    types = FieldTypes(TypeTable(), lambda *_: None, lambda *_: None)
    encode_typed = Encoder(types=types).encode

    tracemalloc.start()
    for number in range(100):
        names = [f"{number * 200 + each:0300d}" for each in range(200)]
        for some in (["f"], ["f"], names[:100], names[100:], ["f"], ["f"]):
            encode_typed(Point("m", dict.fromkeys(some, 1), None))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 5_000_000


# -- decode and parse --------------------------------------------------------------------------


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
