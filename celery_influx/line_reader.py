"""Line protocol: bytes to points, as influxd 1.x reads them. No I/O, clock or log.

Follows what influxd does, its own rules for where a line ends among it, since that decides what
a line does to its neighbours: https://github.com/influxdata/influxdb/blob/1.6/models/points.go
Checked against influxd 1.6.7 and influxdata/line-protocol-corpus: tests/conformance/
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from celery_influx.errors import DecodeError
from celery_influx.point import Point

MIN_TIME = -9223372036854775806
MAX_TIME = 9223372036854775806
MAX_KEY_LENGTH = 65535
MIN_INT, MAX_INT = -(2**63), 2**63 - 1

_BLANK = b" \t\0"
_NAME = re.compile(rb"[^,](?:[^, ]+|(?<=\\)[, ])*", re.DOTALL)
_TAG_KEY = re.compile(rb"[^ ,=](?:[^ ,=]+|(?<=\\)[ ,=])*", re.DOTALL)
_TAG_VALUE = re.compile(rb"[^ ,](?:[^ ,=]+|(?<=\\)[ ,=])*", re.DOTALL)
_FIELD_KEY = re.compile(rb"(?:[^=]+|(?<=\\)=)*", re.DOTALL)
_FIELD_VALUE = re.compile(rb'(?:[^",\\]+|\\["\\]?|"(?:[^"\\]+|\\["\\]?)*(?:"|\Z))*', re.DOTALL)
_LINE_TOKEN = re.compile(rb'\\.?|[ =,"\n]', re.DOTALL)
_FIELDS_TOKEN = re.compile(rb'\\.|[ =,"]', re.DOTALL)
_WORD = re.compile(rb"[^, ]*", re.DOTALL)
_INT = re.compile(rb"-?[0-9]+i")
_FLOAT_LIKE = re.compile(rb"-?[0-9.eE](?:[0-9.eE]|(?<=[eE])[+-])*")
_TIME = re.compile(rb"(-?[0-9]*)(?=[ \n]|\Z)")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
# A line that influxd can read, but for two tags of one name: nearly all are such. To find that of
# 5,000 takes ms, and to read them most of a second.
_ORDINARY = re.compile(
    rb"""
    (?!\#) NAME (?P<tags> (?:,NAME=NAME)* )
    [ ] NAME=VALUE (?:,NAME=VALUE)*
    (?: [ ]-?1?[0-9]{1,18} )?
    """.replace(b"NAME", rb"""(?![,= ]) [^\\",= \n\t\0]* (?: \\[,= ][^\\",= \n\t\0]* )*""").replace(
        b"VALUE",
        rb"""(?: -?[0-9]{1,18} (?: i | \.[0-9]{1,18} (?:e-?[0-9]{1,2})? )? | true | false
        | "[^"\\\n]*" )""",
    ),
    re.VERBOSE,
)
_TIME_OUTSIDE = f"time outside range {MIN_TIME} - {MAX_TIME}"


def decode(line: bytes, unit: int = 1) -> Point:
    """The point that InfluxDB 1.x would store for one line.

    Args:
        line: One line; a newline at its end is allowed.
        unit: How many nanoseconds one unit of its timestamp has; the time limits depend on it.

    Returns:
        The point, its timestamp as in the line; ``None`` where there is none, as for tags.
        Each byte that is not UTF-8 becomes U+FFFD, as in InfluxDB's answers.

    Raises:
        DecodeError: InfluxDB would refuse the line, or it is none, or several.
    """
    points, refused = parse(line, unit)
    if refused:
        raise DecodeError(refused[0])
    if len(points) != 1:
        raise DecodeError(f"expected one line with a point, found {len(points)}: {line[:60]!r}")
    return points[0]


def parse(payload: bytes, unit: int = 1) -> tuple[list[Point], list[str]]:
    """All points of a datagram or body, and why InfluxDB 1.x would refuse the other lines.

    A reason that begins ``unable to parse`` costs a datagram all its points, over UDP, one that
    begins ``proto`` or ``engine`` also a body; any other reason costs that point only.
    """
    points: list[Point] = []
    refused: list[str] = []
    for line in split_lines(payload):
        try:
            points.append(as_stored(read_line(line, unit)[1]))
        except _NotStoredError as error:
            refused.append(str(error))
        except DecodeError as error:
            refused.append(f"unable to parse '{_text(line)}': {error}")
    return points, refused


def unreadable(payload: bytes) -> int:
    """How many of its lines influxd cannot read, whatever becomes of the others."""
    if all(map(_is_ordinary, payload.split(b"\n"))):
        return 0
    return sum(
        not _is_ordinary(line) and any(why.startswith("unable to parse") for why in parse(line)[1])
        for line in split_lines(payload)
    )


def _is_ordinary(line: bytes) -> bool:
    match = _ORDINARY.fullmatch(line) if len(line) < MAX_KEY_LENGTH else None
    if match is None:
        return False
    names = [tag.partition(b"=")[0] for tag in match["tags"].split(b",")]
    return len({*names}) == len(names)


class _NotStoredError(DecodeError):
    """The line can be read; influxd drops its point later, when it comes to store it."""


def _text(raw: bytes) -> str:
    """As influxd's answers show it: U+FFFD for each byte that is not UTF-8."""
    return _NOT_UTF8.sub("\ufffd", _name_text(raw))


def _name_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def split_lines(payload: bytes) -> Iterator[bytes]:
    """Each line that is no comment and not blank, without what influxd skips before it."""
    start = 0
    while start < len(payload):
        end = line_end(payload, start)
        line = payload[start:end].lstrip(_BLANK)
        start = end + 1
        if line and not line.startswith(b"#"):
            yield line.removesuffix(b"\n")


def line_end(payload: bytes, start: int) -> int:
    """Where the line ends.

    influxd looks for it by rules of its own, looser than those by which it then reads the line:
    escapes go in pairs, any space begins the fields.
    """
    in_fields = quoted = False
    equals = commas = 0
    for match in _LINE_TOKEN.finditer(payload, start):
        token = match.group()
        if token == b"\n":
            if not quoted:
                return match.start()
        elif token == b" ":
            in_fields = True
        elif not in_fields:
            continue
        elif token == b'"':
            quoted ^= equals > commas
        elif not quoted:
            equals += token == b"="
            commas += token == b","
    return len(payload)


def read_line(line: bytes, unit: int) -> tuple[bytes, Point]:
    """The series key as it is stored, and the point; DecodeError tells in influxd's words."""
    name, tags, at = _read_series(line)
    series = b",".join([name, *(b"%b=%b" % tag for tag in sorted(tags))])
    if len(series) > MAX_KEY_LENGTH:
        raise DecodeError(f"max key length exceeded: {len(series)} > {MAX_KEY_LENGTH}")
    at = len(line) - len(line[at:].lstrip(_BLANK))
    end = _fields_end(line, at)
    body = line[at:end]
    _check_key_lengths(body, len(series))
    timestamp = _read_time(line, end, unit)
    measurement = _name_text(re.sub(rb'\\([ ,="])', rb"\1", name))
    point = Point(
        measurement,
        _read_fields(body, measurement),
        {_unescape_tag(key): _unescape_tag(value) for key, value in tags} or None,
        timestamp,
    )
    return series, point


def _unescape_tag(raw: bytes) -> str:
    return _text(re.sub(rb"\\([ ,=])", rb"\1", raw))


def _read_series(line: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], int]:
    match = _NAME.match(line)
    if not match:
        raise DecodeError("missing measurement")
    name, at = match.group(), match.end()
    tags: list[tuple[bytes, bytes]] = []
    while line[at : at + 1] == b",":
        match = _TAG_KEY.match(line, at + 1)
        if not match:
            raise DecodeError("missing tag key")
        key, at = match.group(), match.end()
        if line[at : at + 1] != b"=":
            raise DecodeError("missing tag value")
        match = _TAG_VALUE.match(line, at + 1)
        if not match:
            raise DecodeError("missing tag value")
        tags.append((key, match.group()))
        at = match.end()
        if line[at : at + 1] == b"=":
            raise DecodeError("invalid tag format")
    if at >= len(line):
        raise DecodeError("missing fields")
    if len({key for key, _ in tags}) < len(tags):
        raise DecodeError("duplicate tags")
    return name, tags, at


def _fields_end(line: bytes, at: int) -> int:
    """Where the field set that starts at ``at`` ends; checks it as loosely as influxd does."""
    quoted = False
    equals = commas = 0
    while match := _FIELDS_TOKEN.search(line, at):
        token, at = match.group(), match.end()
        if token == b'"':
            quoted ^= equals > commas
        elif quoted:
            continue
        elif token == b",":
            commas += 1
        elif token == b" ":
            at -= 1
            break
        elif token == b"=":
            equals += 1
            if line[at - 2 : at - 1] in (b" ", b",") and line[at - 3 : at - 2] != b"\\":
                raise DecodeError("missing field key")
            if line[at : at + 1] in (b"", b",", b" "):
                raise DecodeError("missing field value")
            if line[at : at + 1] != b'"':
                at = _scalar_end(line, at)
    else:
        at = len(line)
    if quoted:
        raise DecodeError("unbalanced quotes")
    if equals == 0 or commas != equals - 1:
        raise DecodeError("invalid field format")
    return at


def _span(pattern: re.Pattern[bytes], raw: bytes, at: int) -> tuple[bytes, int]:
    """What a pattern that matches the empty string, too, finds at ``at``, and where that ends."""
    match = pattern.match(raw, at)
    return (match.group(), match.end()) if match else (b"", at)


def _scalar_end(line: bytes, at: int) -> int:
    word, end = _span(_WORD, line, at)
    if word[:1] in b"0123456789.-Nn":
        _number(word)
    elif word not in _BOOLS:
        raise DecodeError("invalid boolean")
    return end


def is_scalar(word: str) -> bool:
    """Whether influxd, where it looks for the end of the fields, takes this for a value."""
    try:
        return _scalar_end(word.encode(), 0) > 0
    except DecodeError:
        return False


_TYPE_WORDS = {float: "float", int: "integer", str: "string", bool: "boolean"}
_BOOLS = {
    **dict.fromkeys((b"t", b"T", b"true", b"True", b"TRUE"), True),
    **dict.fromkeys((b"f", b"F", b"false", b"False", b"FALSE"), False),
}


def _number(word: bytes) -> int | float:
    if _INT.fullmatch(word):
        digits = word[:-1].decode()
        try:
            return _int64(digits)
        except DecodeError as error:
            raise DecodeError(f"unable to parse integer {digits}: {error}") from None
    # Of what only looks like a number influxd says one thing or the other.
    if not _FLOAT_LIKE.fullmatch(word) or word.count(b".") > 1 or word in (b".", b"-."):
        raise DecodeError("invalid number")
    try:
        number = float(word)
    except ValueError:
        raise DecodeError("invalid float") from None
    if number - number != 0.0:
        raise DecodeError("invalid float")
    return number


def _int64(digits: str) -> int:
    # Python's int() refuses thousands of digits with an error of its own.
    if len(digits.lstrip("-0")) <= 19 and MIN_INT <= (value := int(digits)) <= MAX_INT:
        return value
    raise DecodeError(f'strconv.ParseInt: parsing "{digits}": value out of range')


def _check_key_lengths(body: bytes, series_length: int) -> None:
    """Walk the fields once more to measure their keys.

    influxd stumbles here where a key's escapes read otherwise than when it looked for the end of
    the fields.
    """
    while body:
        key, at = _span(_FIELD_KEY, body, 0)
        if at > len(body) - 2:
            raise DecodeError(f"invalid value: field-key={_text(key)}")
        size = series_length + 4 + len(key)
        if size > MAX_KEY_LENGTH:
            raise DecodeError(f"max key length exceeded: {size} > {MAX_KEY_LENGTH}")
        body = body[_span(_FIELD_VALUE, body, at + 1)[1] + 1 :]


def _read_fields(body: bytes, measurement: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    at = 0
    while at < len(body):
        raw, at = _span(_FIELD_KEY, body, at)
        key = _name_text(re.sub(rb'\\([ ,="])', rb"\1", raw))
        raw, at = _span(_FIELD_VALUE, body, at + 1)
        at += 1
        value: float | bool | str
        if raw == b'"':
            # influxd cuts off both quotes, and ends as a process: see the tests of decode.
            raise _NotStoredError("engine: slice bounds out of range")
        if raw.startswith(b'"'):
            value = _text(re.sub(rb'\\(["\\])', rb"\1", raw[1:-1]))
        elif raw in _BOOLS:
            value = _BOOLS[raw]
        elif raw[:1] in b"0123456789.-nNiIu":
            value = _number(raw)
        else:
            raise _NotStoredError(f'engine: unable to parse bool value "{_text(raw)}"')
        if key in fields and type(fields[key]) is not type(value):
            known, given = _TYPE_WORDS[type(fields[key])], _TYPE_WORDS[type(value)]
            raise _NotStoredError(
                f'field type conflict: input field "{key}" on measurement "{measurement}" is type'
                f" {given}, already exists as type {known}"
            )
        fields[key] = value
    return fields


def _read_time(line: bytes, at: int, unit: int) -> int | None:
    at = len(line) - len(line[at:].lstrip(_BLANK))
    match = _TIME.match(line, at)
    if not match:
        raise DecodeError("bad timestamp")
    digits = match.group().decode()
    if not digits:
        return None
    if digits == "-":
        raise DecodeError('strconv.ParseInt: parsing "-": invalid syntax')
    timestamp = _int64(digits)
    if not MIN_TIME <= timestamp * unit <= MAX_TIME:
        raise DecodeError(_TIME_OUTSIDE)
    if line[match.end() :].strip(b" "):
        raise DecodeError("point is invalid")
    return timestamp


def as_stored(point: Point) -> Point:
    """The point without a field ``time``, which influxd keeps for itself, or an error.

    As a tag ``time`` costs the point. And influxd's index files take only UTF-8.
    """
    what = f'"time" on measurement "{point.measurement}" is invalid'
    if point.tags and "time" in point.tags:
        raise _NotStoredError(f"invalid tag key: input tag {what}")
    fields = {key: value for key, value in point.fields.items() if key != "time"}
    if not fields:
        raise _NotStoredError(f"invalid field name: input field {what}")
    if any(map(_NOT_UTF8.search, fields)):
        raise _NotStoredError('proto: field "tsdb.Field.Name" contains invalid UTF-8')
    if _NOT_UTF8.search(point.measurement):
        raise _NotStoredError('proto: field "tsdb.MeasurementFields.Name" contains invalid UTF-8')
    return point._replace(fields=fields)
