"""Line protocol: points to bytes, for influxd 1.x. No I/O, clock or log.

``implementation`` says what encodes ordinary points: "c", the extension, or "python"; see
``speedups``. Both write the same bytes.

Whatever ``encode`` returns is stored by InfluxDB exactly as given; a point that cannot be is
refused. Ordinary names go a fast way. Where a name holds a backslash or a control character,
``line_reader``, which follows influxd's own, has the last word on the line.

Rules: https://docs.influxdata.com/influxdb/v1/write_protocols/line_protocol_reference/
Checked against influxd 1.6.7 and influxdata/line-protocol-corpus: tests/conformance/
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from enum import Enum
from types import ModuleType
from typing import Any, TypeVar

from celery_influx.errors import DecodeError, FieldError, PointError, show, show_caught
from celery_influx.field_types import FieldTypes
from celery_influx.line_reader import (
    MAX_INT,
    MAX_KEY_LENGTH,
    MAX_TIME,
    MIN_INT,
    MIN_TIME,
    as_stored,
    line_end,
    read_line,
)
from celery_influx.line_search import find
from celery_influx.point import Point, Precision
from celery_influx.speedups import extension

implementation = "c" if extension else "python"

# influxd's storage joins series key and field key with this and, when it starts, parts them at
# its first appearance: a series key holding it comes back from a restart as another series.
_SEPARATOR = b"#!~#"
# Names of influxd's own virtual tables: it takes points for them, and no query finds them.
_SYSTEM_NAMES = frozenset({"_series", "_fieldKeys", "_tagKeys"})
# The same for fields: queries answer these with something of influxd's own, or nothing.
_SYSTEM_FIELDS = frozenset({"_name", "_seriesKey", "_tagKey", "_tagValue", "_fieldKey"})

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MEASUREMENT_ESCAPES = str.maketrans({",": "\\,", " ": "\\ "})
_NAME_ESCAPES = str.maketrans({",": "\\,", " ": "\\ ", "=": "\\="})
_STRING_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\"})
_is_plain = re.compile(r"(?!.*#!~)[^\x00-\x1f\\]+").fullmatch
_NO_FIELDS = "no fields; InfluxDB stores only points with at least one field"


class Encoder:
    """Turns points into lines, with constant tags, one precision and, if wanted, a clock.

    Args:
        tags: Put on every point. A point's own tag of the same key wins; its value ``None``
            takes the constant tag off.
        precision: The unit of the timestamps written; they are rounded down to it.
        clock: Gives the time, in nanoseconds since 1970, of points without one. Without a
            clock their lines carry no timestamp and InfluxDB takes the time of arrival.
        on_left_out: Called with the number of fields left out of a point because they are NaN
            or infinite, whenever there are any.
        types: The types that fields have. Default: whatever a point gives them.

    Raises:
        PointError: The constant tags cannot be stored.

    Attributes:
        encode: ``encode(point)`` returns one line, without a newline at its end, or raises
            :class:`PointError` where InfluxDB could not store the point exactly as given.
    """

    __slots__ = ("_precision", "_tags", "encode")

    encode: Callable[[Point], bytes]

    def __init__(
        self,
        *,
        tags: Mapping[str, Any] | None = None,
        precision: Precision = Precision.NS,
        clock: Callable[[], int] | None = None,
        on_left_out: Callable[[int], None] | None = None,
        types: FieldTypes | None = None,
    ) -> None:
        self._precision = Precision(precision)
        self._tags = {key: value for key, value in _texts("constant tags", tags).items() if value}
        _line("constant tags", "m", self._tags, {"f": True}, None)
        unit = self._precision.nanoseconds
        self.encode = make_encode(self._tags, unit, clock, on_left_out, extension, types)

    def __repr__(self) -> str:
        return f"<Encoder precision={self._precision.value!r} tags={self._tags!r}>"


class _RareError(Exception):
    """This point needs the slow way."""


#: Field to its escaped name and, where they are kept, its type.
_Fields = dict[Any, tuple[str, type | None]]
_T = TypeVar("_T")


class _Cache(dict[Any, str]):
    """Escaped text by name, filled on demand and emptied when full.

    A stream of ever new names so costs time, not memory. Ask only for exact ``str``: a subclass
    could lie when compared.
    """

    __slots__ = ("_escape",)

    def __init__(self, escape: Callable[[Any], str]) -> None:
        super().__init__()
        self._escape = escape

    def __missing__(self, name: Any) -> str:
        text = self._escape(name)
        if len(text) <= 256:
            if len(self) >= 4096:
                self.clear()
            self[name] = text
        return text


def _plain_measurement(name: str) -> str:
    if not _is_plain(name) or name[0] == "#" or name in _SYSTEM_NAMES:
        raise _RareError
    return name.translate(_MEASUREMENT_ESCAPES)


def _plain_key(name: str) -> str:
    if not _is_plain(name) or name == "time":
        raise _RareError
    return name.translate(_NAME_ESCAPES)


def _plain_field_key(name: str) -> str:
    if name in _SYSTEM_FIELDS:
        raise _RareError
    return f"{_plain_key(name)}="


def _plain_tag(pair: tuple[str, str]) -> str:
    key, value = pair
    if not value:
        return ""
    if not _is_plain(value):
        raise _RareError
    return f",{_plain_key(key)}={value.translate(_NAME_ESCAPES)}"


def make_encode(  # noqa: PLR0915 - see its docstring
    constant: dict[str, str],
    unit: int,
    clock: Callable[[], int] | None,
    on_left_out: Callable[[int], None] | None,
    speedups: ModuleType | None,
    types: FieldTypes | None = None,
) -> Callable[[Point], bytes]:
    """The ``encode`` of one Encoder: a closure, since that is where Python is quickest.

    With ``speedups``, the extension, it is in front of that and calls it for what is rare.
    """
    measurements = _Cache(_plain_measurement)
    pairs = _Cache(_plain_tag)
    simple = frozenset({int, float, bool})
    # Escaped measurement and tags by what they were escaped from, and what is known of its fields;
    # only all-str ones are kept, and nothing that is no str equals one.
    series: dict[Any, tuple[str, _Fields]] = {}
    find_series = series.get
    # By measurement; without types, all by None.
    fields_of: dict[str | None, _Fields] = {}
    kept = 0
    escapes, lowest, highest, longest = _STRING_ESCAPES, MIN_INT, MAX_INT, MAX_KEY_LENGTH
    first_tick, last_tick = -(-MIN_TIME // unit), MAX_TIME // unit
    try:
        constant_text = "".join(map(_plain_tag, constant.items()))
    except _RareError:
        constant_text = ""

    def keep(known: dict[Any, Any], key: Any, value: _T) -> _T:
        """Keep it for the next time; what somebody still holds of the rest stays true."""
        nonlocal kept
        if kept >= 4096:
            forget()
        kept += 1
        known[key] = value
        return value

    def forget() -> None:
        nonlocal kept
        kept = 0
        fields_of.clear()
        series.clear()

    if types:
        types.on_emptied = forget

    def field_of(measurement: str, key: Any, known: _Fields) -> tuple[str, type | None]:
        """A field's escaped name and type."""
        if type(key) is not str:
            raise _RareError
        settled = types.known.get(measurement, {}).get(key) if types else None
        if types and settled is None:
            raise _RareError
        return keep(known, key, (_plain_field_key(key), settled))

    def series_of(measurement: Any, tags: Any) -> tuple[str, _Fields]:
        """The escaped measurement and tags, kept for the next time where that pays."""
        if type(measurement) is not str:
            raise _RareError
        line = measurements[measurement]
        whose = measurement if types else None
        fields = fields_of.get(whose)
        if fields is None:
            fields = keep(fields_of, whose, {})
        if tags is None:
            return f"{line}{constant_text} ", fields
        if type(tags) is not dict:
            raise _RareError
        tags = tags.copy()  # one state of it, whatever other threads do
        known = (measurement, *tags.values(), *tags)
        seen, all_str = len(pairs), True
        if constant:
            if tags.keys().isdisjoint(constant):
                line += constant_text
            else:
                tags = {**constant, **tags}
        for key, value in tags.items():
            if type(key) is not str:
                raise _RareError
            if type(value) is str:
                line += pairs[key, value]
            elif type(value) in simple:
                line += pairs[key, str(value)]
                all_str = False
            elif value is not None:
                raise _RareError
        line += " "
        # Tags with a value never seen before may never be seen again.
        if all_str and len(pairs) == seen and len(line) <= 512:
            if len(series) >= 4096:
                series.clear()
            series[known] = line, fields
        return line, fields

    def encode(point: Point) -> bytes:  # noqa: PLR0915 - see above
        """Ordinary names in ordinary dicts; whatever else it meets goes the slow way."""
        try:
            measurement, fields, tags, timestamp = point
            if type(fields) is not dict:
                raise _RareError
            found = None
            if type(tags) is dict:
                found = find_series((measurement, *tags.values(), *tags))
            line, known = found or series_of(measurement, tags)
            comma = ""
            left_out = 0
            for key, value in fields.items():
                try:
                    name, settled = known[key]
                except KeyError:
                    name, settled = field_of(measurement, key, known)
                kind = type(value)
                if settled is not kind and settled is not None:
                    if settled is not float or kind is not int or not lowest <= value <= highest:
                        raise _RareError
                    value, kind = float(value), float
                if kind is float:
                    if value - value != 0.0:
                        left_out += 1
                        continue
                    line = f"{line}{comma}{name}{value!r}"
                elif kind is int:
                    if not lowest <= value <= highest:
                        raise _RareError
                    line = f"{line}{comma}{name}{value}i"
                elif kind is str:
                    if '"' in value or "\\" in value:
                        value = value.translate(escapes)
                    line = f'{line}{comma}{name}"{value}"'
                elif kind is bool:
                    line = f"{line}{comma}{name}{'true' if value else 'false'}"
                else:
                    raise _RareError
                comma = ","
            if not comma:
                raise _RareError
            if not line.isascii():
                line.encode()  # before the clock is asked: it may fail
            if timestamp is None and clock is not None:
                timestamp = clock()
            if type(timestamp) is int:
                if unit != 1:
                    timestamp //= unit
                if not first_tick <= timestamp <= last_tick:
                    raise _RareError
                line = f"{line} {timestamp}"
            elif timestamp is not None:
                raise _RareError
            encoded = line.encode()
            if len(encoded) > longest:
                raise _RareError
        # A TypeError: a tag's value that cannot be hashed. A RuntimeError: the dict was changed
        # by another thread meanwhile.
        except (_RareError, UnicodeEncodeError, RuntimeError, TypeError):
            return rare(point)
        if left_out and on_left_out is not None:
            on_left_out(left_out)
        return encoded

    def slow(point: Point) -> bytes:
        """The whole rule, for whatever was given."""
        measurement, fields, tags, timestamp = point
        if not isinstance(measurement, str):
            raise PointError(f"measurement {show(measurement)}: expected a str")
        measurement = str.__str__(measurement)
        name = f"point {show(measurement)}"
        own = _texts(name, tags)
        kept, left_out = _values(name, fields)
        if left_out and on_left_out is not None:
            on_left_out(left_out)
        if not kept:
            why = "NaN and infinity cannot be stored" if left_out else "tags alone are not stored"
            raise FieldError(f"{name}: {_NO_FIELDS} ({why})")
        if timestamp is None and clock is not None:
            timestamp = clock()
        ticks = None if timestamp is None else _ticks(name, timestamp, unit)
        stored_tags = {key: value for key, value in {**constant, **own}.items() if value}
        return _line(name, measurement, stored_tags, kept, ticks)

    rare: Callable[[Point], bytes] = slow
    if types:
        rare = _settling(make_encode(constant, unit, clock, on_left_out, None), types)
    if constant and not constant_text:
        return rare
    if speedups is None:
        return encode
    text = constant_text.encode()
    quick: Callable[[Point], bytes] = speedups.encoder(
        constant, text, unit, clock, on_left_out, encode, rare, types and types.known
    )
    return quick


def _settling(encode: Callable[[Point], bytes], types: FieldTypes) -> Callable[[Point], bytes]:
    """``encode``, of a point's fields that fit: for those of which that is not known yet."""

    def settle(point: Point) -> bytes:
        line = encode(point)  # first: a point that is refused must not fix a type
        measurement, fields, tags, timestamp = point
        measurement = str.__str__(measurement)
        kept, _ = _values(f"point {show(measurement)}", fields)
        fitting = types.fit(measurement, kept)
        if fitting is kept:
            return line
        return encode(Point(measurement, fitting, tags, timestamp))

    return settle


# -- the slow way: from anything to exact types ------------------------------------------------


def _items(name: str, what: str, mapping: object) -> list[tuple[str, Any]]:
    """The items of a mapping, its keys checked and made exact ``str``."""
    if not isinstance(mapping, Mapping):
        raise PointError(f"{name}: {what} {show(mapping)}: expected a mapping such as a dict")
    try:
        items = [(key, value) for key, value in mapping.items()]
    except Exception as error:
        raise PointError(
            f"{name}: {what} cannot be read: {show_caught(error)};"
            " expected a mapping such as a dict"
        ) from error
    found: dict[str, Any] = {}
    for given, value in items:
        if not isinstance(given, str):
            raise PointError(f"{name}: {what}: key {show(given)}: expected a str")
        key = str.__str__(given)
        if key in found:
            raise PointError(
                f"{name}: {what}: key {show(key)} is there twice; expected each key once"
            )
        found[key] = value
    return list(found.items())


def _texts(name: str, tags: object) -> dict[str, str]:
    """Tags by key, as exact text; ``""`` for a tag that is to be left out."""
    found = {}
    for key, value in [] if tags is None else _items(name, "tags", tags):
        if value is None:
            found[key] = ""
            continue
        try:
            text = value if isinstance(value, str) else str(value)
        except Exception as error:
            raise PointError(
                f"{name}: tag {show(key)}: str() of its {type(value).__name__} raised"
                f" {show_caught(error)}; expected a str, or a value that str() takes"
            ) from error
        found[key] = str.__str__(text)
    return found


def _values(name: str, fields: object) -> tuple[dict[str, Any], int]:
    """Fields by key, as exact float, int, bool or str; and how many NaN and inf are left out."""
    found = {}
    left_out = 0
    for key, given in _items(name, "fields", fields):
        value = _value(name, key, given)
        if isinstance(value, float) and value - value != 0.0:
            left_out += 1
        elif value is not None:
            found[key] = value
    return found, left_out


def _value(name: str, key: str, given: object) -> float | bool | str | None:
    value = given
    for _ in range(3):  # an Enum of a numpy scalar of …; never for ever
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            value = int.__index__(value)
            if MIN_INT <= value <= MAX_INT:
                return value
            raise FieldError(
                f"{name}: field {show(key)}: {show(value)} does not fit into InfluxDB's 64 bits;"
                f" expected {MIN_INT} to {MAX_INT}. Send float() of it, or a str"
            )
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, str):
            return str.__str__(value)
        try:
            if isinstance(value, Decimal):
                number = math.nan if value.is_nan() else float(value)
            elif isinstance(value, Enum):
                value = value.value
                continue
            elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
                if getattr(getattr(value, "dtype", None), "kind", "") != "f":
                    value = value.item()
                    continue
                # Not item(): numpy's long double, which Python has not, gives itself.
                number = float(value)  # type: ignore[arg-type]
            else:
                break
        except Exception as error:
            raise FieldError(
                f"{name}: field {show(key)} cannot be read: {show_caught(error)};"
                " expected float, int, bool or str"
            ) from error
        if math.isinf(number) and number != value:
            raise FieldError(
                f"{name}: field {show(key)}: {show(value)} is beyond InfluxDB's 64-bit floats;"
                " expected -1.7976931348623157e+308 to 1.7976931348623157e+308. Send a str"
            )
        return number
    advice = "a datetime as .isoformat(), bytes as .decode(), anything else as str() or a number"
    raise FieldError(
        f"{name}: field {show(key)}: {show(given)} is of type {type(given).__name__};"
        f" expected float, int, bool or str. Send {advice}"
    )


def _ticks(name: str, timestamp: object, unit: int) -> int:
    """The timestamp in units of ``unit`` nanoseconds, rounded down."""
    given = timestamp
    try:
        if isinstance(timestamp, datetime):
            if timestamp.utcoffset() is None:
                timestamp = timestamp.replace(tzinfo=timezone.utc)
            since = timestamp - _EPOCH
            # pandas' datetime knows nanoseconds too
            rest = since.microseconds * 1000 + int(getattr(timestamp, "nanosecond", 0))
            nanoseconds = (since.days * 86400 + since.seconds) * 1_000_000_000 + rest
        else:
            # True is an int, but no time
            nanoseconds = operator.index("" if isinstance(timestamp, bool) else timestamp)  # type: ignore[arg-type]
    except TypeError:
        raise PointError(
            f"{name}: timestamp {show(given)}: expected nanoseconds since 1970 as an int (such as"
            " time.time_ns(); a float is not exact enough), or a datetime"
        ) from None
    except Exception as error:
        raise PointError(
            f"{name}: timestamp {show(given)} cannot be read: {show_caught(error)};"
            " expected nanoseconds since 1970 as an int, or a datetime"
        ) from error
    ticks = nanoseconds // unit
    if not MIN_TIME <= ticks * unit <= MAX_TIME:
        raise PointError(
            f"{name}: timestamp {show(given)}: InfluxDB's time ends at {MIN_TIME} and {MAX_TIME}"
            " nanoseconds since 1970 (the years 1677 and 2262)"
        )
    return ticks


# -- the slow way: from exact types to a line --------------------------------------------------


def _line(
    name: str,
    measurement: str,
    tags: dict[str, str],
    fields: dict[str, Any],
    ticks: int | None,
) -> bytes:
    """One line, or PointError where influxd would not store just this."""
    try:
        line = _join(measurement, tags, fields, ticks)
    except UnicodeEncodeError as error:
        raise PointError(
            f"{name}: {show(error.object[error.start : error.end])} is half of a surrogate pair,"
            " no character; decode the text it came from with errors='replace'"
        ) from None
    if _stores(line, measurement, tags, fields, ticks):
        return line
    names = (*tags, *tags.values(), *fields)
    if any("\\" in text for text in names) and not any(text[-1:] in ("", "\\") for text in names):
        found = find(
            measurement.translate(_MEASUREMENT_ESCAPES),
            list(map(_escape_tag, tags.items())),
            {key: _escape_value(value) for key, value in fields.items()},
        )
        line = f"{found}{'' if ticks is None else f' {ticks}'}".encode()
        if found and _stores(line, measurement, tags, fields, ticks):
            return line
    blame = _blame(measurement, tags, fields)
    if blame:
        raise PointError(f"{name}: {blame}")
    raise PointError(
        f"{name}: backslashes, quotes and newlines in its names and values, each of them harmless"
        " alone, would together end the line at another place; leave the backslashes out of the"
        " names"
    )


def _join(
    measurement: str, tags: dict[str, str], fields: dict[str, Any], ticks: int | None
) -> bytes:
    head = measurement.translate(_MEASUREMENT_ESCAPES) + "".join(map(_escape_tag, tags.items()))
    # influxd skips space, tab and NUL before the first field key: let another key go first.
    keys = sorted(fields, key=lambda key: key.startswith(("\t", "\0")))
    body = ",".join(f"{_escape_field_key(key)}={_escape_value(fields[key])}" for key in keys)
    return f"{head} {body}{'' if ticks is None else f' {ticks}'}".encode()


def _escape_tag(tag: tuple[str, str]) -> str:
    key, text = tag
    return f",{key.translate(_NAME_ESCAPES)}={text.translate(_NAME_ESCAPES)}"


def _escape_field_key(key: str) -> str:
    # Of a backslash before a quote influxd drops the backslash, in field keys only.
    return key.translate(_NAME_ESCAPES).replace('\\"', '\\\\"')


def _escape_value(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value}i"
    if isinstance(value, float):
        return repr(value)
    return f'"{value.translate(_STRING_ESCAPES)}"'


def _stores(
    line: bytes,
    measurement: str,
    tags: dict[str, str],
    fields: dict[str, Any],
    ticks: int | None,
) -> bool:
    """Whether influxd stores just this point for ``line``, whatever other lines stand around."""
    if line_end(line + b"\n", 0) != len(line) or measurement[:1] in ("", "#", "\t", "\0"):
        return False
    try:
        series, read = read_line(line, 1)
        stored = as_stored(read)
    except DecodeError:
        return False
    return (
        stored == Point(measurement, fields, tags or None, ticks)
        and all(type(stored.fields[key]) is type(value) for key, value in fields.items())
        and _is_findable(series, measurement)
        and _SYSTEM_FIELDS.isdisjoint(fields)
    )


def _is_findable(series: bytes, measurement: str) -> bool:
    """Whether queries find the series, and it is still the same one after a restart."""
    return (
        measurement not in _SYSTEM_NAMES
        and not re.search(r'\\[ ,="]', measurement)
        and (series + _SEPARATOR).find(_SEPARATOR) == len(series)
    )


def _blame(measurement: str, tags: dict[str, str], fields: dict[str, Any]) -> str:
    """The first part that could not be stored even alone; "" if it is none of them."""
    if not _storable(measurement, {}, {"f": 0}):
        return f"measurement {show(measurement)} {_reason(measurement, 'measurement')}"
    for key, text in tags.items():
        if not _storable("m", {key: "v"}, {"f": 0}):
            return f"tag key {show(key)} {_reason(key, 'tag key')}"
        if not _storable("m", {"k": text}, {"f": 0}):
            return f"tag {show(key)}: value {show(text)} {_reason(text, 'tag value')}"
    for key in fields:
        if not _storable("m", {}, {key: 0}) and not _storable("m", {}, {"f": 0, key: 0}):
            return f"field key {show(key)} {_reason(key, 'field key')}"
    first = next(iter(fields))
    if all(key.startswith(("\t", "\0")) for key in fields):
        return f"field key {show(first)} begins with a tab or NUL; add a field with another name"
    series = _join(measurement, tags, {"f": 0}, None).removesuffix(b" f=0i")
    longest = len(series) + 4 + max(len(_escape_field_key(key).encode()) for key in fields)
    if longest > MAX_KEY_LENGTH:
        return (
            f"measurement, tags and field key take {longest} bytes together; InfluxDB takes"
            f" {MAX_KEY_LENGTH}. Move long tags to fields"
        )
    return ""


def _storable(measurement: str, tags: dict[str, str], fields: dict[str, Any]) -> bool:
    return _stores(_join(measurement, tags, fields, None), measurement, tags, fields, None)


def _reason(name: str, place: str) -> str:
    """Why ``name`` cannot be stored in this place."""
    if not name:
        return "is empty; InfluxDB knows no empty names"
    if re.search(r"(?<!\\)(?:\\\\)*\n", name):
        return "has a newline, which would start another line; replace it"
    if name.endswith("\\"):
        return "ends in a backslash, which would escape what follows; leave it out"
    if name == "time" and place != "measurement":
        return "is the name of InfluxDB's own time column; choose another one"
    if place == "measurement":
        if name[0] in "\t\0":
            return "begins with a tab or NUL, which InfluxDB skips; leave it out"
        if name[0] == "#":
            return "begins with #, as a comment does; leave it out"
    if name in (_SYSTEM_NAMES if place == "measurement" else _SYSTEM_FIELDS):
        return "is a name of InfluxDB's own, which no query finds; choose another one"
    if "#!~" in name and place != "field key":
        return "holds '#!~', which parts series from fields in InfluxDB's files; leave it out"
    if len(name) > MAX_KEY_LENGTH // 4 and len(name.encode()) > MAX_KEY_LENGTH - 16:
        return f"is too long; InfluxDB takes {MAX_KEY_LENGTH} bytes. Move long texts to fields"
    return "has a backslash before a comma, space, quote or equals sign; use another character"


def encode(point: Point) -> bytes:
    """One line for ``point``, without a newline, or :class:`PointError`: see :class:`Encoder`."""
    return _default.encode(point)


_default = Encoder()
