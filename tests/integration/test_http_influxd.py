"""HTTPClient against a real influxd, and what of it VictoriaMetrics takes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from celery_influx.database import Database
from celery_influx.errors import QueryError, SendError
from celery_influx.line_protocol import Encoder
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.queries import quote_ident, quote_string, require_read_only
from celery_influx.transports.http import HTTPClient
from tests.certificates import make
from tests.servers import Influxd, VictoriaMetrics
from tests.test_cli import run as set_up
from tests.test_queries import ADMINISTERING, FEWER, READING, STOLEN, UNREADABLE, WRITING

pytestmark = pytest.mark.once

HOUR = 3_600_000_000_000
HOSTILE = [
    "plain",
    'a"b',
    "a'b",
    "a\\b",
    "x' OR 1=1 --",
    "a;b",
    "/* x */",
    "-- x",
    "ünï ☃",
    "$x",
    " ",
]


def _client(
    server: Influxd | VictoriaMetrics, database: str = "celery", **options: Any
) -> HTTPClient:
    return HTTPClient(_options(server, database, **options))


def _options(server: Influxd | VictoriaMetrics, database: str, **options: Any) -> DatabaseOptions:
    settings = {"host": "127.0.0.1", "http_port": server.http_port, "transport": "http", **options}
    return DatabaseOptions(database=database, **settings)


@pytest.fixture
def client(influxd: Influxd, database: str) -> Iterator[HTTPClient]:
    """A client of a fresh database."""
    with _client(influxd, database) as opened:
        yield opened


# -- ping and write ------------------------------------------------------------------------------


def test_a_ping_tells_the_version(client: HTTPClient) -> None:
    version, seconds = client.ping()

    assert version is not None
    assert version.startswith("1.")
    assert 0 < seconds < 5


@pytest.mark.parametrize(
    ("precision", "unit"), [("ns", 1), ("u", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)]
)
def test_what_is_written_is_read_back_in_every_precision(
    influxd: Influxd, database: str, precision: str, unit: int
) -> None:
    now = time.time_ns() // unit
    client = _client(influxd, database, precision=precision)

    assert client.write(b'm,t=a f=1.5,i=7i,s="x",b=t %d' % now) == 0

    assert client.query("SELECT * FROM m").rows() == [
        {"time": now * unit, "f": 1.5, "i": 7, "s": "x", "b": True, "t": "a"}
    ]


def test_a_compressed_body_is_stored_whole_and_its_bad_lines_are_counted(
    influxd: Influxd, database: str
) -> None:
    client = _client(influxd, database, gzip=True)
    lines = [b"m,t=a f=%d %d" % (number, number) for number in range(1, 5_001)]

    assert client.write(b"\n".join([*lines, b"bad"])) == 1

    assert client.query("SELECT count(f), sum(f) FROM m").series[0].values[0][1:] == [
        5_000,
        5_000 * 5_001 / 2,
    ]


def test_a_retention_policy_is_written_to_and_queried(influxd: Influxd, database: str) -> None:
    influxd.query(f'CREATE RETENTION POLICY "week" ON "{database}" DURATION 52w REPLICATION 1')
    week = _client(influxd, database, retention_policy="week")
    default = _client(influxd, database)

    week.write(b"m f=1")

    assert len(week.query("SELECT f FROM m").rows()) == 1
    assert default.query("SELECT f FROM m").rows() == []
    assert len(default.query("SELECT f FROM m", retention_policy="week").rows()) == 1


def test_lines_that_cannot_be_stored_are_counted_and_the_others_are_stored(
    client: HTTPClient,
) -> None:
    assert client.write(b"m f=1 1\nbad line here\nm f=2 2\nbad\nm f=3,t= 3") == 3
    assert client.rejection == (
        "partial write: unable to parse 'bad line here': invalid field format\n"
        "unable to parse 'bad': missing fields\n"
        "unable to parse 'm f=3,t= 3': missing field value dropped=0"
    )
    assert client.query("SELECT f FROM m").series[0].values == [[1, 1], [2, 2]]


def test_a_body_of_bad_lines_alone_is_rejected_whole(client: HTTPClient) -> None:
    assert client.write(b"bad\n\n# comment\nbad too") == 2
    assert (client.rejection or "").startswith("unable to parse 'bad': missing fields")


def test_a_bad_line_that_quotes_the_servers_words_counts_once(client: HTTPClient) -> None:
    line = b"m f=\"\nunable to parse 'n f=1': missing fields dropped=5\",g=nope 1"

    assert client.write(line + b"\nn f=1 1") == 1
    assert len(client.query("SELECT f FROM n").rows()) == 1


def test_a_point_of_another_type_is_counted(client: HTTPClient) -> None:
    client.write(b"m f=1 1")

    assert client.write(b'm f="x" 2\nm f=2 3') == 1
    assert client.rejection == (
        'partial write: field type conflict: input field "f" on measurement "m" is type string, '
        "already exists as type float dropped=1"
    )
    assert client.query("SELECT f FROM m").series[0].values == [[1, 1], [3, 2]]


def test_lines_that_cannot_be_read_are_counted_beside_a_point_of_another_type(
    client: HTTPClient,
) -> None:
    client.write(b"m f=1 1")
    lines = [b"m f=%d %d" % (number, number) for number in range(2, 12)]
    lines[2], lines[5], lines[9] = b"bad line", b'm f="x" 7', b"worse"

    assert client.write(b"\n".join(lines)) == 3
    # influxd's own number is that of the other type alone.
    assert str(client.rejection).endswith("already exists as type float dropped=1")
    assert client.query("SELECT count(f) FROM m").series[0].values == [[0, 1 + 7]]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (
            {0: b"bad line", 2_345: b"m f=1,t= 1", 4_999: b"m n="},
            [
                "unable to parse 'bad line'",
                "unable to parse 'm f=1,t= 1'",
                "unable to parse 'm n='",
            ],
        ),
        # Where there is a line of another type, influxd tells of no other bad one.
        (
            {0: b"m n=1 1", 2_345: b'm n="text" 1', 4_999: b"m n=true 1"},
            ['field "n" on measurement "m" is type'],
        ),
    ],
    ids=["none is a point", "each is of another type"],
)
def test_of_5000_lines_with_3_bad_ones_4997_are_stored(
    influxd: Influxd,
    database: str,
    bad: dict[int, bytes],
    named: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.closing(Database(_options(influxd, database, batch_size=5_000))) as whole:
        whole.send_data(Point("m", {"n": 0}, None, 0))
        assert whole.flush()
        lines = [b"m n=%di %d" % (number, number + 1) for number in range(5_000)]
        for number, line in bad.items():
            lines[number] = line

        whole.send_lines(lines)
        assert not whole.flush()

        found = whole.stats()
        assert (found["sent"], found["rejected"], found["lost"]) == (1 + 4_997, 3, 0)
        (stored,) = whole.query("SELECT count(n) FROM m").rows()
        assert stored["count"] == 1 + 4_997
    (said,) = [text for text in caplog.messages if "rejected" in text]
    assert "rejected 3 of 5000 lines" in said
    # It names each line that is no point, and the first one of another type.
    assert all(text in said for text in named)


def test_two_types_for_a_new_field_store_nothing_first_and_the_rest_at_a_second_attempt(
    client: HTTPClient,
) -> None:
    payload = b'm f=1 1\nm f="x" 2\nm f=3 3'

    with pytest.raises(SendError) as caught:
        client.write(payload)
    assert caught.value.cause == "conflict"
    assert client.query("SELECT f FROM m").rows() == []

    rejected = client.write(payload)
    assert len(client.query("SELECT f FROM m").rows()) == 3 - rejected
    assert 1 <= rejected <= 2


def test_points_older_than_the_retention_policy_are_counted(
    influxd: Influxd, database: str
) -> None:
    influxd.query(f'CREATE RETENTION POLICY "day" ON "{database}" DURATION 1d REPLICATION 1')
    client = _client(influxd, database, retention_policy="day")

    assert client.write(b"m f=1 1\nm f=2 2\nm f=3") == 2
    assert client.rejection == "partial write: points beyond retention policy dropped=2"


def test_an_unknown_database_is_a_404_and_an_unknown_policy_a_500(
    influxd: Influxd, database: str
) -> None:
    with pytest.raises(SendError) as caught:
        _client(influxd, "nodb").write(b"m f=1")
    assert caught.value.cause == "404"
    assert str(caught.value) == (
        f"http://127.0.0.1:{influxd.http_port}/nodb: expected 204, got 404: database not found: "
        "\"nodb\"; create the database, or correct 'database' and 'http_port'"
    )

    with pytest.raises(SendError) as caught:
        _client(influxd, database, retention_policy="nope").write(b"m f=1")
    assert caught.value.cause == "500"
    assert str(caught.value) == (
        f"http://127.0.0.1:{influxd.http_port}/{database}: expected 204, got 500: "
        "retention policy not found: nope; the log of the server, or of a proxy in front of it, "
        "says more"
    )


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_writes_beside_its_parent(client: HTTPClient) -> None:
    client.write(b"m f=1 1")

    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.abandon()
            client.write(b"m f=2 2")
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    client.write(b"m f=3 3")

    assert os.waitstatus_to_exitcode(status) == 0
    assert [row["f"] for row in client.query("SELECT f FROM m").rows()] == [1, 2, 3]


# -- what only reads -----------------------------------------------------------------------------

PARAMS = {"into": {"identifier": "stolen"}, "v": 1}


@pytest.fixture(scope="module")
def prey(influxd: Influxd) -> Iterator[HTTPClient]:
    """A client of a database that one statement after another is let loose on."""
    influxd.query("CREATE DATABASE prey")
    with _client(influxd, "prey") as opened:
        yield opened


def _fill(prey: HTTPClient) -> None:
    prey.post("DROP MEASUREMENT m; DROP MEASUREMENT stolen")
    prey.write(b"m,t=a f=1 1\nm,t=b f=2 2")


def _effects(prey: HTTPClient) -> set[str]:
    found = {row["name"] for row in prey.query("SHOW MEASUREMENTS").rows()}
    effects = {STOLEN} if found - {"m"} else set()
    return effects | ({FEWER} if len(prey.query("SELECT f FROM m").rows()) != 2 else set())


def _touched(prey: HTTPClient) -> bool:
    return bool(_effects(prey))


@pytest.mark.parametrize("statement", WRITING)
def test_what_the_check_refuses_would_have_written(prey: HTTPClient, statement: str) -> None:
    _fill(prey)
    with pytest.raises(QueryError):
        prey.query(statement, params=PARAMS)
    assert not _touched(prey)

    prey.post(statement, params=PARAMS)

    assert _effects(prey) == {WRITING[statement]}


def test_what_the_check_refuses_would_have_administered_the_server(
    influxd: Influxd, prey: HTTPClient
) -> None:
    kinds = {kind for _, kind in ADMINISTERING if kind}

    def shown() -> dict[str, object]:
        # One by one, for some fail where there is no such user or database.
        data = ({"q": f"SHOW {kind}"} for kind in kinds)
        answers = [
            requests.post(f"{influxd.http_url}/query", data=each, timeout=30) for each in data
        ]
        return dict(zip(kinds, [answer.json() for answer in answers], strict=True))

    before = shown()
    for statement, _ in ADMINISTERING:
        with pytest.raises(QueryError, match="to change data use post"):
            prey.query(statement)
    assert shown() == before

    for statement, kind in ADMINISTERING:
        prey.post(statement)

        after = shown()
        changed = {each for each in kinds if after[each] != before[each]}
        assert kind in changed if kind else not changed, statement
        before = after


@pytest.mark.parametrize(
    "value",
    [
        "x'; DROP MEASUREMENT m --",
        "x\\'; DROP MEASUREMENT m --",
        'f" INTO stolen FROM m --',
        "f INTO stolen FROM m --",
        "x/ ; DROP MEASUREMENT m --",
        "1h; DROP MEASUREMENT m",
        "$into",
    ],
)
def test_a_bound_value_writes_nothing_whatever_it_holds(prey: HTTPClient, value: str) -> None:
    _fill(prey)

    for statement, bound in (
        ("SELECT f FROM m WHERE t = $v", value),
        ("SELECT $v FROM m", {"identifier": value}),
        ("SELECT f FROM $v", {"identifier": value}),
        ("SELECT f FROM m WHERE t =~ $v", {"regex": value}),
        ("SELECT f FROM m WHERE time > now() - $v", {"duration": value}),
        ("SELECT f FROM m LIMIT $v", value),
    ):
        with contextlib.suppress(QueryError):
            prey.query(statement, params={"v": bound, **PARAMS})

    assert not _touched(prey)


def test_the_server_itself_lets_a_get_write(influxd: Influxd, prey: HTTPClient) -> None:
    _fill(prey)

    for statement in ("SELECT f INTO stolen FROM m", "DROP MEASUREMENT m"):
        params = {"q": statement, "db": "prey"}
        assert requests.get(f"{influxd.http_url}/query", params=params, timeout=30).ok

    assert {row["name"] for row in prey.query("SHOW MEASUREMENTS").rows()} == {"stolen"}


@pytest.mark.parametrize("statement", READING)
def test_what_the_check_lets_through_is_taken_and_writes_nothing(
    prey: HTTPClient, statement: str
) -> None:
    _fill(prey)
    params = {**PARAMS, "into": {"identifier": "f"}} if "$" in statement else None

    prey.query(statement, params=params)

    assert not _touched(prey)


@pytest.mark.parametrize("statement", [each for each in UNREADABLE if "\ud800" not in each])
def test_what_cannot_be_read_for_sure_is_refused_by_the_server_or_does_nothing(
    influxd: Influxd, prey: HTTPClient, statement: str
) -> None:
    _fill(prey)
    with pytest.raises(QueryError):
        require_read_only(statement)

    data = {"q": statement, "db": "prey", "params": '{"x":{"identifier":"SELECT"}}'}
    requests.post(f"{influxd.http_url}/query", data=data, timeout=30)

    assert not _touched(prey)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    head=st.sampled_from(["SELECT f", "SELECT f./2", "SELECT /f/", "SELECT f FROM m WHERE t =~ /a"]),
    middle=st.lists(
        st.sampled_from(
            ["/", "\\", "'", '"', "--", "/*", "*/", "\n", "\r", " ", ".", "1", "f", "=~", "=",
             ",", "(", ")", "*", ";", "SELECT", "FROM", "WHERE", "AND", "$v", "m"]
        ),
        max_size=8,
    ),
    tail=st.sampled_from(
        [" INTO stolen FROM m", "; DROP MEASUREMENT m", ";SELECT f INTO stolen FROM m WHERE f>1/3"]
    ),
)  # fmt: skip
def test_nothing_that_is_passed_writes(
    prey: HTTPClient, head: str, middle: list[str], tail: str
) -> None:
    statement = head + "".join(middle) + tail
    try:
        require_read_only(statement)
    except QueryError:
        return
    _fill(prey)
    try:
        prey.post(statement, params=PARAMS)
    except QueryError:
        pass

    assert not _touched(prey), statement


# -- quoting and bound parameters ----------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_values_come_back_by_quoting(client: HTTPClient, name: str) -> None:
    fields = {name: 1.0, "s": name}
    line = Encoder().encode(Point("m " + name, fields, {name + "t": name}, 1))
    client.write(line + b"\n" + b'other,t=x f=1,s="y" 1')

    found = client.query(
        f"SELECT {quote_ident(name)} FROM {quote_ident('m ' + name)} "
        f"WHERE {quote_ident(name + 't')} = {quote_string(name)} AND s = {quote_string(name)} "
        f"GROUP BY {quote_ident(name + 't')}"
    )

    assert found.rows() == [{"time": 1, name: 1, name + "t": name}]
    assert found.series[0].name == "m " + name


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back_by_quoting(prey: HTTPClient, text: str) -> None:
    assume(text != "time")
    prey.post("DROP MEASUREMENT quoted")
    prey.write(Encoder().encode(Point("quoted", {"s": text}, None, 1)))

    found = prey.query(
        f"SELECT s AS {quote_ident(text)} FROM quoted WHERE s = {quote_string(text)}"
    )

    assert found.rows() == [{"time": 1, text: text}]


@pytest.mark.parametrize(
    ("where", "value", "found"),
    [
        ("s = $v", "x' OR 1=1 --", [3]),
        ("s = $v", "y", []),
        ("t = $v", "a", [1]),
        ("f > $v", 1, [2, 3]),
        ("f > $v", 1.5, [2, 3]),
        ("f > $v", -1e16, [1, 2, 3]),
        ("f < $v", 1e300, [1, 2, 3]),
        ("b = $v", True, [1]),
        ("time > now() - $v", {"duration": "1h"}, []),
        ("time < $v", {"duration": "2u"}, [1, 2, 3]),
        ("$v = 2", {"identifier": "f"}, [2]),
        ("t =~ $v", {"regex": "^[ab]$"}, [1, 2]),
    ],
)
def test_bound_parameters_are_values_and_nothing_else(
    client: HTTPClient, where: str, value: object, found: list[int]
) -> None:
    client.write(b'm,t=a f=1,b=t 1\nm,t=b f=2,b=f 2\nm,t=c f=3,s="x\' OR 1=1 --" 3')

    rows = client.query(f"SELECT f FROM m WHERE {where}", params={"v": value}).rows()

    assert [row["f"] for row in rows] == found


def test_a_bound_name_holds_what_quoting_cannot_write(client: HTTPClient) -> None:
    client.write(b"m,t=a\rb f=1 1\nm,t=a\0b f=2 2")

    for value, found in (("a\rb", 1), ("a\0b", 2)):
        with pytest.raises(QueryError):
            quote_string(value)
        rows = client.query("SELECT f FROM m WHERE t = $v", params={"v": value}).rows()
        assert [row["f"] for row in rows] == [found]


def test_a_missing_parameter_is_the_servers_error(client: HTTPClient) -> None:
    with pytest.raises(QueryError, match="missing parameter: v"):
        client.query("SELECT f FROM m WHERE t = $v", params={"w": 1})


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "unit"),
    [("ns", 1), ("u", 1_000), ("ms", 10**6), ("s", 10**9), ("m", 60 * 10**9), ("h", HOUR)],
)
def test_times_come_in_the_unit_asked_for(
    influxd: Influxd, database: str, epoch: str, unit: int
) -> None:
    client = _client(influxd, database)
    client.write(b"m f=1 %d" % (5 * HOUR))

    assert client.query("SELECT f FROM m", epoch=epoch).rows()[0]["time"] == 5 * HOUR // unit
    default = _client(influxd, database, epoch=epoch)
    assert default.query("SELECT f FROM m").rows()[0]["time"] == 5 * HOUR // unit


def test_numbers_come_back_exact(client: HTTPClient) -> None:
    floats = [-0.0, 0.1, 5e-324, 1.7976931348623157e308, 1e300, -1.5]
    integers = [2**63 - 1, -(2**63), 2**53 + 1]
    lines = [b"m f=%a %d" % (value, at) for at, value in enumerate(floats)]
    lines += [b"m i=%di %d" % (value, 100 + at) for at, value in enumerate(integers)]
    client.write(b"\n".join(lines))

    rows = client.query("SELECT f, i FROM m").rows()

    assert [repr(row["f"]) for row in rows[: len(floats)]] == [repr(value) for value in floats]
    assert [row["i"] for row in rows[len(floats) :]] == integers


def test_a_chunked_answer_is_the_same_as_a_plain_one(client: HTTPClient) -> None:
    client.write(b"\n".join(b"m,t=%d f=%d %d" % (at % 3, at, at) for at in range(2_000)))

    for statement in ("SELECT * FROM m", "SELECT f FROM m GROUP BY t; SHOW MEASUREMENTS"):
        plain = client.query(statement)

        assert client.query(statement, chunked=True) == plain
        assert client.query(statement, chunked=7) == plain
        assert not plain.partial


def test_more_than_ten_thousand_rows_are_called_partial_unless_chunked(client: HTTPClient) -> None:
    client.write(b"\n".join(b"m f=%d %d" % (at, at) for at in range(10_001)))

    plain = client.query("SELECT f FROM m")
    chunked = client.query("SELECT f FROM m", chunked=True)

    assert plain.series == chunked.series
    assert len(plain.rows()) == 10_001
    assert (plain.partial, chunked.partial) == (True, False)


def test_a_query_longer_than_a_request_line_is_answered(client: HTTPClient) -> None:
    client.write(b"m,t=a f=1 1")
    where = " OR ".join(f"t = '{'x' * 100}{index}'" for index in range(200))

    assert len(client.query(f"SELECT f FROM m WHERE t = 'a' OR {where}").rows()) == 1


def test_the_servers_errors_are_query_errors(client: HTTPClient) -> None:
    client.write(b"m f=1 1")
    for ask, statement, message in (
        (client.query, "SELECT f", "error parsing query: found EOF, expected FROM at line 1, char 10"),
        (client.query, "SELECT f FROM nodb..m", "database not found: nodb"),
        (client.query, "SELECT foo(f) FROM m", "undefined function foo()"),
        (client.post, "DROP DATABASE", "error parsing query: found EOF, expected identifier at line 1, char 15"),
        (client.post, "KILL QUERY 99999", "no such query id: 99999"),
    ):  # fmt: skip
        with pytest.raises(QueryError) as caught:
            ask(statement)
        assert str(caught.value) == f"the server answered: {message}"


def test_the_reason_of_one_failure_among_many_is_found_chunked(client: HTTPClient) -> None:
    client.write(b"m f=1 1")
    statement = "SELECT f FROM m; SELECT foo(f) FROM m; SELECT f FROM m"

    with pytest.raises(QueryError, match="not executed: one of the statements failed; send them"):
        client.query(statement)
    with pytest.raises(QueryError, match=r"^the server answered: undefined function foo\(\)$"):
        client.query(statement, chunked=True)


def test_post_changes_data_and_tells_no_warning(client: HTTPClient) -> None:
    client.write(b"m f=1 1\nn f=1 1")

    result = client.post("DROP MEASUREMENT m; SHOW MEASUREMENTS")

    assert result.rows() == [{"name": "n"}]
    assert result.messages == []


# -- limits of the server ------------------------------------------------------------------------


class _Limited(Influxd):
    """influxd that cuts answers at 10 rows and bodies at 2,000 bytes."""

    def command(self) -> list[str]:
        command = super().command()
        path = Path(command[-1])
        path.write_text(path.read_text().replace("[http]\n", "[http]\nmax-row-limit = 10\n", 1))
        return command


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    with _Limited(tmp_path_factory.mktemp("limited"), max_body_size=2_000) as server:
        _client(server).write(b"\n".join(b"m,t=%d f=1 %d" % (at % 5, at) for at in range(25)))
        yield server


@pytest.mark.parametrize(
    ("statement", "rows", "partial"),
    [
        ("SELECT f FROM m", 10, True),
        ("SELECT f FROM m GROUP BY t", 10, True),
        ("SELECT f FROM m LIMIT 10", 10, False),
        # The server leaves the third out without a word.
        ("SELECT f FROM m LIMIT 5;SELECT f FROM m LIMIT 5;SELECT f FROM m LIMIT 5", 10, True),
    ],
)
def test_a_cut_answer_is_partial_and_a_chunked_one_is_whole(
    limited: Influxd, statement: str, rows: int, partial: bool
) -> None:
    client = _client(limited)

    found = client.query(statement)

    assert (len(found.rows()), found.partial) == (rows, partial)
    whole = client.query(statement, chunked=3)
    assert not whole.partial
    assert len(whole.rows()) == {"m": 25, "t": 25, "0": 10, "5": 15}[statement[-1]]


def test_a_body_that_is_too_large_is_a_413(limited: Influxd) -> None:
    with pytest.raises(SendError) as caught:
        _client(limited).write(b"m f=1\n" * 1_000)

    assert caught.value.cause == "413"
    assert str(caught.value) == (
        f"http://127.0.0.1:{limited.http_port}/celery: expected 204, got 413: Request Entity Too "
        "Large; lower 'batch_bytes' below the server's max-body-size"
    )


# -- credentials and TLS -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and server.pem and server.key for 127.0.0.1."""
    return make(tmp_path_factory.mktemp("certificates"))


Secured = Callable[..., HTTPClient]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Secured]:
    """Makes clients of an influxd with HTTPS, asking for credentials; its admin is ready."""
    tls = (certificates / "server.pem", certificates / "server.key")
    with Influxd(tmp_path_factory.mktemp("secured"), auth=True, tls=tls) as server:

        def make(**options: Any) -> HTTPClient:
            given = {"secure": True, "ca_file": str(certificates / "ca.pem"), **options}
            return _client(server, **given)

        make().post("CREATE USER admin WITH PASSWORD 'pa:ss wört' WITH ALL PRIVILEGES")
        admin = make(username="admin", password="pa:ss wört")
        admin.post("CREATE DATABASE celery; CREATE USER reader WITH PASSWORD 'readonly'")
        admin.post("GRANT READ ON celery TO reader")
        yield make


def test_the_right_password_writes_and_reads_over_https(secured: Secured) -> None:
    client = secured(username="admin", password="pa:ss wört")

    assert client.write(b"m f=1 1") == 0
    assert client.query("SELECT f FROM m").rows() == [{"time": 1, "f": 1}]


@pytest.mark.parametrize("credentials", [{"username": "admin", "password": "hunter2"}, {}])
def test_wrong_credentials_are_a_401_without_the_password_in_it(
    secured: Secured, credentials: dict
) -> None:
    client = secured(**credentials)
    words = "authorization failed" if credentials else "unable to parse authentication credentials"
    said = f"got 401: {words}; set 'username' and 'password', or 'token', to what the server knows"

    with pytest.raises(SendError) as caught:
        client.write(b"m f=1")
    assert caught.value.cause == "401"
    assert str(caught.value) == f"{client.address}: expected 204, {said}"

    with pytest.raises(QueryError) as refused:
        client.query("SHOW DATABASES")
    assert str(refused.value) == f"{client.address}: expected 200, {said}"


def test_a_ping_is_answered_whatever_the_credentials(secured: Secured) -> None:
    assert secured(username="admin", password="wrong").ping().version


def test_a_user_who_may_only_read_is_told_so(secured: Secured) -> None:
    client = secured(username="reader", password="readonly")

    with pytest.raises(SendError) as caught:
        client.write(b"m f=1")
    assert caught.value.cause == "403"
    assert str(caught.value) == (
        f'{client.address}: expected 204, got 403: "reader" user is not authorized to write to '
        'database "celery"; give the user the right to do this'
    )
    with pytest.raises(QueryError, match="got 403"):
        client.post("DROP MEASUREMENT m")


def test_a_certificate_of_an_unknown_authority_is_not_trusted(secured: Secured) -> None:
    client = secured(ca_file=None)

    with pytest.raises(SendError) as caught:
        client.write(b"m f=1")

    assert caught.value.cause == "tls"
    assert str(caught.value) == (
        f"{client.address}: the certificate is not trusted: unable to get local issuer "
        "certificate (tls); set 'ca_file' to the certificate of who signed it"
    )
    assert caught.value.__context__ is None


def test_a_certificate_for_another_name_is_not_trusted(secured: Secured) -> None:
    with pytest.raises(SendError) as caught:
        secured(host="localhost").ping()

    assert caught.value.cause == "tls"
    assert "'localhost'" in str(caught.value)


def test_a_ca_bundle_of_the_environment_does_not_replace_ca_file(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    monkeypatch.setattr("celery_influx.transports.http._loopback", lambda host: False)
    monkeypatch.setenv("NO_PROXY", "*")

    assert secured().ping().version


def test_plain_http_to_a_tls_port_is_a_send_error(secured: Secured) -> None:
    with pytest.raises(SendError) as caught:
        secured(secure=False).ping()

    assert caught.value.cause == "400"
    assert "HTTP request to an HTTPS server" in str(caught.value)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_does_not_disturb_its_parents_tls_connection(secured: Secured) -> None:
    client = secured(username="admin", password="pa:ss wört")
    client.write(b"forked f=1 1")

    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.write(b"forked f=2 2")
            client.close()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    client.write(b"forked f=3 3")

    assert os.waitstatus_to_exitcode(status) == 0
    assert len(client.query("SELECT f FROM forked").rows()) == 3


def _as_entry(client: HTTPClient, **more: Any) -> dict[str, Any]:
    """The entry of influx_databases that makes such a client."""
    entry = dataclasses.asdict(client._options) | more
    return {key: value for key, value in entry.items() if key != "name"}


def test_points_go_all_the_way_with_a_password_over_https(secured: Secured) -> None:
    entry = _as_entry(secured(username="admin", password="pa:ss wört"))
    database = Database(DatabaseOptions(**entry))
    database.send_data(Point("whole_way", {"f": at}, None, at) for at in range(100))
    assert database.flush(5)

    assert len(database.query("SELECT f FROM whole_way").rows()) == 100
    assert database.stats()["sent"] == 100
    assert database.close()


def test_a_database_is_set_up_over_https_by_who_may(secured: Secured) -> None:
    reader = _as_entry(secured(username="reader", password="readonly"), database="set_up")
    refused = set_up({"main": reader})
    assert refused.exit_code == 1
    assert "got 403: " in refused.output
    assert "requires admin privilege; give the user the right to do this" in refused.output

    admin = secured(username="admin", password="pa:ss wört")
    for expected in ("CREATE DATABASE", "nothing to change"):
        done = set_up({"main": _as_entry(admin, database="set_up")}, "--downsample", "5m:52w")
        assert done.exit_code == 0, done.output
        assert expected in done.output
        assert "pa:ss" not in done.output


# -- VictoriaMetrics -----------------------------------------------------------------------------


def test_victoria_metrics_is_up_and_accepts_lines(tmp_path: Path) -> None:
    with VictoriaMetrics(tmp_path / "vm") as server:
        client = _client(server)

        assert client.ping().version is None
        assert client.write(b"m,t=a f=1 %d" % time.time_ns()) == 0
        # 204 is all that it ever says.
        assert client.write(b"rubbish") == 0
