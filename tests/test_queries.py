"""What only reads, quoting, bound parameters, and answers: all without a server."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_influx.errors import QueryError
from celery_influx.queries import (
    QueryResult,
    Series,
    count_statements,
    encode_params,
    parse_answer,
    parse_json,
    quote_ident,
    quote_string,
    require_read_only,
)

# The statements are tried on a real server as well, in integration/test_http_influxd.py: ``m``
# has the field ``f`` and the tag ``t``; what gets through would write ``stolen``.

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

#: Posted, each of these writes: points into ``stolen``, or it takes ``m`` away.
WRITING = [
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
    'SELECT f INTO "stolen" FROM m WHERE t =~ /a/',
    'SELECT f AS "\\"" INTO stolen FROM m',
    "SELECT f FROM m; SELECT f INTO stolen FROM m",
    "SELECT f FROM m WHERE t = '\\''; SELECT f INTO stolen FROM m --'",
    "SELECT f FROM m WHERE t =~ /\\\\\\// ; SELECT f INTO stolen FROM m --/",
    "SELECT f FROM m WHERE f > 1./2; SELECT f INTO stolen FROM m WHERE f > 1/2",
    "SELECT f/* */FROM m; SELECT f INTO stolen FROM m --*/",
    "DROP MEASUREMENT m",
    ";DROP MEASUREMENT m",
    "/**/drop/**/measurement m",
    "SELECT f FROM m; DROP MEASUREMENT m",
    "SELECT f FROM m --\n; DROP MEASUREMENT m",
    "SELECT f FROM m WHERE t = 'x'; DROP MEASUREMENT m --'",
    "SELECT f FROM m WHERE t =~ /x/; DROP MEASUREMENT m --/",
    "DELETE FROM m",
    "DROP SERIES FROM m",
    # The end of a text for influxd's scanner, and yet it reads on behind it.
    "SELECT f FROM m --\0; DROP MEASUREMENT m",
    # Division where a scanner that takes the dot for a source's would see a regex.
    "SELECT f./2 INTO stolen FROM m WHERE f > 1 / 3",
    "SELECT m.f, f./2 INTO stolen FROM m WHERE f > 1 / 3",
]

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
    '"SHOW" DATABASES',
    'SHOW"x" DATABASES',
]


@pytest.mark.parametrize("statement", READING)
def test_a_statement_that_only_reads_passes(statement: str) -> None:
    require_read_only(statement)


@pytest.mark.parametrize("statement", [*WRITING, *UNREADABLE])
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
