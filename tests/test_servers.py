"""HTTPClient and stand-ins for InfluxDB 2.x and 3.x and a cluster of VictoriaMetrics, as strict as
their documents are. The real VictoriaMetrics is in conformance/test_victoria.py.

2.x: https://docs.influxdata.com/influxdb/v2/api/write-data/ and .../v2/write-data/troubleshoot/;
    to query, https://docs.influxdata.com/influxdb/v2/api-guide/influxdb-1x/query/
3.x: https://docs.influxdata.com/influxdb3/core/write-data/http-api/v3-write-lp/ and .../api/; to
    query, https://docs.influxdata.com/influxdb3/core/query-data/execute-queries/influxdb-v3-api/
    and .../query-data/influxql/parameterized-queries/
The cluster: https://docs.victoriametrics.com/victoriametrics/cluster-victoriametrics/#url-format

Whether a line can be read is judged by our own ``decode``, which says the same as the real influxd
(conformance/test_same_verdict.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from celery_influx.database import Database
from celery_influx.errors import DecodeError, QueryError, SendError
from celery_influx.line_reader import decode
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.queries import Series
from celery_influx.transports.http import HTTPClient
from celery_influx.transports.servers import SERVERS
from tests.test_http import Stub, serving

TOKEN = "t0k"
ANSWER = b'{"results": [{"statement_id": 0, "series": [{"name": "m", "columns": ["time", "f"], '
ANSWER += b'"values": [[1, 2]]}]}]}'
#: 3.x's, with times of no, some and all digits behind the point.
ROWS = b"""[
  {"iox::measurement":"home","time":"2022-01-01T09:00:00","room":"Kitchen","temp":23.0},
  {"iox::measurement":"home","time":"2022-01-01T09:00:00.5","room":"Hall","co":7,"temp":-0},
  {"iox::measurement":"shed","time":"1969-12-31T23:59:59.999999999Z","temp":1e-3}
]"""


class StandIn:
    """Answers as one of them, and keeps the lines that it took."""

    def __init__(self, stub: Stub, api: str) -> None:
        self.stub = stub
        self.api = api
        self.stored: list[bytes] = []
        stub.answer = self._answer
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.written: list[tuple[float, int, list[bytes]]] = []  # when, answered how, which lines
        self.longest_body = sys.maxsize
        self.not_now: list[int] = []  # what it answers first
        self.unwanted = b""  # how lines begin whose like cannot be stored

    def _answer(self, handler: Any) -> None:
        path = urlsplit(handler.path).path
        self.asked.append((path, handler.query))
        if path == "/ping" and self.api == "2":
            handler.reply(204, X_Influxdb_Version="v2.7.5")
            return
        scheme = {"2": "Token", "3": "Bearer"}[self.api]
        if handler.headers["Authorization"] != f"{scheme} {TOKEN}":
            handler.reply(401, b'{"code": "unauthorized", "message": "unauthorized access"}')
        elif path == "/ping":
            handler.reply(200, b'{"version": "3.0.1"}', X_Influxdb_Version="3.0.1")
        elif (self.api, path) == ("2", "/query"):
            self._query_2(handler)
        elif (self.api, path) == ("3", "/api/v3/query_influxql"):
            self._query_3(handler)
        elif (self.api, path) in (("2", "/api/v2/write"), ("3", "/api/v3/write_lp")):
            self._write(handler)
        else:
            handler.reply(404, b'{"code": "not found", "message": "path not found"}')

    def _write(self, handler: Any) -> None:
        """Whether it takes lines at all now, and these; if not, none of them is stored.

        2.x: https://docs.influxdata.com/influxdb/v2/api/response-codes/ names all four. 3.x:
        https://docs.influxdata.com/influxdb3/core/write-data/troubleshoot/ names 400 first of all;
        what stands before it may answer each of them, by
        https://www.rfc-editor.org/rfc/rfc9110#section-15.5.14 (413), #section-15.5.21 (422),
        #section-15.6.4 (503) and https://www.rfc-editor.org/rfc/rfc6585#section-4 (429).
        """
        lines = handler.body.split(b"\n")
        status, more = 0, {}
        if len(handler.body) > self.longest_body:
            status, said = 413, "the batch is too large"
        elif self.not_now:
            status, said = self.not_now.pop(0), "not now"
            more = {"Retry_After": "1"}
        elif self.unwanted and any(line.startswith(self.unwanted) for line in lines):
            status, said = 422, "unprocessable entity"
        self.written.append((time.monotonic(), status, lines))
        if status:
            text = {"code": "other", "message": said} if self.api == "2" else {"error": said}
            handler.reply(status, json.dumps(text).encode(), **more)
            return
        {"2": self._write_2, "3": self._write_3}[self.api](handler)

    def _write_2(self, handler: Any) -> None:
        """``org`` is required, and a line that cannot be read spoils all of them.

        https://docs.influxdata.com/influxdb/v2/write-data/troubleshoot/
        """
        query = handler.query
        if "org" not in query or query.get("precision") not in ([["ns"], ["us"], ["ms"], ["s"]]):
            handler.reply(400, b'{"code": "invalid", "message": "invalid request"}')
            return
        if query["bucket"] != ["celery"]:
            text = {"code": "not found", "message": f"bucket {query['bucket'][0]!r} not found"}
            handler.reply(404, json.dumps(text).encode())
            return
        lines = handler.body.split(b"\n")
        for line in lines:
            if not is_good(line):
                text = {"code": "invalid", "message": f"unable to parse {line.decode()!r}"}
                handler.reply(400, json.dumps(text).encode())
                return
        self.stored += lines
        handler.reply(204)

    def _query_2(self, handler: Any) -> None:
        """``db`` and ``q`` are required, and ``epoch`` is one of six words.

        https://docs.influxdata.com/influxdb/v2/api-guide/influxdb-1x/query/
        """
        asked = self.asked[-1][1] or parse_qs(handler.body.decode())
        assert {"db", "q"} <= set(asked) <= {"db", "rp", "q", "epoch", "params"}
        assert asked["epoch"][0] in ("ns", "u", "µ", "ms", "s", "m", "h")
        handler.reply(200, ANSWER, X_Influxdb_Version="v2.7.5")

    def _query_3(self, handler: Any) -> None:
        """By GET the parameters are in the URL, by POST in a JSON object.

        https://docs.influxdata.com/influxdb3/core/query-data/execute-queries/influxdb-v3-api/
        """
        if handler.command == "POST":
            assert handler.headers["Content-Type"] == "application/json"
            assert self.asked[-1][1] == {}
            asked = json.loads(handler.body)
            assert isinstance(asked.get("params", {}), dict)
        else:
            asked = {key: value for key, (value,) in self.asked[-1][1].items()}
            assert isinstance(json.loads(asked.get("params", "{}")), dict)
        assert {"q", "db"} <= set(asked) <= {"q", "db", "format", "params"}
        self.asked[-1] = (self.asked[-1][0], asked)
        assert asked["format"] == "json"
        handler.reply(200, ROWS)

    def _write_3(self, handler: Any) -> None:
        """Each line that cannot be read is named; the others are stored.

        https://docs.influxdata.com/influxdb3/core/write-data/http-api/v3-write-lp/
        """
        words = ["auto", "nanosecond", "microsecond", "millisecond", "second"]
        if [handler.query.get("precision")] not in [[[word]] for word in words]:
            handler.reply(400, b'{"error": "invalid precision"}')
            return
        assert set(handler.query) == {"db", "precision"}
        bad = []
        for number, line in enumerate(handler.body.split(b"\n"), 1):
            if is_good(line):
                self.stored.append(line)
            else:
                said = {"original_line": line.decode(), "line_number": number}
                bad.append({**said, "error_message": "invalid field"})
        if bad:
            text = {"error": "partial write of line protocol occurred", "data": bad}
            handler.reply(400, json.dumps(text).encode())
            return
        handler.reply(204)


def is_good(line: bytes) -> bool:
    try:
        decode(line)
    except DecodeError:
        return False
    return True


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as made:
        yield made


@pytest.fixture(params=["2", "3"])
def server(request: pytest.FixtureRequest, stub: Stub) -> StandIn:
    return StandIn(stub, request.param)


def options(server: StandIn, **more: Any) -> DatabaseOptions:
    given: dict[str, Any] = {
        "transport": "http",
        "host": "127.0.0.1",
        "http_port": server.stub.port,
        "api": server.api,
        "database": "celery",
        "organization": "acme",
        "token": TOKEN,
    }
    return DatabaseOptions(**{**given, **more})


@pytest.mark.parametrize("precision", ["ns", "u", "ms", "s"])
def test_lines_are_written_where_and_how_that_version_wants_them(
    server: StandIn, precision: str
) -> None:
    with HTTPClient(options(server, precision=precision)) as client:
        assert client.write(b"m f=1 1\nm f=2 2") == 0

    assert server.stored == [b"m f=1 1", b"m f=2 2"]
    ((path, query),) = server.asked
    if server.api == "2":
        assert path == "/api/v2/write"
        word = {"u": "us"}.get(precision, precision)
        assert query == {"bucket": ["celery"], "org": ["acme"], "precision": [word]}
    else:
        assert path == "/api/v3/write_lp"
        word = {"ns": "nanosecond", "u": "microsecond", "ms": "millisecond", "s": "second"}
        assert query == {"db": ["celery"], "precision": [word[precision]]}


def test_of_a_batch_with_bad_lines_the_others_are_stored_and_counted(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b"m f=%d %d" % (number, number) for number in range(1_000)]
    bad = {3, 500, 999}
    database = Database(options(server))
    database.send_lines([b"bad" if n in bad else line for n, line in enumerate(lines)])
    database.flush(10)

    assert server.stored == [line for n, line in enumerate(lines) if n not in bad]
    stats = database.stats()
    assert (stats["sent"], stats["rejected"], stats["lost"]) == (997, 3, 0)
    assert database.close(5)
    expected = {
        "2": f"http://127.0.0.1:{server.stub.server_port}/celery: expected 204, got 400: unable to parse 'bad'",
        "3": "partial write of line protocol occurred: invalid field",
    }
    (said,) = caplog.messages
    assert said.startswith(f"celery: the server rejected 3 of 1000 lines: {expected[server.api]}")


LINES = [b"m f=%d %d" % (number, number) for number in range(100, 200)]


def account_of(server: StandIn, lines: list[bytes]) -> dict[str, int]:
    """Of these lines, as one batch, through all that is above a transport."""
    database = Database(options(server))
    database.send_lines(lines)
    database.flush(20)
    assert database.close(5)
    return database.stats()


def test_a_batch_that_is_too_large_for_it_comes_in_halves(server: StandIn) -> None:
    server.longest_body = len(b"\n".join(LINES)) * 2 // 3
    stats = account_of(server, LINES)

    assert [(status, lines) for _, status, lines in server.written] == [
        (413, LINES),
        (0, LINES[:50]),
        (0, LINES[50:]),
    ]
    assert server.stored == LINES
    assert (stats["sent"], stats["rejected"], stats["errors_refused"]) == (100, 0, 1)


@pytest.mark.parametrize("status", [429, 503])
def test_what_it_does_not_take_now_comes_again_when_it_asks_for_it(
    server: StandIn, status: int
) -> None:
    server.not_now = [status]
    stats = account_of(server, LINES)

    (first, *refused), (second, *taken) = server.written
    assert (refused, taken) == ([status, LINES], [0, LINES])
    assert second - first >= 1  # though ``flush`` waits
    assert server.stored == LINES
    assert (stats["sent"], stats["lost"], stats["errors_busy"]) == (100, 0, 1)


def test_a_line_that_it_cannot_process_costs_no_other_one_and_comes_alone_at_last(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    server.unwanted = b"other"
    unwanted = b"other f=1 1"
    stats = account_of(server, [*LINES[:70], unwanted, *LINES[70:]])

    assert server.stored == LINES
    assert (stats["sent"], stats["rejected"], stats["lost"]) == (100, 1, 0)
    refused = [lines for _, status, lines in server.written if status == 422]
    assert refused[-1] == [unwanted]
    assert refused.count([unwanted]) == 1
    (message,) = caplog.messages
    assert "the server rejected 1 of 101 lines: " in message
    assert "got 422: unprocessable entity" in message


def test_a_wrong_token_and_a_missing_bucket_are_said(server: StandIn) -> None:
    with HTTPClient(options(server, token="wrong")) as client:
        with pytest.raises(SendError, match="unauthorized access") as failed:
            client.write(b"m f=1")
        assert failed.value.cause == "401"
    if server.api == "2":
        with (
            HTTPClient(options(server, database="other")) as client,
            pytest.raises(SendError, match="bucket 'other' not found") as failed,
        ):
            client.write(b"m f=1")
        assert failed.value.cause == "404"


def test_a_retention_policy_is_a_part_of_the_buckets_name(server: StandIn) -> None:
    with HTTPClient(options(server, retention_policy="year")) as client:
        if server.api == "2":
            with pytest.raises(SendError):
                client.write(b"m f=1")
        else:
            client.write(b"m f=1")
    name = {"2": "bucket", "3": "db"}[server.api]
    assert server.asked[0][1][name] == ["celery/year"]


def test_a_ping_is_answered_as_by_1(server: StandIn) -> None:
    with HTTPClient(options(server)) as client:
        assert client.ping().version == {"2": "v2.7.5", "3": "3.0.1"}[server.api]


@pytest.mark.parametrize("server", ["2"], indirect=True)
def test_2_is_asked_at_the_address_of_1(server: StandIn) -> None:
    with HTTPClient(options(server, retention_policy="year", epoch="ms")) as client:
        result = client.query("SELECT f FROM m")
        client.post("DROP MEASUREMENT m")

    assert [series.name for series in result.series] == ["m"]
    assert server.asked == [
        ("/query", {"q": ["SELECT f FROM m"], "db": ["celery"], "rp": ["year"], "epoch": ["ms"]}),
        ("/query", {}),
    ]


HOME = 1_641_027_600_000_000_000
LONG = "SELECT * FROM home WHERE room != '" + "x" * 10_000 + "'"


@pytest.mark.parametrize("server", ["3"], indirect=True)
@pytest.mark.parametrize("statement", ["SELECT * FROM home, shed", LONG], ids=["GET", "POST"])
def test_3_is_asked_at_an_address_of_its_own_and_answers_rows(
    server: StandIn, statement: str
) -> None:
    with HTTPClient(options(server)) as client:
        result = client.query(statement, params={"room": "Hall", "least": 1.5}, chunked=True)

    ((path, asked),) = server.asked
    assert path == "/api/v3/query_influxql"
    assert (asked["q"], asked["db"]) == (statement, "celery")
    params = asked["params"]
    assert (json.loads(params) if isinstance(params, str) else params) == {
        "room": "Hall",
        "least": 1.5,
    }
    assert result.series == [
        Series(
            "home",
            {},
            ["time", "room", "temp", "co"],
            [[HOME, "Kitchen", 23, None], [HOME + 500_000_000, "Hall", 0, 7]],
        ),
        Series("shed", {}, ["time", "temp"], [[-1, 0.001]]),
    ]
    assert (result.partial, result.messages) == (False, [])


@pytest.mark.parametrize("server", ["3"], indirect=True)
def test_times_of_3_come_in_the_unit_asked_for_and_its_policy_is_in_the_name(
    server: StandIn,
) -> None:
    with HTTPClient(options(server, retention_policy="year", epoch="s")) as client:
        result = client.query("SELECT * FROM home")
        with pytest.raises(QueryError, match="DROP MEASUREMENT is not a statement that only reads"):
            client.query("DROP MEASUREMENT home")

    ((_, asked),) = server.asked
    assert asked["db"] == "celery/year"
    assert result.rows()[1] == {"time": HOME // 10**9, "room": "Hall", "temp": 0, "co": 7}


def test_3_may_answer_in_the_shape_of_1_too_as_the_description_of_its_api_says(stub: Stub) -> None:
    answer = {"columns": ["time", "f"], "name": "m", "values": [["2024-02-02T12:00:00Z", 42]]}
    body = json.dumps({"results": [{"series": [answer]}]}).encode()
    stub.answer = lambda handler: handler.reply(200, body)

    found = stub.client(api="3").query("SELECT f FROM m", epoch="h")

    assert found.rows() == [{"time": 474_132, "f": 42}]


@pytest.mark.parametrize("tenant", ["0", "7:2"])
def test_a_cluster_of_victoria_metrics_is_written_to_and_asked_by_its_tenant(
    stub: Stub, tenant: str
) -> None:
    found = {"metric": {"__name__": "m_f", "t": "a"}, "value": [1.5, "NaN"]}
    data = {"resultType": "vector", "result": [found]}
    body = {"status": "success", "isPartial": True, "warnings": ["slow"], "data": data}
    written: list[bytes] = []

    def answer(handler: Any) -> None:
        path = urlsplit(handler.path).path
        if path == "/ping":
            handler.reply(204)
        elif (handler.command, path) == ("POST", f"/insert/{tenant}/influx/write"):
            written.append(handler.body)
            handler.reply(204)
        elif path == f"/select/{tenant}/prometheus/api/v1/query":
            assert handler.query == {"query": ["m_f"]}
            handler.reply(200, json.dumps(body).encode())
        else:
            handler.reply(400, b"unsupported path")

    stub.answer = answer
    with stub.client(api="victoria-cluster", tenant=tenant) as client:
        client.ping()
        assert client.write(b"m,t=a f=1 1500000000") == 0
        result = client.query("m_f", epoch="ms")

    assert written == [b"m,t=a f=1 1500000000"]
    (series,) = result
    assert series[:3] == ("m_f", {"t": "a"}, ["time", "value"])
    assert repr(series.values) == "[[1500, nan]]"
    assert (result.partial, result.messages) == (True, ["warning: slow"])


def test_a_metric_of_many_values_has_a_row_for_each_and_a_scalar_has_no_name(stub: Stub) -> None:
    metric = {"__name__": "m", "t": "a"}
    for data, expected in (
        (
            {
                "resultType": "matrix",
                "result": [{"metric": metric, "values": [[1, "1"], [2, "2.5"]]}],
            },
            [Series("m", {"t": "a"}, ["time", "value"], [[1, 1.0], [2, 2.5]])],
        ),
        (
            {"resultType": "scalar", "result": [1.999, "+Inf"]},
            [Series("", {}, ["time", "value"], [[1, float("inf")]])],
        ),
        ({"resultType": "vector", "result": []}, []),
    ):
        body = json.dumps({"status": "success", "data": data}).encode()
        stub.answer = lambda handler, body=body: handler.reply(200, body)
        assert stub.client(api="victoria").query("m", epoch="s").series == expected


def test_points_go_all_the_way(server: StandIn) -> None:
    database = Database(options(server))
    for number in range(10):
        database.send_data(Point("m", {"f": number}, None, number))
    assert database.flush(5)
    assert database.close(5)
    assert server.stored == [b"m f=%di %d" % (number, number) for number in range(10)]


def test_every_version_has_a_word_for_each_precision() -> None:
    for row in SERVERS.values():
        assert set(row.precision) == {"ns", "u", "ms", "s"}


@pytest.mark.parametrize(
    "data", ["x", [], [1], [{"error_message": 5}], {"a": 1}, [{"other": 1}], [[]]]
)
def test_an_odd_answer_of_3_is_an_error_or_counts_what_it_names(stub: Stub, data: object) -> None:
    answer = json.dumps({"error": "partial write", "data": data}).encode()
    stub.answer = lambda handler: handler.reply(400, answer)
    given = DatabaseOptions(transport="http", host="127.0.0.1", http_port=stub.port, api="3")
    with HTTPClient(given) as client:
        named = sum(isinstance(each, dict) for each in data) if isinstance(data, list) else 0
        if named:
            assert client.write(b"m f=1") == named
        else:
            with pytest.raises(SendError):
                client.write(b"m f=1")
