"""What other servers than InfluxDB 1.x answer to a query, as the same QueryResult. No I/O.

InfluxDB 3.x: https://docs.influxdata.com/influxdb3/core/query-data/influxql/parameterized-queries/
VictoriaMetrics: https://prometheus.io/docs/prometheus/latest/querying/api/ (tried on 1.79).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from celery_influx.errors import QueryError
from celery_influx.queries import QueryResult, Series, parse_answer

#: Nanoseconds of each unit of times in an answer.
_UNITS = {
    "ns": 1,
    "u": 1_000,
    "ms": 1_000_000,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3_600 * 10**9,
}
_MEASUREMENT = "iox::measurement"
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z?")


def parse_rows(document: Any, epoch: str) -> QueryResult:
    """The rows that InfluxDB 3.x answers: a series for each measurement, in their order.

    What ``GROUP BY`` names is a column like the others there, for nothing tells them apart. A row
    without a value for a column has ``None``.

    Raises:
        QueryError: ``document`` is of another shape.
    """
    # Its description of the API has the shape of 1.x, its guide and its examples have rows.
    if isinstance(document, dict):
        result = parse_answer([document])
        for series in result.series:
            for values in series.values:
                values[:1] = [_since_1970(value, epoch) for value in values[:1]]
        return result
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise _odd("[{…}, …]", "is 'api' right?")
    measurements: dict[str, list[dict[str, Any]]] = {}
    for row in document:
        measurements.setdefault(str(row.get(_MEASUREMENT, "")), []).append(row)
    found = []
    for name, rows in measurements.items():
        names = dict.fromkeys(key for row in rows for key in row if key != _MEASUREMENT)
        columns = sorted(names, key=lambda column: column != "time")
        for row in rows:
            row["time"] = _since_1970(row.get("time"), epoch)
        table = [[row.get(column) for column in columns] for row in rows]
        found.append(Series(name, {}, columns, table))
    return QueryResult(found)


def _since_1970(time: Any, epoch: str) -> Any:
    """A time as text, such as ``2022-01-01T09:00:00.5``, in units of ``epoch``; all else as is."""
    match = _TIME.fullmatch(time) if isinstance(time, str) else None
    if not match:
        return time
    whole = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
    nanoseconds = int((match[2] or "").ljust(9, "0"))
    return (round(whole.timestamp()) * 10**9 + nanoseconds) // _UNITS[epoch]


def parse_metrics(document: Any, epoch: str) -> QueryResult:
    """The series that a server with Prometheus's API answers.

    Each has the metric's name, its other labels as tags, and the columns ``time`` and ``value``:
    one row at an instant, and more where the query asked for a range (``m[5m]``).

    Raises:
        QueryError: ``document`` is of another shape.
    """
    try:
        data = document["data"]
        series = _KINDS[data["resultType"]](data["result"], epoch)
        partial = bool(document.get("isPartial"))  # a cluster with a node that is away
        messages = [f"warning: {text}" for text in document.get("warnings") or ()]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        pass
    else:
        return QueryResult(series, partial, messages)
    raise _odd('{"status": "success", "data": {…}}', "is this VictoriaMetrics' API?")


def _vector(result: Any, epoch: str) -> list[Series]:
    return [_metric(found["metric"], [found["value"]], epoch) for found in result]


def _matrix(result: Any, epoch: str) -> list[Series]:
    return [_metric(found["metric"], found["values"], epoch) for found in result]


def _scalar(result: Any, epoch: str) -> list[Series]:
    return [_metric({}, [result], epoch)]


_KINDS: dict[str, Callable[[Any, str], list[Series]]] = {
    "vector": _vector,
    "matrix": _matrix,
    "scalar": _scalar,
}


def _metric(labels: dict[str, str], pairs: list[Any], epoch: str) -> Series:
    tags = {key: value for key, value in labels.items() if key != "__name__"}
    # Seconds, with three digits behind the point at most.
    values = [
        [round(seconds * 1_000) * 1_000_000 // _UNITS[epoch], float(value)]
        for seconds, value in pairs
    ]
    return Series(labels.get("__name__", ""), tags, ["time", "value"], values)


def _odd(expected: str, mend: str) -> QueryError:
    return QueryError(f"the answer is JSON of an unknown shape; expected {expected}; {mend}")
