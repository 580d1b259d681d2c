"""What the HTTP APIs of InfluxDB's versions, and VictoriaMetrics, call the same things: a row each.

InfluxDB 1.x: https://docs.influxdata.com/influxdb/v1/tools/api/ (tried on 1.6.7).
VictoriaMetrics: https://docs.victoriametrics.com/victoriametrics/integrations/influxdb/ and
.../victoriametrics/url-examples/ (tried on 1.79); its cluster by
https://docs.victoriametrics.com/victoriametrics/cluster-victoriametrics/#url-format alone.
From their documents alone, with no server to try them on, too:
2.x: https://docs.influxdata.com/influxdb/v2/api/write-data/ and, for queries, 1.x's address by
https://docs.influxdata.com/influxdb/v2/api-guide/influxdb-1x/query/;
3.x: https://docs.influxdata.com/influxdb3/core/api/write-data/ and
https://docs.influxdata.com/influxdb3/core/query-data/execute-queries/influxdb-v3-api/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_influx.errors import QueryError
from celery_influx.queries import QueryResult, encode_params, parse_answer
from celery_influx.results import parse_metrics, parse_rows
from celery_influx.transports.answers import bad_lines, rejected_lines

if TYPE_CHECKING:
    from celery_influx.options import DatabaseOptions


class Question(NamedTuple):
    """What ``query`` or ``post`` was asked; ``None``: the option says it.

    Attributes:
        statements: How many the statement is, as ``parse_answer`` wants it.
    """

    statement: str
    epoch: str
    params: Mapping[str, Any] | None = None
    database: str | None = None
    retention_policy: str | None = None
    chunked: bool | int = False
    statements: int = 0


#: Names and values of a request.
Fields = dict[str, str]


def _influxql(question: Question, options: DatabaseOptions) -> Fields:
    database, policy = _where(question, options)
    fields = {"q": question.statement, "db": database, "epoch": question.epoch}
    if policy:
        fields["rp"] = policy
    if question.params:
        fields["params"] = encode_params(question.params)
    if question.chunked:
        fields["chunked"] = "true"
        if question.chunked is not True:
            fields["chunk_size"] = str(question.chunked)
    return fields


def _influxql_3(question: Question, options: DatabaseOptions) -> Fields:
    """Its answer comes whole, so ``chunked`` changes nothing; its times we count ourselves."""
    database, policy = _where(question, options)
    name = f"{database}/{policy}" if policy else database
    fields = {"q": question.statement, "db": name, "format": "json"}
    if question.params:
        fields["params"] = encode_params(question.params)
    return fields


def _promql(question: Question, _: DatabaseOptions) -> Fields:
    for name, given, instead in (
        ("params", question.params, "write the values into the statement"),
        ("database", question.database, 'ask for its label: up{db="name"}'),
        ("retention_policy", question.retention_policy, "it has none"),
        ("chunked", question.chunked, "its answers are whole"),
    ):
        if given:
            raise QueryError(f"{name}: VictoriaMetrics is asked in PromQL without it; {instead}")
    return {"query": question.statement}


def _where(question: Question, options: DatabaseOptions) -> tuple[str, str | None]:
    """Database and retention policy."""
    database = question.database
    if database is None:
        database = options.database or options.name
    return database, question.retention_policy or options.retention_policy


def _form(fields: Fields) -> dict[str, Any]:
    return {"data": fields}


def _json(fields: Fields) -> dict[str, Any]:
    params = {"params": json.loads(fields["params"])} if "params" in fields else {}
    body = json.dumps({**fields, **params}).encode()
    return {"data": body, "headers": {"Content-Type": "application/json"}}


def _parse_influxql(documents: list[Any], question: Question) -> QueryResult:
    chunked = bool(question.chunked)
    return parse_answer(documents, chunked=chunked, statements=question.statements)


class Server(NamedTuple):
    """One server's ways.

    Attributes:
        write: Path to write to; ``{tenant}`` stands for the option.
        database: The parameter that names the database there.
        retention_policy: The one that names its retention policy; "": a part of the database's
            name, after a "/".
        organization: The one that names the organization; "": there is none.
        precision: Our units of time to its words.
        scheme: Of a token, in the header ``Authorization``.
        alive: Status of the answer to a ping.
        rejected: How many lines an answer of 400 says were rejected, the others being stored; 0: it
            speaks of other things. Of its words, its JSON and the payload.
        query: Path to ask at.
        fields: What to ask there.
        body: The same by POST: the body, and its headers if it is no form.
        answer: The result that the JSON documents of an answer make up.
        unchangeable: Why no statement can change data there, and what to do; "": some can.
    """

    write: str
    database: str
    retention_policy: str
    organization: str
    precision: Mapping[str, str]
    scheme: str
    alive: int
    rejected: Callable[[str, object, bytes], int]
    query: str
    fields: Callable[[Question, DatabaseOptions], Fields]
    body: Callable[[Fields], dict[str, Any]]
    answer: Callable[[list[Any], Question], QueryResult]
    unchangeable: str = ""


_VICTORIA = Server(
    write="/write",
    database="db",
    retention_policy="rp",  # which it does not look at
    organization="",
    precision={"ns": "ns", "u": "u", "ms": "ms", "s": "s"},
    scheme="Bearer",
    alive=204,
    # It says 204 to anything.
    rejected=lambda *_: 0,
    query="/api/v1/query",
    fields=_promql,
    body=_form,
    answer=lambda documents, question: parse_metrics(documents[0], question.epoch),
    unchangeable=(
        "VictoriaMetrics has no statement that changes data; "
        "to delete series use its address /api/v1/admin/tsdb/delete_series"
    ),
)

#: By the option ``api``.
SERVERS = {
    "1": Server(
        write="/write",
        database="db",
        retention_policy="rp",
        organization="",
        precision={"ns": "ns", "u": "u", "ms": "ms", "s": "s"},
        scheme="Token",
        alive=204,
        rejected=lambda words, _, payload: rejected_lines(words, payload),
        query="/query",
        fields=_influxql,
        body=_form,
        answer=_parse_influxql,
    ),
    "2": Server(
        write="/api/v2/write",
        database="bucket",
        retention_policy="",
        organization="org",
        precision={"ns": "ns", "u": "us", "ms": "ms", "s": "s"},
        scheme="Token",
        alive=204,
        # A bad line spoils its whole batch, and no number is given.
        rejected=lambda *_: 0,
        query="/query",
        fields=_influxql,
        body=_form,
        answer=_parse_influxql,
    ),
    "3": Server(
        write="/api/v3/write_lp",
        database="db",
        retention_policy="",
        organization="",
        precision={"ns": "nanosecond", "u": "microsecond", "ms": "millisecond", "s": "second"},
        scheme="Bearer",
        alive=200,
        rejected=lambda _, said, __: len(bad_lines(said)),
        query="/api/v3/query_influxql",
        fields=_influxql_3,
        body=_json,
        answer=lambda documents, question: parse_rows(documents[0], question.epoch),
    ),
    "victoria": _VICTORIA,
    "victoria-cluster": _VICTORIA._replace(
        write="/insert/{tenant}/influx/write",
        query="/select/{tenant}/prometheus/api/v1/query",
    ),
}
