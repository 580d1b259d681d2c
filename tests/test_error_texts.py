"""The full text of every error about a point, a line, a query or a server: what was wrong, what was
expected, what to do. The errors of a wrong configuration have their tables in test_options.py.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gzip
import logging
import os
import socket
import ssl
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import pytest
from celery import Celery, shared_task

import celery_influx
from celery_influx import tasks
from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.errors import (
    ConfigError,
    DecodeError,
    FieldError,
    InfluxError,
    PointError,
    QueryError,
    SendError,
)
from celery_influx.line_reader import MAX_TIME, MIN_TIME
from celery_influx.options import DatabaseOptions
from celery_influx.plugin import Influx
from celery_influx.point import Point
from celery_influx.queries import quote_ident, quote_string
from celery_influx.report import Report
from celery_influx.spool import Spool
from celery_influx.transports import http, udp, unixgram
from celery_influx.transports.http import HTTPClient
from celery_influx.transports.tcp import TCPConnection
from celery_influx.transports.udp import UDPPool
from celery_influx.transports.unixgram import UnixDatagrams
from tests.servers import free_port
from tests.test_database import BadLine, HostileKey, Iterates, Raises, RaisingMapping, Unbound
from tests.test_http import SHORT, Stub, serving
from tests.test_line_protocol import Word

PACKAGE = Path(celery_influx.__file__).parent
#: Modules whose errors are tested elsewhere: wrong options, with tables as complete as these, in
#: test_options.py; a wrong name of ours in test_layers.py; a wait of tests' own in test_listener.py;
#: those of commands in test_cli.py.
ELSEWHERE = {"options.py", "__init__.py", "listener.py", "cli.py", "server_setup.py"}
#: Functions that return a part of an error's text: each of their returns is a text of its own.
TELLERS = {"_reason", "_blame", "why"}


#: Of every database here that has one.
SECRET = "hunter2"


class Parts:
    """What the rows need: a server that gives odd answers, databases, clients, apps."""

    def __init__(self, stub: Stub, folder: Path) -> None:
        self.stub = stub
        self.folder = folder
        #: What PORT and WORDS stand for in the row's text.
        self.port = stub.port
        self.words = ""

    def database(self, **options: Any) -> Database:
        """One that is strict, and in which nothing is ever sent by UDP."""
        given = {"name": "m", "host": "127.0.0.1", "http_port": self.stub.port}
        given |= {"username": "u", "password": SECRET, **options}
        return Database(DatabaseOptions(**given), strict=True)

    def plugin(self) -> Influx:
        """That of an app with two databases, of which nobody answers."""
        return celery_influx.install(self.app())

    def app(self) -> Celery:
        """One that is configured."""
        app = Celery("app", broker="memory://", backend="cache+memory://", set_as_current=False)
        app.conf.influx_databases = {"main": "http://127.0.0.1:9/x", "web": "udp://127.0.0.1:9"}
        return app

    def task(self, name: str, *args: object) -> None:
        """Run a helper task here."""
        app = self.app()
        tasks.register(app, celery_influx.install(app))
        app.finalize()
        app.tasks[f"celery_influx.{name}"].apply(args=args).get()


class Row(NamedTuple):
    """One text, and how it comes about."""

    error: type[Exception]
    text: str
    provoke: Callable[[Parts], object]


# -- points ------------------------------------------------------------------------------------


def sent(given: object, text: str, error: type[Exception] = PointError, **options: Any) -> Row:
    """Of a point that is sent."""
    return Row(error, text, lambda parts: parts.database(**options).send_data(given))


class Broken:
    """Nothing can be got out of it."""

    def __str__(self) -> str:
        raise KeyError("no text")

    __repr__ = __str__


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


class Scalar:
    """Looks like a numpy scalar, and is broken."""

    ndim = 0

    def item(self) -> object:
        raise RuntimeError("no item")


class Nowhere(datetime):
    def utcoffset(self) -> timedelta:
        raise RuntimeError("no zone")


F = {"f": 1.5}
FORMS = (
    "; expected a Point, a mapping with the keys measurement, fields, tags, time, an object with "
    "to_line_protocol(), or an iterable of these"
)
KEYS = "; expected the keys 'measurement', 'fields' and, where wanted, 'tags' and 'time'"
VALUES = (
    "expected float, int, bool or str. Send a datetime as .isoformat(), bytes as .decode(), "
    "anything else as str() or a number"
)
INTEGERS = (
    "does not fit into InfluxDB's 64 bits; expected -9223372036854775808 to 9223372036854775807. "
    "Send float() of it, or a str"
)
TIMES = (
    "expected nanoseconds since 1970 as an int (such as time.time_ns(); a float is not exact "
    "enough), or a datetime"
)
ENDS = (
    "InfluxDB's time ends at -9223372036854775806 and 9223372036854775806 nanoseconds since 1970 "
    "(the years 1677 and 2262)"
)
NO_FIELDS = "no fields; InfluxDB stores only points with at least one field"
PLAIN = "; expected a Point or a mapping of plain values"
BACKSLASH = "has a backslash before a comma, space, quote or equals sign; use another character"
SEPARATOR = "holds '#!~', which parts series from fields in InfluxDB's files; leave it out"
LAST_BACKSLASH = "ends in a backslash, which would escape what follows; leave it out"
OWN_NAME = "is a name of InfluxDB's own, which no query finds; choose another one"
TIME_COLUMN = "is the name of InfluxDB's own time column; choose another one"
NEWLINE = "has a newline, which would start another line; replace it"
SKIPPED = "begins with a tab or NUL, which InfluxDB skips; leave it out"
TOGETHER = (
    "backslashes, quotes and newlines in its names and values, each of them harmless alone, would "
    "together end the line at another place; leave the backslashes out of the names"
)
LONG = f"'{'v' * 79}...{'v' * 9}'"

POINTS = [
    # What is no point.
    sent(None, f"a point of type NoneType{FORMS}"),
    sent("m f=1", f"a point of type str{FORMS}"),
    sent(b"m f=1", f"a point of type bytes{FORMS}"),
    sent([[F]], f"a point of type list{FORMS}"),
    sent({}, f"a point that is a mapping has no 'measurement', no 'fields'{KEYS}"),
    sent(
        {"measurement": "m", "field": F},
        f"a point that is a mapping has unknown key 'field', no 'fields'{KEYS}",
    ),
    sent(
        {"v" * 100_000: 1, "measurement": "m", "fields": F},
        f"a point that is a mapping has unknown key {LONG}{KEYS}",
    ),
    sent(
        {"measurement": "m", **{f"k{number}": 1 for number in range(1_000)}},
        "a point that is a mapping has "
        + "".join(f"unknown key 'k{number}', " for number in range(10))
        + f"990 more of these, no 'fields'{KEYS}",
    ),
    sent(
        BadLine(""),
        "to_line_protocol() of BadLine gave nothing, which is a point without fields; InfluxDB "
        "stores only points with at least one field",
        FieldError,
    ),
    sent(
        BadLine(KeyError("x")),
        "to_line_protocol() of BadLine failed: KeyError('x'); expected one line of text",
    ),
    sent(
        BadLine("m f="),
        """to_line_protocol() of BadLine failed: DecodeError("unable to parse 'm f=': missing """
        """field value"); expected one line of text""",
    ),
    sent(
        BadLine(b"m f=1"),
        """to_line_protocol() of BadLine failed: AttributeError("'bytes' object has no attribute """
        """'encode'"); expected one line of text""",
    ),
    sent(
        BadLine("m f=1", "fortnight"),
        "a BadLine whose write_precision is 'fortnight'; expected one of ns, us, ms, s",
    ),
    sent(RaisingMapping(), f"the point cannot be read: RuntimeError('no keys'){PLAIN}"),
    sent(Raises(RuntimeError("odd")), f"the point cannot be read: RuntimeError('odd'){PLAIN}"),
    sent(Iterates(), f"the point cannot be read: RuntimeError('not to be iterated'){PLAIN}"),
    sent(Unbound(), f"the point cannot be read: RuntimeError('no object'){PLAIN}"),
    sent(
        {HostileKey("fields"): 1},
        f"the point cannot be read: RuntimeError('not to be compared'){PLAIN}",
    ),
    sent((F["x"] for _ in range(1)), f"the point cannot be read: KeyError('x'){PLAIN}"),
    # Its measurement.
    sent(Point(5, F), "measurement 5: expected a str"),  # type: ignore[arg-type]
    sent(
        Point(Broken(), F),  # type: ignore[arg-type]
        "measurement <Broken whose repr raises KeyError>: expected a str",
    ),
    *(
        sent(Point(name, F), f"point {name!r}: measurement {name!r} {reason}")
        for name, reason in (
            ("", "is empty; InfluxDB knows no empty names"),
            ("#m", "begins with #, as a comment does; leave it out"),
            ("\tm", SKIPPED),
            ("\0m", SKIPPED),
            ("m\\", LAST_BACKSLASH),
            ("a\\ b", BACKSLASH),
            ('a\\"b', BACKSLASH),
            ("a\nb", NEWLINE),
            ("_series", OWN_NAME),
            ("a#!~#b", SEPARATOR),
        )
    ),
    sent(
        Point("\ud800", F),
        "point '\\ud800': '\\ud800' is half of a surrogate pair, no character; decode the text it "
        "came from with errors='replace'",
    ),
    # Its tags.
    *(
        sent(Point("m", F, {key: "v"}), f"point 'm': tag key {key!r} {reason}")
        for key, reason in (
            ("", "is empty; InfluxDB knows no empty names"),
            ("time", TIME_COLUMN),
            ("k\\", LAST_BACKSLASH),
            ("k\n", NEWLINE),
        )
    ),
    *(
        sent(Point("m", F, {"k": value}), f"point 'm': tag 'k': value {reason}")
        for value, reason in (
            ("v\n", f"'v\\n' {NEWLINE}"),
            ("v#!~", f"'v#!~' {SEPARATOR}"),
            ('p\\ q\\="r', f"'p\\\\ q\\\\=\"r' {BACKSLASH}"),
            (
                "v" * 65530,
                f"{LONG} is too long; InfluxDB takes 65535 bytes. Move long texts to fields",
            ),
        )
    ),
    sent(
        Point("m", F, {"k": "v" * 40_000, "l": "v" * 40_000}),
        "point 'm': measurement, tags and field key take 80012 bytes together; InfluxDB takes "
        "65535. Move long tags to fields",
    ),
    sent(
        Point("m", F, "t"),  # type: ignore[arg-type]
        "point 'm': tags 't': expected a mapping such as a dict",
    ),
    sent(
        Point("m", F, {1: "v"}),  # type: ignore[dict-item]
        "point 'm': tags: key 1: expected a str",
    ),
    sent(
        Point("m", F, {"k": Broken()}),
        "point 'm': tag 'k': str() of its Broken raised KeyError('no text'); expected a str, or a "
        "value that str() takes",
    ),
    # Its fields.
    sent(Point("m", {}), f"point 'm': {NO_FIELDS} (tags alone are not stored)", FieldError),
    sent(
        Point("m", {"f": None}, {"t": "v"}),
        f"point 'm': {NO_FIELDS} (tags alone are not stored)",
        FieldError,
    ),
    sent(
        Point("m", {"f": float("nan")}),
        f"point 'm': {NO_FIELDS} (NaN and infinity cannot be stored)",
        FieldError,
    ),
    sent(
        [Point("m", {"f": 1.5}), Point("m", {"f": "a"})],
        "point 'm': no field is left to store: 'f' is of type str, expected float, since InfluxDB "
        "fixes a field's type at its first value. Send one type, or use another name",
        FieldError,
    ),
    *(
        sent(Point("m", {key: 1}), f"point 'm': field key {key!r} {reason}")
        for key, reason in (
            ("", "is empty; InfluxDB knows no empty names"),
            ("time", TIME_COLUMN),
            ("f\\", LAST_BACKSLASH),
            ("a\\,b", BACKSLASH),
            ("\tf", "begins with a tab or NUL; add a field with another name"),
            ("_name", OWN_NAME),
        )
    ),
    sent(
        Point("m", []),  # type: ignore[arg-type]
        "point 'm': fields []: expected a mapping such as a dict",
    ),
    sent(
        Point("m", {1: 1}),  # type: ignore[dict-item]
        "point 'm': fields: key 1: expected a str",
    ),
    sent(
        Point("m", Pairs([("a", 1), (Word("a"), 2)])),
        "point 'm': fields: key 'a' is there twice; expected each key once",
    ),
    sent(
        Point("m", Pairs(None)),
        "point 'm': fields cannot be read: RuntimeError('gone'); expected a mapping such as a dict",
    ),
    *(
        sent(Point("m", {"f": value}), f"point 'm': field 'f': {shown} {INTEGERS}", FieldError)
        for value, shown in (
            (2**63, "9223372036854775808"),
            (-(2**63) - 1, "-9223372036854775809"),
            (10**5000, "<int whose repr raises ValueError>"),
        )
    ),
    *(
        sent(
            Point("m", {"f": value}),
            f"point 'm': field 'f': {shown} is of type {type(value).__name__}; {VALUES}",
            FieldError,
        )
        for value, shown in (
            (b"x", "b'x'"),
            ([1], "[1]"),
            ({}, "{}"),
            (datetime(2020, 1, 1), "datetime.datetime(2020, 1, 1, 0, 0)"),
            (timedelta(1), "datetime.timedelta(days=1)"),
            (object, "<class 'object'>"),
            (1j, "1j"),
            (Broken(), "<Broken whose repr raises KeyError>"),
        )
    ),
    *(
        sent(
            Point("m", {"f": value}),
            f"point 'm': field 'f': {shown} is beyond InfluxDB's 64-bit floats; expected "
            "-1.7976931348623157e+308 to 1.7976931348623157e+308. Send a str",
            FieldError,
        )
        for value, shown in (
            (Decimal("1e400"), "Decimal('1E+400')"),
            (Decimal("-1e309"), "Decimal('-1E+309')"),
        )
    ),
    sent(
        Point("m", {"f": Scalar()}),
        "point 'm': field 'f' cannot be read: RuntimeError('no item'); expected float, int, bool "
        "or str",
        FieldError,
    ),
    sent(
        Point("m", {"f": "\udfff"}),
        "point 'm': '\\udfff' is half of a surrogate pair, no character; decode the text it came "
        "from with errors='replace'",
    ),
    # Its time.
    *(
        sent(Point("m", F, None, time), f"point 'm': timestamp {shown}: {TIMES}")  # type: ignore[arg-type]
        for time, shown in (
            (True, "True"),
            (1.5, "1.5"),
            ("yesterday", "'yesterday'"),
            (Broken(), "<Broken whose repr raises KeyError>"),
        )
    ),
    *(
        sent(Point("m", F, None, time), f"point 'm': timestamp {time!r}: {ENDS}")
        for time in (MIN_TIME - 1, MAX_TIME + 1, 10**30, datetime(2300, 1, 1))
    ),
    # Rounded down to whole seconds it is too early.
    sent(Point("m", F, None, MIN_TIME), f"point 'm': timestamp {MIN_TIME}: {ENDS}", precision="s"),
    sent(
        Point("m", F, None, Nowhere(2020, 1, 1)),
        "point 'm': timestamp Nowhere(2020, 1, 1, 0, 0) cannot be read: RuntimeError('no zone'); "
        "expected nanoseconds since 1970 as an int, or a datetime",
    ),
    # All of it together.
    sent(Point("m", {',\\"f': 1}, {"k\\ ": "v"}), f"point 'm': {TOGETHER}"),
]

# -- lines -------------------------------------------------------------------------------------


def decoded(line: bytes, text: str) -> Row:
    """Of a line that is decoded: in influxd's words."""
    return Row(DecodeError, text, lambda _: celery_influx.decode(line))


def unparsable(line: bytes, reason: str) -> Row:
    """The same, where these quote the line."""
    return decoded(line, f"unable to parse '{line.decode()}': {reason}")


POINTS += [
    Row(
        FieldError,
        "point 'm': a string with a newline, which ends the line for this server; replace it",
        lambda parts: parts.database(transport="tcp").send_data(Point("m", {"s": "a\nb"})),
    )
]
LINES = [
    *(
        decoded(line, f"expected one line with a point, found {count}: {line!r}")
        for line, count in ((b"", 0), (b"# m f=1", 0), (b"m f=1\nm f=1", 2))
    ),
    unparsable(b",a=b f=1", "missing measurement"),
    unparsable(b"m, f=1", "missing tag key"),
    unparsable(b"m,a f=1", "missing tag value"),
    unparsable(b"m,a= f=1", "missing tag value"),
    unparsable(b"m,a=b=c f=1", "invalid tag format"),
    unparsable(b"m,a=b,a=c f=1", "duplicate tags"),
    unparsable(b"m", "missing fields"),
    unparsable(b"m f", "invalid field format"),
    unparsable(b"m f=1,", "invalid field format"),
    unparsable(b"m =1", "missing field key"),
    unparsable(b"m f=", "missing field value"),
    unparsable(b'm f="', "unbalanced quotes"),
    unparsable(b"m f=x", "invalid boolean"),
    unparsable(b"m f=1x", "invalid number"),
    unparsable(b"m f=1u", "invalid number"),
    unparsable(b"m f=1e", "invalid float"),
    unparsable(b"m f=1e400", "invalid float"),
    unparsable(
        b"m f=9223372036854775808i",
        "unable to parse integer 9223372036854775808: "
        'strconv.ParseInt: parsing "9223372036854775808": value out of range',
    ),
    unparsable(b"m a\\\\=1", "invalid value: field-key=a\\\\=1"),
    unparsable(b"m" * 65_536 + b" f=1", "max key length exceeded: 65536 > 65535"),
    unparsable(b"m " + b"f" * 65_531 + b"=1", "max key length exceeded: 65536 > 65535"),
    unparsable(b"m f=1 x", "bad timestamp"),
    unparsable(b"m f=1 -", 'strconv.ParseInt: parsing "-": invalid syntax'),
    unparsable(b"m f=1 1 2", "point is invalid"),
    unparsable(
        b"m f=1 9223372036854775807",
        "time outside range -9223372036854775806 - 9223372036854775806",
    ),
    unparsable(
        b"m f=1 " + b"9" * 5000,
        f'strconv.ParseInt: parsing "{"9" * 5000}": value out of range',
    ),
    decoded(
        b"m f=1,f=t",
        'field type conflict: input field "f" on measurement "m" is type boolean, already exists '
        "as type float",
    ),
    decoded(b"m,time=1 f=1", 'invalid tag key: input tag "time" on measurement "m" is invalid'),
    decoded(b"m time=1", 'invalid field name: input field "time" on measurement "m" is invalid'),
    decoded(b"m f\xff=1", 'proto: field "tsdb.Field.Name" contains invalid UTF-8'),
    decoded(b"m\xff f=1", 'proto: field "tsdb.MeasurementFields.Name" contains invalid UTF-8'),
    decoded(rb'm a\\="=\="', 'engine: unable to parse bool value "\\=""'),
    # Sent to influxd 1.6.7, this line ends the server.
    decoded(rb'm a\\="b="', "engine: slice bounds out of range"),
]

# -- queries, before they are sent -------------------------------------------------------------


def asked(statement: Any, text: str, **options: Any) -> Row:
    """Of a query that is refused before it is sent."""
    return Row(QueryError, text, lambda parts: parts.database().query(statement, **options))


READS = "expected SHOW, SELECT without INTO, or EXPLAIN of such a SELECT; to change data use post"
BOUND = (
    "expected a string, a finite number, a 64-bit integer, a boolean or one of {'duration': '1h'}, "
    "{'identifier': 'name'}, {'regex': '.*'}"
)
SHOW = "SHOW DATABASES"
SURROGATE = "half a surrogate pair is no text; expected Unicode text"


def _quote(quote: Callable[[str], str], name: str, _: Parts) -> None:
    quote(name)


QUERIES = [
    asked(
        "drop measurement m", f"query: DROP MEASUREMENT is not a statement that only reads; {READS}"
    ),
    asked("DELETE FROM m", f"query: DELETE is not a statement that only reads; {READS}"),
    asked("BOGUS", f"query: BOGUS is not a statement that only reads; {READS}"),
    asked('"x" y', f"query: '\"x\"' is not a statement that only reads; {READS}"),
    asked("SELECT f INTO t FROM m", f"query: SELECT … INTO writes; {READS}"),
    asked("'x' INTO t", f"query: a statement … INTO writes; {READS}"),
    asked("EXPLAIN DROP SERIES", f"query: EXPLAIN of something other than SELECT; {READS}"),
    asked(" ; -- x", f"query: no statement in ' ; -- x'; {READS}"),
    asked("SHOW \0", f"query: a NUL or half a surrogate pair in the text; {READS}"),
    *(
        asked(statement, f"query: cannot tell how the server reads character {place}; {READS}")
        for statement, place in (
            ("SELECT f FROM m WHERE t = 'x", '27, "\'x"'),
            ("SELECT a.b./2 FROM m", "12, '/2 FROM m'"),
            ("SELECT f + /2/ FROM m", "12, '/2/ FROM m'"),
            ("SELECT f FROM /m", "15, '/m'"),
        )
    ),
    asked(None, "statement: expected a str, got a value of type NoneType"),
    asked(b"CREATE USER", "statement: expected a str, got a value of type bytes"),
    asked("SHOW \ud800", f"statement: {SURROGATE}"),
    asked(SHOW, "database: expected a str, got a value of type int", database=5),
    asked(SHOW, f"database: {SURROGATE}", database="\ud800"),
    asked(SHOW, "retention_policy: expected a str, got a value of type int", retention_policy=5),
    *(
        asked(SHOW, f"epoch: expected one of ns, u, ms, s, m, h; got {epoch!r}", epoch=epoch)
        for epoch in ("us", "NS", "rfc3339", "", 5)
    ),
    *(
        asked(SHOW, f"timeout: expected seconds greater than 0, got {shown}", timeout=timeout)
        for timeout, shown in ((0, "0"), (-1.5, "-1.5"), (float("nan"), "nan"), ("5", "'5'"))
    ),
    *(
        asked(
            SHOW,
            f"params: expected a mapping with str keys, such as {{'host': 'a'}}; got {params!r}",
            params=params,
        )
        for params in (["a"], {1: "a"})
    ),
    *(
        asked(SHOW, f"params['v']: {BOUND}; got {repr(value)[:80]}", params={"v": value})
        for value in (
            None,
            [1],
            (),
            2**63,
            float("nan"),
            float("inf"),
            b"x",
            {},
            {"x": "y"},
            {"regex": 1},
            "\ud800",
            "\ud800" * 100,
        )
    ),
    *(
        Row(QueryError, text, partial(_quote, quote, name))
        for quote in (quote_ident, quote_string)
        for name, text in (
            ("a\0", "'a\\x00': InfluxQL has no way to write a NUL; bind it by params"),
            ("a\r", "'a\\r': InfluxQL has no way to write a carriage return; bind it by params"),
            ("a\ud800", f"'a\\ud800': {SURROGATE}"),
        )
    ),
    # The helper task hands its arguments on.
    Row(
        QueryError,
        f"query: DROP MEASUREMENT is not a statement that only reads; {READS}",
        lambda parts: parts.task("query", "DROP MEASUREMENT m"),
    ),
]

# -- what servers answer -----------------------------------------------------------------------

HOME = "http://127.0.0.1:PORT/m"
OTHER = "is this InfluxDB's HTTP API, and are 'api', 'database' and 'http_port' right?"
FAILED = "the log of the server, or of a proxy in front of it, says more"


def answered(
    ask: str,
    status: int,
    body: bytes,
    text: str,
    *,
    headers: dict[str, str] | None = None,
    error: type[Exception] = QueryError,
    api: str = "1",
    query_rows: int = 10,
    query_bytes: int = 10_000,
    **more: Any,
) -> Row:
    """Of a server that answers a query or the like, or a write, so."""

    def provoke(parts: Parts) -> None:
        parts.stub.answer = lambda handler: handler.reply(status, body, **(headers or {}))
        limits = {"query_rows": query_rows, "query_bytes": query_bytes}
        database = parts.database(username="u", password="hunter2", api=api, **limits)
        if ask == "write":
            HTTPClient(database.options).write(b"m f=1")
        elif ask == "ping":
            database.ping()
        else:
            getattr(database, ask)(SHOW, **more)

    return Row(error, text, provoke)


def failed(status: int, body: bytes, text: str, **headers: str) -> Iterable[Row]:
    """Of a server that answers every request so."""
    for ask, error, expected in (
        ("write", SendError, 204),
        ("ping", SendError, 204),
        ("query", QueryError, 200),
        ("post", QueryError, 200),
    ):
        full = f"{HOME}: expected {expected}, got {text}"
        yield answered(ask, status, body, full, headers=headers, error=error)


NO_ANSWER = (
    'the answer is JSON, but not of the shape that InfluxDB gives; expected {"results": […]}; '
    "is this InfluxDB's HTTP API?"
)
UNKNOWN_SHAPE = "the answer is JSON of an unknown shape; expected "
ONE_BY_ONE = "one of the statements failed; send them one by one, or chunked, to learn why"
ANSWERS = [
    *failed(503, b"<html>\n <h1>busy</h1></html>", f"503: <html> <h1>busy</h1></html>; {FAILED}"),
    *failed(500, b'{"error":"timeout"}', f"500: timeout; {FAILED}"),
    *failed(500, b"[1]", f"500: [1]; {FAILED}"),
    *failed(500, b"x" * 10_000, f"500: {'x' * 499}…; {FAILED}"),
    *failed(502, b"", f"502; {FAILED}"),
    *failed(502, b"\xff\xfe", f"502: \ufffd\ufffd; {FAILED}"),
    # InfluxDB 2's way to say it.
    *failed(422, b'{"code":"invalid","message":"no field"}', f"422: no field; {OTHER}"),
    *failed(400, b'{"error":"database is required"}', f"400: database is required; {OTHER}"),
    # Our own secrets are not in it.
    *failed(
        401,
        b'{"error":"wrong password hunter2"}',
        "401: wrong password ***; set 'username' and 'password', or 'token', to what the server "
        "knows",
    ),
    *failed(403, b"", "403; give the user the right to do this"),
    *failed(
        404,
        b'{"error":"database not found: \\"x\\""}',
        "404: database not found: \"x\"; create the database, or correct 'database' and "
        "'http_port'",
    ),
    *failed(
        413,
        b'{"error":"Request Entity Too Large"}',
        "413: Request Entity Too Large; lower 'batch_bytes' below the server's max-body-size",
    ),
    *failed(
        307,
        b"",
        "307, which points to http://elsewhere.example/; redirects are not followed: set that URL",
        Location="http://elsewhere.example/",
    ),
    *failed(301, b"", "301, which points to nowhere; redirects are not followed: set that URL"),
    *(
        answered(
            ask,
            200,
            b"<html>welcome",
            f"{HOME}: expected 204, got 200: <html>welcome; {OTHER}",
            error=SendError,
        )
        for ask in ("write", "ping")
    ),
    answered(
        "write",
        400,
        b'{"error":"field type conflict"}',
        f"{HOME}: field type conflict; expected one type for each field of a measurement",
        error=SendError,
    ),
    answered(
        "query",
        400,
        b'{"error":"error parsing query: found hunter2"}',
        "the server answered: error parsing query: found ***",
        headers={"X_Influxdb_Version": "1.6.7"},
    ),
    *(
        answered("query", 200, body, f"the server answered: {words}")
        for body, words in (
            (b'{"error":"error parsing query: x"}', "error parsing query: x"),
            (
                b'{"results":[{"series":[{}]},{"error":"database name required"}]}',
                "database name required",
            ),
            (
                b'{"results":[{"error":"not executed"}]}',
                f"not executed: {ONE_BY_ONE}",
            ),
        )
    ),
    *(
        answered("query", 200, body, NO_ANSWER)
        for body in (b"[]", b"null", b'{"results":7}', b'{"results":[7]}')
    ),
    answered("query", 200, b"[1]", UNKNOWN_SHAPE + "[{…}, …]; is 'api' right?", api="3"),
    *(
        answered(
            "query",
            200,
            body,
            UNKNOWN_SHAPE + '{"status": "success", "data": {…}}; is this VictoriaMetrics\' API?',
            api="victoria",
        )
        for body in (
            b"[]",
            b"{}",
            b'{"data":{"resultType":"string","result":[1,"x"]}}',
            b'{"data":{"resultType":"scalar","result":[Infinity,"1"]}}',
            b'{"data":{"resultType":"vector","result":[{"metric":{},"value":[1,"x"]}]}}',
        )
    ),
    answered(
        "query",
        422,
        b'{"status":"error","errorType":"422","error":"unexpected token"}',
        "the server answered: unexpected token",
        api="victoria",
    ),
    answered(
        "post",
        200,
        b"",
        "post: VictoriaMetrics has no statement that changes data; to delete series use its "
        "address /api/v1/admin/tsdb/delete_series",
        api="victoria-cluster",
    ),
    *(
        answered(
            "query",
            200,
            b"",
            f"{name}: VictoriaMetrics is asked in PromQL without it; {instead}",
            api="victoria",
            **{name: given},
        )
        for name, given, instead in (
            ("params", {"a": 1}, "write the values into the statement"),
            ("database", "x", 'ask for its label: up{db="name"}'),
            ("retention_policy", "x", "it has none"),
            ("chunked", True, "its answers are whole"),
        )
    ),
    *(
        answered(
            "query",
            200,
            body,
            f"{HOME}: expected JSON, got {kind or 'no content type'}: {shown!r}; is this "
            "InfluxDB's HTTP API?",
            headers={"Content_Type": kind} if kind else {},
            chunked=chunked,
        )
        for body, kind, shown, chunked in (
            (b"", "", "", True),
            (b'{"results":', "text/plain", '{"results":', False),
            (b"<html>hunter2" + b"x" * 1_000, "text/html", f"<html>***{'x' * 490}…", False),
        )
    ),
]

# -- servers that do not answer ----------------------------------------------------------------

FEWER = "ask for less, by LIMIT, a shorter time or GROUP BY time(…), or set"
TOO_LONG = [
    *(
        answered("query", 200, body, text, query_rows=2, query_bytes=1_024, **chunked)
        for chunked in ({}, {"chunked": True})
        for body, text in (
            (
                b'{"results":[{"series":[{"values":[[1],[2],[3]]}]}]}',
                f"the answer is of more than 2 rows; {FEWER} 'query_rows' higher",
            ),
            # No server that is known writes JSON so.
            (
                b'{"results":[{"series":[{"values":[[1] , [2] , [3]]}]}]}',
                f"the answer is of more than 2 rows; {FEWER} 'query_rows' higher",
            ),
            (
                b" " * 1_025,
                f"the answer is longer than 1,024 bytes; {FEWER} 'query_bytes' higher",
            ),
        )
    ),
    # What cannot be unpacked.
    *(
        answered(
            "query",
            200,
            body,
            f"{HOME}: the answer cannot be unpacked: {why} (connection); is a proxy in between "
            "that packs by itself?",
            headers={"Content_Encoding": kind},
            error=SendError,
        )
        for body, kind, why in (
            (b"{}", "br", "'br' was not asked for"),
            (gzip.compress(b"{}")[:-1], "gzip", "its end is missing"),
            (
                b"{}" * 9,
                "gzip",
                "Error -3 while decompressing data: incorrect header check",
            ),
        )
    ),
]

REACH = "is the server running, and are 'host' and 'http_port' right?"
SECURE = HOME.replace("http:", "https:")


def unanswered(text: str, provoke: Callable[[Parts], object]) -> Row:
    """Of a server that is not there, or behaves oddly."""
    return Row(SendError, text, provoke)


def _be_refused(parts: Parts) -> None:
    parts.port = free_port()
    parts.database(http_port=parts.port).query(SHOW)


def _wait_in_vain(parts: Parts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        parts.port = silent.getsockname()[1]
        parts.database(http_port=parts.port).ping(timeout=SHORT)


def _be_hung_up_on(parts: Parts) -> None:
    parts.stub.answer = lambda handler: setattr(handler, "close_connection", True)
    parts.database().ping()


def _use_a_broken_proxy(parts: Parts) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
        patched.delenv("NO_PROXY", raising=False)
        patched.delenv("no_proxy", raising=False)
        parts.database(host="influx.invalid").ping()


def _trust_rubbish(parts: Parts) -> None:
    rubbish = parts.folder / "rubbish.pem"
    rubbish.write_text("rubbish")
    with pytest.raises(ssl.SSLError) as caught:
        ssl.create_default_context(cafile=rubbish)
    parts.words = str(caught.value.reason)  # OpenSSL's, which differ by version
    parts.database(secure=True, ca_file=str(rubbish)).ping()


def _not_trust(parts: Parts) -> None:
    # The real one is in integration/test_http_influxd.py.
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "unable to get local issuer certificate"
    with mock.patch("requests.Session.request", side_effect=error):
        parts.database(secure=True).ping()


def _not_trust_by_old_urllib3(parts: Parts) -> None:
    """Before 2.0 it compares the names by itself."""
    error = type("CertificateError", (ValueError,), {})("hostname 'a' doesn't match 'b'")
    with mock.patch("requests.Session.request", side_effect=error):
        parts.database(secure=True).ping()


def _read_slowly(parts: Parts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        parts.port = server.getsockname()[1]

        def drip() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                while True:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            parts.database(http_port=parts.port).ping(timeout=SHORT)
        finally:
            thread.join()


def _use_a_key_with_a_passphrase(parts: Parts) -> None:
    key = parts.folder / "encrypted.key"
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    parts.database(secure=True, client_certificate=str(key)).ping()


def _read_secret(content: bytes | None, **options: Any) -> Callable[[Parts], object]:
    """A token, from a file that holds ``content``, unless ``options`` say something else."""

    def provoke(parts: Parts) -> None:
        file = parts.folder / "token"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        given = {"username": None, "password": None, **(options or {"token_file": str(file)})}
        parts.database(**given).ping()

    return provoke


def _send(host: str, payload: bytes = b"m f=1", times: int = 1) -> Callable[[Parts], None]:
    """By UDP, to a port at which nobody listens."""

    def provoke(parts: Parts) -> None:
        parts.port = free_port()
        with contextlib.closing(UDPPool(DatabaseOptions(host=host, udp_port=parts.port))) as pool:
            for _ in range(times - 1):
                with contextlib.suppress(SendError):
                    pool.write(payload)
            pool.write(payload)

    return provoke


def _look_up(answer: Any, times: int) -> Callable[[Parts], None]:
    """By UDP, where the resolver gives or raises ``answer``."""

    def provoke(parts: Parts) -> None:
        with mock.patch("socket.getaddrinfo", side_effect=answer):
            _send("influx.invalid", times=times)(parts)

    return provoke


def _spool_into_a_file(parts: Parts) -> None:
    """Where the folder should be made."""
    path = parts.folder / "m-8b384454"
    path.write_bytes(b"")
    parts.words = str(path)
    Spool(
        "m",
        "here",
        str(parts.folder),
        1_000_000,
        Counters(1).row(0),
        Report(logging.getLogger("t")),
    ).open()


def _connect(parts: Parts) -> None:
    """By TCP, to a port at which nobody listens."""
    parts.port = free_port()
    TCPConnection(DatabaseOptions(host="127.0.0.1", tcp_port=parts.port)).write()


#: Sockets in the file system: payload, what is there, and what comes of it.
UNIXGRAM = [
    (
        *(b"m f=1", "nothing", "no such file or directory (ENOENT)"),
        "is Telegraf running, with a [[inputs.socket_listener]] on this 'socket_path'?",
    ),
    (
        *(b"m f=1", "nobody", "connection refused (ECONNREFUSED)"),
        "the socket is there, and nobody listens; is Telegraf running?",
    ),
    (
        *(b"m f=1", "stream", "protocol wrong type for socket (EPROTOTYPE)"),
        "is 'socket_path' the socket of a listener for datagrams?",
    ),
    (
        *(b"m f=1", "full", "resource temporarily unavailable (EAGAIN)"),
        "the listener does not keep up",
    ),
    (
        *(b"m" * 10_000_000, "listener", "message too long (EMSGSIZE)"),
        "set 'datagram_bytes' lower",
    ),
    (
        *(b"m f=1", "denied", "permission denied (EACCES)"),
        "let this process's user write to the socket: 'socket_mode' in Telegraf",
    ),
]


def _send_by_file(payload: bytes, there: str) -> Callable[[Parts], None]:
    def provoke(parts: Parts) -> None:
        parts.words = path = str(parts.folder / f"{there}.sock")
        with contextlib.ExitStack() as stack:
            if there != "nothing":
                kind = socket.SOCK_STREAM if there == "stream" else socket.SOCK_DGRAM
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
                listener.bind(path)
                if there == "stream":
                    listener.listen()
                if there == "nobody":
                    listener.close()
            if there == "denied":  # root may do all
                error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                stack.enter_context(mock.patch("socket.socket.connect", side_effect=error))
            client = UnixDatagrams(DatabaseOptions(transport="unixgram", socket_path=path))
            stack.callback(client.close)
            while True:
                client.write(payload)
                if there != "full":
                    return

    return provoke


UNANSWERED = [
    Row(
        InfluxError,
        "m: no HTTP API, since 'http_port' is 0; expected a port, 8086 for instance; ping, query "
        "and post need it",
        lambda parts: parts.database(http_port=0).query(SHOW),
    ),
    Row(
        PermissionError,
        "WORDS is no folder of this user's; expected one, or a 'spool_dir' in which it can be made",
        _spool_into_a_file,
    ),
    unanswered(f"{HOME}: connection refused (ECONNREFUSED); {REACH}", _be_refused),
    # The helper task's error is the same.
    unanswered(
        f"http://127.0.0.1:9/x: connection refused (ECONNREFUSED); {REACH}",
        lambda parts: parts.task("ping"),
    ),
    unanswered(
        "http://nowhere.invalid:PORT/m: the host's name is unknown (dns); correct 'host'",
        lambda parts: parts.database(host="nowhere.invalid").ping(),
    ),
    # Nor is the proxy's password in it.
    unanswered(
        "http://influx.invalid:PORT/m: the proxy failed (connection); correct HTTP_PROXY, "
        "HTTPS_PROXY or NO_PROXY",
        _use_a_broken_proxy,
    ),
    unanswered(
        f"{HOME}: no answer within {SHORT} s (timeout); is the server overloaded, or "
        "'http_timeout' too short?",
        _wait_in_vain,
    ),
    unanswered(
        f"{HOME}: the connection failed: RemoteDisconnected (connection); is this InfluxDB's HTTP "
        "port, and is 'secure' right?",
        _be_hung_up_on,
    ),
    unanswered(
        f"{HOME}: an answer came so slowly that it took more than {SHORT} s (timeout); is the "
        "server overloaded, or 'http_timeout' too short?",
        _read_slowly,
    ),
    *(
        unanswered(
            f"{HOME}: {why} (secret); expected a secret as the server knows it, that this process "
            "may read",
            _read_secret(content, **options),
        )
        for why, content, options in (
            (
                "the file that 'token_file' names cannot be read: no such file or directory",
                None,
                {},
            ),
            ("the file that 'token_file' names is empty", b"\n", {}),
            ("the file that 'token_file' names holds no UTF-8 text", b"hunter2\xff", {}),
            (
                "the file that 'token_file' names is longer than 65,536 bytes",
                SECRET.encode() * 9_999,
                {},
            ),
            ("the token holds a newline or another control character", b"hunter2\n\n", {}),
            (
                "the token holds a newline or another control character",
                None,
                {"token": "hunter2\x7f"},
            ),
            (
                "the environment variable that 'token_env' names is not set, or empty",
                None,
                {"token_env": SECRET},
            ),
            (
                "the file that 'password_file' names cannot be read: no such file or directory",
                None,
                {"username": "u", "password_file": SECRET},
            ),
        )
    ),
    unanswered(
        f"{SECURE}: client_key has a passphrase (tls); expected a file of a key without one",
        _use_a_key_with_a_passphrase,
    ),
    *(
        unanswered(
            f"{SECURE}: {option} 'no/such.pem' cannot be read (tls); expected a file of PEM "
            "certificates",
            lambda parts, given=given: parts.database(secure=True, **given).ping(),
        )
        for option, given in (
            ("client_certificate", {"client_certificate": "no/such.pem"}),
            ("client_key", {"client_certificate": __file__, "client_key": "no/such.pem"}),
        )
    ),
    unanswered(
        f"{SECURE}: ca_file 'no/such.pem' cannot be read (tls); expected a file of PEM "
        "certificates",
        lambda parts: parts.database(secure=True, ca_file="no/such.pem").ping(),
    ),
    unanswered(
        f"{SECURE}: no TLS connection: WORDS (tls); does this port speak HTTPS, and is 'ca_file' "
        "a file of PEM certificates?",
        _trust_rubbish,
    ),
    unanswered(
        f"{SECURE}: the certificate is not trusted: unable to get local issuer certificate (tls); "
        "set 'ca_file' to the certificate of who signed it",
        _not_trust,
    ),
    unanswered(
        f"{SECURE}: the certificate is not trusted: hostname 'a' doesn't match 'b' (tls); correct "
        "'host'",
        _not_trust_by_old_urllib3,
    ),
    unanswered(
        "udp://127.0.0.1:PORT did not take the datagram (ECONNREFUSED: Connection refused); nobody "
        "listens there; is the server's [[udp]] service on?",
        _send("127.0.0.1"),
    ),
    unanswered(
        "udp://127.0.0.1:PORT did not take the datagram (EMSGSIZE: Message too long); the route "
        "takes no datagram that long; set 'datagram_bytes' lower",
        _send("127.0.0.1", b"x" * 65_508),
    ),
    unanswered(
        "tcp://127.0.0.1:PORT: connection refused (ECONNREFUSED); does a server for line protocol "
        "over TCP listen there, and does it keep up?",
        _connect,
    ),
    *(
        unanswered(f"unixgram://WORDS: {happened}; {mend}", _send_by_file(payload, there))
        for payload, there, happened, mend in UNIXGRAM
    ),
    # At once, and again while the name is not looked up again.
    *(
        unanswered(
            "udp://influx.invalid:PORT did not take the datagram (dns: [Errno -2] Name or service "
            "not known); the host name is unknown; check 'host'",
            _look_up(socket.gaierror(-2, "Name or service not known"), times),
        )
        for times in (1, 2)
    ),
    unanswered(
        "udp://influx.invalid:PORT did not take the datagram (EADDRNOTAVAIL: "
        f"{os.strerror(errno.EADDRNOTAVAIL)}); see docs/how-to/enable-udp",
        _look_up([[]], 1),
    ),
]

# -- the plugin and timed ----------------------------------------------------------------------


@shared_task(name="shared")
def _shared() -> None:
    """A task that each app makes for itself."""


def mistaken(wrong: Any, kind: str) -> Row:
    """Of what ``timed`` gets, and cannot time."""
    return Row(
        TypeError,
        f"timed got a value of type {kind}; expected a function, or a string as the timer's name",
        lambda _: celery_influx.timed(wrong),
    )


UNKNOWN = "no database 'wbe' in influx_databases; expected one of 'main', 'web'"
PLUGIN = [
    Row(ConfigError, UNKNOWN, lambda parts: parts.plugin()["wbe"]),
    Row(ConfigError, UNKNOWN, lambda parts: parts.plugin().send_data(Point("m", F), "wbe")),
    Row(ConfigError, UNKNOWN, lambda parts: parts.task("ping", "wbe")),
    Row(ConfigError, UNKNOWN, lambda parts: parts.task("query", SHOW, "wbe")),
    mistaken(5, "int"),
    mistaken(["name"], "list"),
    mistaken(classmethod(lambda cls: None), "classmethod"),
    Row(
        TypeError,
        "@timed stands above @shared_task, which makes a task for each app only later; put @timed "
        "below it, next to the function",
        lambda _: celery_influx.timed(_shared),
    ),
]

# -- all of them -------------------------------------------------------------------------------

ROWS = [*POINTS, *LINES, *QUERIES, *ANSWERS, *TOO_LONG, *UNANSWERED, *PLUGIN]


class Told(NamedTuple):
    """What came of all the rows."""

    errors: list[tuple[Exception | None, str]]  # and the text that each should have
    shown: list[str]  # of each, what logs and reporters make visible
    lines: set[tuple[str, int]]  # of the package's modules, that had a say in these texts


class Watch:
    """Which lines of the package run, and what came of each call: what it raised or returned."""

    def __init__(self) -> None:
        self._files = {str(PACKAGE / name): name for name in _modules()}
        self._calls: list[tuple[str, set[int], tuple[object, ...]]] = []
        self._lines: dict[FrameType, set[int]] = {}

    def __call__(self, frame: FrameType, event: str, came: Any) -> Watch | None:
        """What ``sys.settrace`` calls."""
        name = self._files.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = self._lines.setdefault(frame, set())
        if event == "line":
            lines.add(frame.f_lineno)
        elif event == "exception":
            self._calls.append((name, lines, (came[1],)))
        elif event == "return" and isinstance(came, (str, tuple, Exception)):
            self._calls.append((name, lines, came if isinstance(came, tuple) else (came,)))
        return self

    def lines_behind(self, text: str) -> set[tuple[str, int]]:
        """Those of calls that raised or returned ``text`` or parts of it."""
        return {
            (name, line)
            for name, lines, came in self._calls
            if any(map(str, came)) and all(str(each) in text for each in came)
            for line in lines
        }


def _all_of(error: BaseException | None, *, locals_too: bool) -> Iterator[str]:
    """An error as logs and reporters show it: its text, what is behind it, and our variables.

    These hold a secret only where the server itself has said it.
    """
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None:
            continue
        yield from (str(each), repr(each), repr(each.args))
        waiting += [each.__cause__, each.__context__]
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if locals_too and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
                for value in frame.f_locals.values():
                    with contextlib.suppress(Exception):
                        yield repr(value)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Every row provoked, once."""
    found = Told([], [], set())
    folder = tmp_path_factory.mktemp("rows")
    with serving() as stub:
        for row in ROWS:
            parts, watch, error = Parts(stub, folder), Watch(), None
            before = sys.gettrace()
            sys.settrace(watch)
            try:
                row.provoke(parts)
            except Exception as raised:
                error = raised
            finally:
                sys.settrace(before)
            text = row.text.replace("PORT", str(parts.port)).replace("WORDS", parts.words)
            found.errors.append((error, text))
            found.shown.append("\n".join(_all_of(error, locals_too="***" not in text)))
            found.lines.update(watch.lines_behind(text))
    return found


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: ROWS[number].text[:60])
def test_the_error_says_what_was_wrong_what_was_expected_and_what_to_do(
    number: int, told: Told
) -> None:
    error, text = told.errors[number]

    assert type(error) is ROWS[number].error
    assert str(error) == text
    assert not text.endswith(".")
    if isinstance(error, SendError):
        assert error.cause in text
    if isinstance(error, (SendError, QueryError)):
        # Of requests' errors, which hold the URL, nothing is left.
        assert error.__context__ is None or text.startswith(("udp:", "tcp:", "unixgram:"))


def test_no_error_shows_a_secret_nor_does_what_the_functions_behind_it_held(told: Told) -> None:
    leaks = [ROWS[number].text for number, shown in enumerate(told.shown) if SECRET in shown]

    assert leaks == []


def _modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _places(name: str) -> Iterator[range]:
    """The lines of each place in a module that makes an error, or a part of its text."""
    tree = ast.parse((PACKAGE / name).read_text())
    for node in ast.walk(tree):
        made: list[Any] = []
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            made = [node] if called.endswith("Error") else []
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            made = [node]
        elif isinstance(node, ast.FunctionDef) and node.name in TELLERS:
            returns = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
            made = [each for each in returns if ast.unparse(each) != "return ''"]
        for each in made:
            yield range(each.lineno, each.end_lineno + 1)


def test_every_place_that_makes_an_error_has_its_row(told: Told) -> None:
    unreached = [
        f"{name}:{lines.start}"
        for name in _modules()
        if name not in ELSEWHERE
        for lines in _places(name)
        if not any((name, line) in told.lines for line in lines)
    ]

    assert unreached == []


def test_every_advice_for_a_status_or_a_cause_has_its_row(told: Told) -> None:
    for advice in [*http._MEND.values(), *udp._MENDS.values(), *unixgram._MENDS.values()]:
        assert any(text.endswith(f"; {advice}") for _, text in told.errors), advice
