"""What only reads, quoting, bound parameters, and answers: all without a server."""

from __future__ import annotations

import ast
import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_influx.errors import QueryError
from celery_influx.queries import (
    QueryResult,
    Series,
    count_statements,
    encode_params,
    limited,
    parse_answer,
    parse_json,
    quote_ident,
    quote_string,
    require_read_only,
    require_rows,
)

# The statements are tried on a real server as well, in integration/test_http_influxd.py: ``m``
# has the field ``f`` and the tag ``t``. That none is sent: test_http.py.

#: These only read, and the server takes them.
READING = [
    "SHOW DATABASES",
    "show measurements",
    "SHOW MEASUREMENTS WITH MEASUREMENT =~ /m.*/",
    "SHOW MEASUREMENTS WITH MEASUREMENT = /m;n/",
    'SHOW TAG VALUES WITH KEY IN ("t")',
    "SELECT f FROM m",
    "  SELECT f FROM m ; SELECT f FROM m;; ",
    'SELECT "into" FROM m',
    'SELECT "f;INTO" FROM "m"',
    "SELECT f FROM m WHERE t = 'a;b INTO \\' \\\\'",
    "SELECT f -- INTO q\n FROM m",
    "SELECT f /* INTO q; DROP */ FROM m",
    "SELECT f /***/ FROM m",
    "SELECT f FROM m -- DROP",
    "SELECT f FROM m WHERE t =~ /x;y' INTO/",
    "SELECT f FROM m WHERE t =~ /a\\/ INTO /",
    'SELECT f FROM m WHERE t !~ /"/ AND f > 4 / 2',
    "SELECT f/2, f / 2 FROM m WHERE f > 1./2",
    "SELECT f::float/2 FROM m",
    "SELECT (f)/2 FROM m",
    "SELECT f + .5 FROM m",
    "SELECT mean(/f/) FROM m",
    "SELECT mean(f) FROM m WHERE time > now() - 1h/2 GROUP BY time(1m), /t/ fill(none)",
    "SELECT /f/ FROM /m/, /n/",
    "SELECT f FROM autogen./m/",
    "SELECT f FROM (SELECT f FROM m)",
    "SELECT $into FROM m",
    "SELECT f FROM m WHERE t = $v / 2",
    'SELECT f AS "INTO" FROM m',
    "EXPLAIN SELECT f FROM m",
    "EXPLAIN ANALYZE SELECT f FROM m",
]

STOLEN = "writes points into `stolen`"
FEWER = "takes points of `m` away"
#: What each of these does where it is posted.
WRITING = {
    **dict.fromkeys(
        [
            "SELECT f INTO stolen FROM m",
            "select f into stolen from m",
            "SELECT f\tInTo\nstolen FROM m",
            "SELECT f /* x */ INTO stolen FROM m",
            "SELECT f/* x */INTO/**/stolen FROM m",
            "SELECT f --x\nINTO stolen FROM m",
            "SELECT f --x\rINTO stolen FROM m",
            "SELECT f -- '\n INTO stolen FROM m -- '",
            "SELECT f INTO $into FROM m",
            'SELECT f INTO autogen."stolen" FROM m',
            "SELECT f INTO prey..stolen FROM m",
            'SELECT f INTO "prey"."autogen"."stolen" FROM m',
            'SELECT f INTO "stolen" FROM m WHERE t =~ /a/',
            "SELECT * INTO stolen FROM /m/ GROUP BY *",
            "SELECT mean(f) INTO stolen FROM (SELECT f FROM m)",
            'SELECT f AS "\\"" INTO stolen FROM m',
            'SELECT f AS "x INTO y" INTO stolen FROM m',
            "SELECT f FROM m; SELECT f INTO stolen FROM m",
            "SHOW DATABASES;;;SELECT f INTO stolen FROM m",
            "SELECT f FROM m WHERE t = '\\''; SELECT f INTO stolen FROM m --'",
            "SELECT f FROM m WHERE t =~ /\\\\\\// ; SELECT f INTO stolen FROM m --/",
            "SELECT f FROM m WHERE f > 1./2; SELECT f INTO stolen FROM m WHERE f > 1/2",
            "SELECT f/* */FROM m; SELECT f INTO stolen FROM m --*/",
            # Division where a scanner that takes the dot for a source's would see a regex.
            "SELECT f./2 INTO stolen FROM m WHERE f > 1 / 3",
            "SELECT m.f, f./2 INTO stolen FROM m WHERE f > 1 / 3",
        ],
        STOLEN,
    ),
    **dict.fromkeys(
        [
            "DROP MEASUREMENT m",
            ";DROP MEASUREMENT m",
            "\t\r\nDROP\tMEASUREMENT\r\nm",
            "-- SELECT\nDROP MEASUREMENT m",
            # influxd takes white space of all kinds off both ends, and only there.
            "\x0cDROP MEASUREMENT m",
            "\x85\u2003\xa0DROP MEASUREMENT m\u2028",
            "/**/drop/**/measurement m",
            "SELECT f FROM m; DROP MEASUREMENT m",
            "EXPLAIN SELECT f FROM m; DROP MEASUREMENT m",
            "SELECT f FROM m --\n; DROP MEASUREMENT m",
            "SELECT f FROM m WHERE t = 'x'; DROP MEASUREMENT m --'",
            "SELECT f FROM m WHERE t = '\\\\'; DROP MEASUREMENT m --'",
            'SELECT f AS "\\\\" FROM m; DROP MEASUREMENT m --"',
            "SELECT f FROM m WHERE t =~ /x/; DROP MEASUREMENT m --/",
            "DELETE FROM m",
            "DELETE FROM m WHERE t = 'a'",
            "DELETE WHERE t = 'a'",
            "SHOW MEASUREMENTS; delete from m where time < now()",
            "DROP SERIES FROM m",
            "DROP SERIES WHERE t = 'a'",
            # The end of a text for influxd's scanner, and yet it reads on behind it.
            "SELECT f FROM m --\0; DROP MEASUREMENT m",
        ],
        FEWER,
    ),
}

#: One after the other, and what each changes; an empty word: nothing that the server shows.
ADMINISTERING = [
    ("CREATE DATABASE attacked", "DATABASES"),
    ("create user mallory with password 'x' with all privileges", "USERS"),
    ("REVOKE ALL PRIVILEGES FROM mallory", "USERS"),
    ("GRANT ALL PRIVILEGES TO mallory", "USERS"),
    ("GRANT/**/READ ON prey TO mallory", "GRANTS FOR mallory"),
    ("SHOW USERS; REVOKE READ ON prey FROM mallory", "GRANTS FOR mallory"),
    ("SET PASSWORD FOR mallory = 'y'", ""),
    ("DROP USER mallory", "USERS"),
    ("CREATE RETENTION POLICY p ON attacked DURATION 1h REPLICATION 1", "RETENTION POLICIES ON attacked"),
    ("ALTER RETENTION POLICY p ON attacked DURATION 2h", "RETENTION POLICIES ON attacked"),
    ("DROP RETENTION POLICY p ON attacked", "RETENTION POLICIES ON attacked"),
    (
        "CREATE CONTINUOUS QUERY c ON attacked BEGIN SELECT mean(f) INTO s FROM m GROUP BY time(1h) END",
        "CONTINUOUS QUERIES",
    ),
    ("DROP CONTINUOUS QUERY c ON attacked", "CONTINUOUS QUERIES"),
    ("CREATE SUBSCRIPTION s ON attacked.autogen DESTINATIONS ALL 'udp://127.0.0.1:9'", "SUBSCRIPTIONS"),
    ("DROP SUBSCRIPTION s ON attacked.autogen", "SUBSCRIPTIONS"),
    ("DROP SHARD 99999", ""),
    ("SHOW DATABASES -- \n;DROP DATABASE attacked", "DATABASES"),
]  # fmt: skip

#: The server refuses these, or they do nothing; whether they read cannot be told for sure.
UNREADABLE = [
    "",
    " ; -- nothing",
    "SELECT f INTO stolen",
    "SELECT f FROM (SELECT f INTO stolen FROM m)",
    "EXPLAIN SELECT f INTO stolen FROM m",
    "EXPLAIN ANALYZE SELECT f INTO stolen FROM m",
    "EXPLAIN DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'a; DROP MEASUREMENT m",
    'SELECT "f FROM m; DROP MEASUREMENT m',
    "SELECT f FROM m /* ; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'a\n'; DROP MEASUREMENT m --'",
    "SELECT f FROM m WHERE t = 'a\\x'; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t =~ /a\n/; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t =~ /a",
    "SELECT f FROM m WHERE t = /a/ / /b/",
    "ſELECT f FROM m",
    "ＳELECT f FROM m",
    "\ufeffSELECT f FROM m",
    "SELECT f\xa0FROM m",
    "SELECT f FROM m!",
    "SELECT f FROM m \\",
    "SELECT f FROM m\ud800",
    "WITH x",
    "$x f FROM m",
    "KILL QUERY 99999",
    "SELECT f FROM m /* /* */; DROP MEASUREMENT m -- */",
    # Characters that look like others.
    "\uff24\uff32\uff2f\uff30 MEASUREMENT m",
    "DR\u041eP MEASUREMENT m",
    "\u212aILL QUERY 1",
    "SELECT f \u0130NTO stolen FROM m",
    "SELECT f IN\u200dTO stolen FROM m",
    "SELECT f\u200bINTO stolen FROM m",
    "SELECT f\u2028INTO stolen FROM m",
    "SELECT f\x0bINTO stolen FROM m",
    "SELECT f\x85INTO stolen FROM m",
    "\u202eSELECT f FROM m",
    "SELECT f FROM m\u037e DROP MEASUREMENT m",
    "SELECT f FROM m\uff1b DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = \u2018a\u2019; DROP MEASUREMENT m",
    "SELECT f FROM m\x1a; DROP MEASUREMENT m",
    "SELECT f FROM m /\u2217 \u2217/; DROP MEASUREMENT m",
    '"SHOW" DATABASES',
    'SHOW"x" DATABASES',
]


@pytest.mark.parametrize("statement", READING)
def test_a_statement_that_only_reads_passes(statement: str) -> None:
    require_read_only(statement)


#: More than a hundred.
ATTACKS = [*WRITING, *UNREADABLE, *(statement for statement, _ in ADMINISTERING)]


@pytest.mark.parametrize("statement", ATTACKS)
def test_a_statement_that_writes_or_cannot_be_read_for_sure_is_refused(statement: str) -> None:
    with pytest.raises(QueryError, match="to change data use post"):
        require_read_only(statement)


@given(st.text(alphabet="SELECTINTOFRM selectinto/*-'\"\\;.,()$=~\n\r10", max_size=60))
def test_no_text_that_would_write_gets_past_by_luck(text: str) -> None:
    try:
        require_read_only("SELECT f INTO t FROM m" + text)
    except QueryError:
        return
    raise AssertionError(text)


@given(st.text(max_size=200))
def test_any_text_is_passed_or_refused_and_nothing_else(text: str) -> None:
    try:
        require_read_only(text)
    except QueryError as error:
        assert "use post" in str(error)


def test_a_long_statement_takes_no_long_time_to_check() -> None:
    require_read_only("SELECT f FROM m WHERE " + " OR ".join(["t =~ /a\\\\b/ AND f > 1/2"] * 5_000))


def test_statements_are_counted_as_the_server_splits_them() -> None:
    assert count_statements("SHOW USERS;; SELECT f FROM m WHERE t = ';' -- ;\n; SHOW SHARDS;") == 3


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("cpu", '"cpu"'),
        ('a"b', '"a\\"b"'),
        ("a'b", '"a\'b"'),
        ("a\\b\n", '"a\\\\b\\n"'),
        ("", '""'),
    ],
)
def test_a_quoted_name_has_its_specials_escaped(name: str, quoted: str) -> None:
    assert quote_ident(name) == quoted


def test_a_quoted_string_has_its_specials_escaped() -> None:
    assert quote_string("x' OR 1=1 --\\\n\"") == "'x\\' OR 1=1 --\\\\\\n\"'"


@given(st.text(alphabet=st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])))
def test_a_quoted_text_stays_one_token(text: str) -> None:
    require_read_only(f"SELECT {quote_ident(text)} FROM m WHERE t = {quote_string(text)} / 2")


def test_no_text_of_a_query_is_made_of_what_is_not_quoted() -> None:
    """In the package, the example and the benchmarks: values are bound, names bound or quoted.

    But for ``celery influx setup``, whose statements take no bound values: test_cli has hostile names
    for it, and durations that are none.
    """
    root = Path(__file__).parent.parent
    texts = re.compile(r"\s*(SELECT|SHOW|EXPLAIN|CREATE|DROP|DELETE|ALTER|GRANT|REVOKE|KILL|SET) ")
    folders = ("celery_influx", "example_project", "benchmarks")
    made = [
        (f"{path.name}:{node.lineno}", node.values)
        for folder in folders
        for path in (root / folder).rglob("*.py")
        if path.name != "server_setup.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        and texts.match(str(getattr(node.values[0], "value", "")))
    ]
    wrong = [
        place
        for place, parts in made
        for part in parts
        if isinstance(part, ast.FormattedValue)
        and not ast.unparse(part.value).startswith("quote_ident(")
    ]

    assert len(made) >= 4
    assert wrong == []


def test_parameters_are_bound_with_their_types() -> None:
    encoded = encode_params(
        {"s": "x' OR 1=1 --", "i": -5, "f": 1.5, "b": True, "d": {"duration": "1h"}}
    )

    assert encoded == ('{"s":"x\' OR 1=1 --","i":-5,"f":1.5,"b":true,"d":{"duration":"1h"}}')


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_parameter_has_a_point_and_keeps_its_value(value: float) -> None:
    encoded = encode_params({"v": value})

    assert "." in encoded
    assert repr(json.loads(encoded)["v"]) == repr(value)


def _answer(*results: dict, **top: object) -> dict:
    return {"results": list(results), **top}


def _series(values: list, name: str = "m", **more: object) -> dict:
    return {"name": name, "columns": ["time", "f"], "values": values, **more}


def test_a_result_gives_its_series_and_rows() -> None:
    result = parse_answer(
        [
            _answer(
                {"statement_id": 0, "series": [_series([[1, 2]], tags={"h": "a"})]},
                {"statement_id": 1, "series": [_series([[3, 4.5]], "n")]},
                {"statement_id": 2},
            )
        ]
    )

    assert [series.name for series in result] == ["m", "n"]
    assert len(result) == 2
    assert result.rows() == [{"h": "a", "time": 1, "f": 2}, {"time": 3, "f": 4.5}]
    assert result.series[0] == Series("m", {"h": "a"}, ["time", "f"], [[1, 2]])
    assert not result.partial


def test_an_empty_answer_is_an_empty_result() -> None:
    assert parse_answer([_answer({"statement_id": 0})]) == QueryResult()
    assert not QueryResult()


@given(
    rows=st.lists(st.lists(st.text('\\"[],{}a', max_size=6), min_size=1, max_size=3), min_size=1),
    size=st.integers(1, 20),
    spaced=st.booleans(),
)
def test_rows_are_counted_as_they_come_and_never_one_too_many(
    rows: list[list[str]], size: int, spaced: bool
) -> None:
    document = _answer({"statement_id": 0, "series": [_series(rows)]})
    body = json.dumps(document, separators=None if spaced else (",", ":")).encode()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]

    assert b"".join(limited(pieces, len(rows), len(body))) == body
    require_rows(parse_answer([document]), len(rows))
    with pytest.raises(QueryError, match="longer than"):
        b"".join(limited(pieces, len(rows), len(body) - 1))
    with pytest.raises(QueryError, match="of more than"):
        require_rows(parse_answer([document]), len(rows) - 1)
    if not spaced and len(rows) > 1:
        with pytest.raises(QueryError, match="of more than"):
            b"".join(limited([body], len(rows) - 1, len(body)))


def test_a_result_is_plain_json_and_pickles() -> None:
    result = QueryResult([Series("m", {}, ["f"], [[1]])], True, ["warning: w"])

    assert json.loads(json.dumps(result.to_json())) == {
        "series": [{"name": "m", "tags": {}, "columns": ["f"], "values": [[1]]}],
        "partial": True,
        "messages": ["warning: w"],
    }
    assert pickle.loads(pickle.dumps(result)) == result


def test_numbers_are_exact() -> None:
    text = '[-0,0,9223372036854775807,-9223372036854775808,0.1,1e+300,5e-324,"2026-01-02",-0.5]'

    numbers = parse_json(text)

    assert repr(numbers) == (
        "[-0.0, 0, 9223372036854775807, -9223372036854775808, 0.1, 1e+300, 5e-324, "
        "'2026-01-02', -0.5]"
    )


def test_a_cut_answer_is_partial() -> None:
    of_series = _answer({"statement_id": 0, "series": [_series([[1, 1]], partial=True)]})
    of_result = _answer({"statement_id": 0, "series": [_series([[1, 1]])], "partial": True})
    whole = _answer({"statement_id": 0, "series": [_series([[1, 1]])]})

    assert parse_answer([of_series]).partial
    assert parse_answer([of_result]).partial
    assert not parse_answer([whole], statements=1).partial
    assert parse_answer([whole], statements=2).partial


def test_chunks_of_one_series_are_joined_and_others_are_not() -> None:
    chunks = [
        _answer({"statement_id": 0, "series": [_series([[1, 1]], partial=True)], "partial": True}),
        _answer({"statement_id": 0, "series": [_series([[2, 2]])], "partial": True}),
        _answer({"statement_id": 0, "series": [_series([[3, 3]])]}),
        _answer({"statement_id": 1, "series": [_series([[4, 4]])]}),
    ]

    result = parse_answer(chunks, chunked=True)

    assert [series.values for series in result] == [[[1, 1], [2, 2]], [[3, 3]], [[4, 4]]]
    assert not result.partial


def test_a_chunked_answer_that_ends_too_soon_is_partial() -> None:
    first = _answer({"statement_id": 0, "series": [_series([[1, 1]], partial=True)]})

    assert parse_answer([first], chunked=True).partial


def test_warnings_of_the_server_are_kept() -> None:
    message = {"level": "warning", "text": "deprecated use of 'DROP'"}

    assert parse_answer([_answer({"messages": [message]})]).messages == [
        "warning: deprecated use of 'DROP'"
    ]
