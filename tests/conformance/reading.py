"""Everything in a database of influxd, as points with exact types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import requests

from celery_influx.point import Point
from tests.servers import Influxd


class _Number(str):
    """Text until its type is known: InfluxDB writes the float 1 as 1, -0 as -0."""

    __slots__ = ()


Key = tuple[str, frozenset[tuple[str, str]], int]


def _ask(influxd: Influxd, database: str, statements: list[str]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(statements), 200):
        query = {"q": ";".join(statements[start : start + 200])}
        params = {"db": database, "epoch": "ns"}
        url = f"{influxd.http_url}/query"
        answer = requests.post(url, params=params, data=query, timeout=60)
        decoded = json.loads(answer.text, parse_int=_Number, parse_float=_Number)
        for result in decoded["results"]:
            assert "error" not in result, result["error"]
            yield from result.get("series", [])


def read_back(influxd: Influxd, database: str) -> dict[Key, Point]:
    """All points by measurement, tags and time."""
    # A field's type is its own in each shard; of an integer and a float queries make floats.
    floats: dict[str, dict[str, bool]] = {}
    for found in _ask(influxd, database, ["SHOW FIELD KEYS FROM /^/"]):
        types = floats.setdefault(found["name"], {})
        for key, kind in found["values"]:
            types[key] = types.get(key, False) or kind == "float"
    # One query for all would give each field name one type and leave the others' values out.
    # A regular expression can name a measurement with NUL, too.
    statements = [_select(name) for name in floats]
    points = {}
    for found in _ask(influxd, database, statements):
        name = found["name"]
        tags = {key: value for key, value in found.get("tags", {}).items() if value}
        # The empty key, which only a raw line can make, is shown as "val0".
        columns = [key if key in floats[name] else "" for key in found["columns"][1:]]
        for time, *row in found["values"]:
            fields = {
                key: (float if floats[name][key] else int)(value)
                if isinstance(value, _Number)
                else value
                for key, value in zip(columns, row, strict=True)
                if value is not None
            }
            point = Point(name, fields, tags or None, int(time))
            points[key_of(point)] = point
    return points


def _select(name: str) -> str:
    pattern = "".join(f"\\x{{{ord(char):x}}}" for char in name)
    return f"SELECT *::field FROM /^{pattern}$/ GROUP BY *"


def key_of(point: Point) -> Key:
    """What makes two points the same one."""
    assert isinstance(point.timestamp, int)
    return point.measurement, frozenset((point.tags or {}).items()), point.timestamp


def exactly(point: Point) -> str:
    """The point with the types and signs of its values, for comparing."""
    fields = sorted((key, repr(value)) for key, value in point.fields.items())
    return repr((point.measurement, fields, sorted((point.tags or {}).items()), point.timestamp))
