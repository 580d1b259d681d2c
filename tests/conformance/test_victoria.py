"""What VictoriaMetrics stores of a Database's points, read back by its export.

A series is named ``measurement_field``, times are in ms, and every value is a number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import requests

from celery_influx.database import Database
from celery_influx.errors import QueryError
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.queries import QueryResult
from tests.python_only import python_only
from tests.servers import VictoriaMetrics, wait_for

pytestmark = pytest.mark.once

#: A whole ms of just now: it keeps no others, and takes no points from outside its retention.
NOW = time.time_ns() // 10**6 * 10**6
#: Series → (time in ms, value); a series is its name and its labels.
Series = dict[tuple[str, frozenset[tuple[str, str]]], list[tuple[int, float]]]


@pytest.fixture(scope="module")
def victoria(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VictoriaMetrics]:
    """One for this module; each test's points have a tag of their own."""
    with VictoriaMetrics(tmp_path_factory.mktemp("victoria")) as server:
        yield server


@pytest.fixture(params=["http", "udp"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


_runs = iter(range(1_000))


class Sent:
    """Points sent by one Database, and all series that came of them."""

    def __init__(self, server: VictoriaMetrics, transport: str) -> None:
        self._url = f"http://127.0.0.1:{server.http_port}"
        self._run = f"run{next(_runs)}"
        ports = {"http_port": server.http_port, "udp_port": server.udp_port}
        self._database = Database(
            DatabaseOptions(
                name="m", host="127.0.0.1", database="shop", transport=transport, **ports
            ),
            tags={"run": self._run},
        )
        #: Over HTTP the database's name becomes a label, too; a datagram does not say it.
        self._more = {"run": self._run} | ({"db": "shop"} if transport == "http" else {})

    def send(self, *points: Point) -> None:
        """Send them, and one point last, after which all are stored or never will be."""
        self._database.send_data([*points, Point("last", {"f": 1}, None, NOW)])
        assert self._database.flush(5)
        stats = self._database.stats()
        assert (stats["sent"], stats["payloads"]) == (len(points) + 1, 1)
        self._database.close()

    def stored(self) -> Series:
        """All series but the last point's, without the labels that are on every one of them."""

        def read() -> Series | None:
            requests.get(f"{self._url}/internal/force_flush", timeout=10)
            answer = requests.get(
                f"{self._url}/api/v1/export",
                params={"match[]": f'{{run="{self._run}"}}'},
                timeout=10,
            )
            found: Series = {}
            for row in map(json.loads, answer.text.splitlines()):
                labels: dict[str, Any] = row["metric"]
                name = labels.pop("__name__")
                for key, value in self._more.items():
                    assert labels.pop(key) == value
                pairs = list(zip(row["timestamps"], row["values"], strict=True))
                found[name, frozenset(labels.items())] = pairs
            return found if found.pop(("last_f", frozenset()), None) else None

        found = wait_for(read, 20, "the last point")
        assert isinstance(found, dict)
        return found


@pytest.fixture(params=[nullcontext, python_only], ids=["as built", "python"])
def sent(
    request: pytest.FixtureRequest, victoria: VictoriaMetrics, transport: str
) -> Iterator[Sent]:
    with request.param():
        yield Sent(victoria, transport)


def series(measurement: str, fields: dict[str, float], ms: int = 0, /, **labels: str) -> Series:
    """What becomes of a point with these fields, so many ms from now."""
    return {
        (f"{measurement}_{field}", frozenset(labels.items())): [(NOW // 10**6 + ms, value)]
        for field, value in fields.items()
    }


def test_numbers_are_stored_as_given(sent: Sent) -> None:
    numbers = {"a": 1.5, "b": 7, "c": -3, "d": 0.1, "e": 1e-9, "f": -1.25e15, "g": 2**53}

    sent.send(Point("m", {**numbers, "yes": True, "no": False}, {"t": "v"}, NOW))

    assert sent.stored() == series("m", {**numbers, "yes": 1, "no": 0}, t="v")


def test_times_are_rounded_down_to_milliseconds(sent: Sent) -> None:
    sent.send(
        Point("m", {"f": 1}, None, NOW - 60_000_000_000 + 999_999),
        Point("n", {"f": 2}, None, NOW - 1),
    )

    assert sent.stored() == {**series("m", {"f": 1}, -60_000), **series("n", {"f": 2}, -1)}


def test_what_is_escaped_in_names_and_tags_is_stored_unescaped(sent: Sent) -> None:
    tags = {
        "a b,c=d": "x y,z=w",
        "quote": 'say "so"',
        "backslash": "c:\\temp\\x",
        "größe": "ß ☃",
    }

    sent.send(
        Point("m x,y", {"f g,h=i": 2.5}, tags, NOW),
        Point("n=o.p-q", {"f": 3}, {"t": "="}, NOW),
    )

    assert sent.stored() == {
        **series("m x,y", {"f g,h=i": 2.5}, **tags),
        **series("n=o.p-q", {"f": 3}, t="="),
    }


def test_a_string_is_stored_as_nought_or_as_the_number_that_it_spells(sent: Sent) -> None:
    sent.send(
        Point("m", {"f": 1.5, "text": 'a "b", c=d e', "digits": "12"}, None, NOW),
        Point("only", {"text": "words"}, None, NOW),
    )

    assert sent.stored() == {
        **series("m", {"f": 1.5, "text": 0, "digits": 12}),
        **series("only", {"text": 0}),
    }


def test_a_string_with_a_newline_costs_its_own_point_only(sent: Sent) -> None:
    sent.send(
        Point("before", {"f": 1}, None, NOW),
        Point("m", {"f": 1, "text": "a\nb"}, None, NOW),
        Point("after", {"f": 2}, None, NOW),
    )

    assert sent.stored() == {**series("before", {"f": 1}), **series("after", {"f": 2})}


def test_the_point_of_a_tasks_run_is_stored_with_all_its_numbers(sent: Sent) -> None:
    tags = {
        "task": "shop.resize",
        "queue": "images",
        "worker": "w@host",
        "state": "FAILURE",
        "exception": "ValueError",
    }
    fields = {"runtime": 0.25, "wait": 0.001, "cpu": 0.125, "retries": 2, "age": 1.5}

    sent.send(Point("celery_task", fields, tags, NOW))

    assert sent.stored() == series("celery_task", fields, **tags)


def test_what_was_written_is_found_by_promql(victoria: VictoriaMetrics) -> None:
    options = DatabaseOptions(
        host="127.0.0.1", http_port=victoria.http_port, transport="http", api="victoria",
        database="asked", epoch="ms",
    )  # fmt: skip
    database = Database(options)
    assert database.ping().version is None
    # It does not show the last half minute yet: "query latency" in
    # https://docs.victoriametrics.com/victoriametrics/keyconcepts/
    values = {NOW - (60 + ago) * 10**9: float(ago) for ago in (20, 10, 0)}
    database.send_data(
        Point("asked", {"f": value, "n": 7}, {"t": "a b"}, at) for at, value in values.items()
    )
    assert database.flush(5)
    requests.get(f"http://127.0.0.1:{victoria.http_port}/internal/force_flush", timeout=10)

    found = wait_for(lambda: database.query('{__name__=~"asked_.*"}[5m]'), 20, "the points")
    assert isinstance(found, QueryResult)
    tags = {"db": "asked", "t": "a b"}
    rows = [{**tags, "time": at // 10**6, "value": value} for at, value in values.items()]
    assert {series.name: series.rows() for series in found} == {
        "asked_f": rows,
        "asked_n": [{**row, "value": 7.0} for row in rows],
    }
    (row,) = database.query('sum(asked_f{t="a b"}) + 1', epoch="s").rows()
    assert row["value"] == 1.0
    assert abs(row["time"] - time.time()) < 60
    assert database.query("nothing_of_the_kind").series == []
    # Too long for a URL.
    (row,) = database.query("nothing_at_all or " * 600 + "asked_n").rows()
    assert (row["value"], row["t"]) == (7.0, "a b")
    with pytest.raises(QueryError, match=r"^the server answered: error .*unexpected token"):
        database.query("asked_f{")
    with pytest.raises(QueryError, match="no statement that changes data"):
        database.post("asked_f")
    assert database.close()


def test_what_a_newline_in_a_string_would_forge_is_refused_before(
    victoria: VictoriaMetrics,
) -> None:
    where = {"host": "127.0.0.1", "http_port": victoria.http_port, "transport": "http"}
    forged = Point("told", {"s": f"a\nforged,t=a f=666 {NOW}\nb"}, None, NOW)
    names = {}
    for api in ("1", "victoria"):
        database = Database(DatabaseOptions(**where, api=api, database=f"of {api}"))
        database.send_data([forged, Point("last", {"f": 1}, None, NOW)])
        assert database.flush(5)
        assert database.stats()["rejected"] == (api == "victoria")

        def read(api: str = api) -> set[str]:
            url = f"http://127.0.0.1:{victoria.http_port}"
            requests.get(f"{url}/internal/force_flush", timeout=10)
            query = {"match[]": f'{{db="of {api}"}}'}
            rows = requests.get(f"{url}/api/v1/export", params=query, timeout=10).text
            return {json.loads(row)["metric"]["__name__"] for row in rows.splitlines()}

        wait_for(lambda read=read: "last_f" in read(), 20, "the last point")
        names[api] = read()
        assert database.close()

    assert names == {"1": {"forged_f", "last_f"}, "victoria": {"last_f"}}


def test_datagrams_that_are_filled_up_with_newlines_are_stored_whole(
    victoria: VictoriaMetrics,
) -> None:
    options = DatabaseOptions(host="127.0.0.1", udp_port=victoria.udp_port, datagram_bytes=1_432)
    database = Database(options)
    database.send_data(
        Point("burst", {"f": number, "text": "x" * (number % 90)}, None, NOW + number * 10**6)
        for number in range(1_000)
    )
    assert database.close()
    assert database.stats()["payloads"] > 40

    def read() -> bool:
        url = f"http://127.0.0.1:{victoria.http_port}"
        requests.get(f"{url}/internal/force_flush", timeout=10)
        query = {"match[]": "burst_f"}
        rows = requests.get(f"{url}/api/v1/export", params=query, timeout=10).text.splitlines()
        return bool(rows) and json.loads(rows[0])["values"] == list(range(1_000))

    wait_for(read, 20, "all points")
