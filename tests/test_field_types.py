"""Field types: the first one stays, in all processes of a worker, as it does in InfluxDB."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

import celery_influx
from celery_influx.database import Database
from celery_influx.errors import FieldError, PointError
from celery_influx.field_types import FieldTypes, TypeTable, server_types
from celery_influx.line_protocol import make_encode
from celery_influx.line_reader import decode
from celery_influx.measurements import MEASUREMENTS
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.queries import Series
from celery_influx.speedups import extension
from tests.conftest import Receiver
from tests.integration.worker import Worker, stats
from tests.servers import Influxd, wait_for
from tests.test_plugin import make_app
from tests.test_relay import exit_code, fork

VALUES: dict[type, Any] = {float: 0.5, int: 7, bool: True, str: "x"}
pytestmark = pytest.mark.once


class Side:
    """An encoder with a table of types, and what it tells."""

    def __init__(self, speedups: Any, table: TypeTable | None = None) -> None:
        self.conflicts: list[tuple[str, list[str]]] = []
        self.full: list[tuple[str, str]] = []
        self.types = FieldTypes(
            table or TypeTable(),
            lambda *told: self.conflicts.append(told),
            lambda *told: self.full.append(told),
        )
        self._encode = make_encode({}, 1, None, None, speedups, self.types)

    def fields(self, fields: Any, measurement: str = "m") -> dict[str, Any]:
        """Of the line that it makes."""
        return dict(decode(self._encode(Point(measurement, fields, None, 1))).fields)


@pytest.fixture(
    params=["python", pytest.param("c", marks=pytest.mark.skipif(not extension, reason="pure"))]
)
def side(request: pytest.FixtureRequest) -> Side:
    return Side(extension if request.param == "c" else None)


# -- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", VALUES)
@pytest.mark.parametrize("then", VALUES)
def test_a_field_keeps_the_type_that_it_had_first(first: type, then: type, side: Side) -> None:
    for _ in range(2):
        assert side.fields({"f": VALUES[first], "g": 1.5}) == {"f": VALUES[first], "g": 1.5}

    found = side.fields({"f": VALUES[then], "g": 2.5})

    if first is then:
        assert found == {"f": VALUES[then], "g": 2.5}
    elif (first, then) == (float, int):
        assert (found, type(found["f"])) == ({"f": 7.0, "g": 2.5}, float)
    else:
        assert found == {"g": 2.5}
        told = f"'f' is of type {then.__name__}, expected {first.__name__}"
        assert side.conflicts == [("m", [told])]
        with pytest.raises(FieldError, match=f"point 'm': no field is left to store: {told}"):
            side.fields({"f": VALUES[then]})
    assert side.fields({"f": VALUES[first]}) == {"f": VALUES[first]}
    assert side.fields({"f": VALUES[then]}, "another") == {"f": VALUES[then]}


def test_a_field_has_a_type_in_each_of_its_measurements(side: Side) -> None:
    for _ in range(3):
        for number, value in enumerate(VALUES.values()):
            assert side.fields({"f": value, "g": 1.5}, f"m{number}") == {"f": value, "g": 1.5}
        assert side.fields({"f": 7, "g": 1.5}, "m0") == {"f": 7.0, "g": 1.5}
        assert side.fields({"f": 0.5, "g": 1.5}, "m1") == {"g": 1.5}
    assert [measurement for measurement, _ in side.conflicts] == ["m1"] * 3


@pytest.mark.parametrize("number", [0, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 3 * 10**17 + 1])
def test_an_int_in_a_floats_field_becomes_the_nearest_float(number: int, side: Side) -> None:
    side.fields({"f": 0.5})

    assert repr(side.fields({"f": number})["f"]) == repr(float(number))


def test_values_that_are_no_plain_ones_have_the_type_that_they_become(side: Side) -> None:
    class Level(enum.Enum):
        HIGH = 3

    class Text(str):
        __slots__ = ()

    assert side.fields({"f": Decimal("1.5"), "i": Level.HIGH, "s": Text("a"), "n": None}) == {
        "f": 1.5, "i": 3, "s": "a"
    }  # fmt: skip
    found = side.fields({"f": Level.HIGH, "i": Decimal(2), "s": Text("b")})

    assert (found, type(found["f"])) == ({"f": 3.0, "s": "b"}, float)
    assert side.conflicts == [("m", ["'i' is of type float, expected int"])]


def test_what_is_not_stored_fixes_no_type(side: Side) -> None:
    for fields in (
        {"f": 1, "g": object()},
        {"f": 1, "time": 1},
        {"f": 1, "g" * 70_000: "x"},
        {"f": 1, "\ud800": "x"},
        {"f": 1, "g": 2**64},
    ):
        with pytest.raises(PointError):
            side.fields(fields)
    side.fields({"f": "x"})
    assert side.fields({"g": math.nan, "f": "y", "n": None}) == {"f": "y"}

    assert side.fields({"g": 5, "n": True}) == {"g": 5, "n": True}
    assert side.conflicts == []


def test_our_own_measurements_have_their_types_before_the_first_point(side: Side) -> None:
    for measurement in MEASUREMENTS:
        for column in measurement.columns:
            if column.type != "tag":
                wrong = next(VALUES[kind] for kind in (bool, str) if kind.__name__ != column.type)
                found = side.fields({column.name: wrong, "own": 1}, measurement.name)
                assert found == {"own": 1}
    assert side.fields({"runtime": 3}, "celery_task") == {"runtime": 3.0}


def test_ever_new_names_cost_no_memory(monkeypatch: pytest.MonkeyPatch, side: Side) -> None:
    monkeypatch.setattr(FieldTypes, "MOST", 50)

    for number in range(400):
        side.fields({f"f{number}": 1, "g": 2.5}, f"m{number % 90}")
        side.fields({"f" * (number + 300): 1}, "m" * 300)
        assert sum(map(len, side.types.known.values())) <= 50

    assert side.fields({"f5": 1.5, "g": 3}, "m5") == {"g": 3.0}


def test_a_full_table_leaves_further_fields_to_each_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TypeTable, "CELLS", 64)
    table = TypeTable()
    one, other = Side(extension, table), Side(None, table)

    for number in range(200):
        one.fields({f"f{number}": 1})
    for number in range(200):
        other.fields({f"f{number}": "x", "g": 1.5})

    assert 0 < 200 - len(one.full) <= 64
    beyond = {name for _, name in one.full}
    assert beyond <= {name for _, name in other.full}
    agreed = [told for _, told in other.conflicts]
    assert agreed == [
        [f"'f{number}' is of type str, expected int"]
        for number in range(200)
        if f"f{number}" not in beyond
    ]


def test_three_quarters_of_the_table_find_room() -> None:
    table = TypeTable()
    most = TypeTable.CELLS * 3 // 4

    found = [table.claim("m", f"f{number}", float) for number in range(most)]

    assert found.count(None) < most // 1_000
    assert all(table.claim("m", f"f{n}", str) is kind for n, kind in enumerate(found))


# -- several processes, and the server ---------------------------------------------------------


def test_processes_that_share_a_table_agree() -> None:
    table = TypeTable(shared=True)
    Side(extension, table).fields({"early": 0.5})

    def child() -> None:
        side = Side(extension, table)
        assert side.fields({"early": 7, "late": "x"}) == {"early": 7.0, "late": "x"}
        assert not side.conflicts

    assert exit_code(fork(child)) == 0
    side = Side(extension, table)

    assert side.fields({"early": 0.5, "late": 5}) == {"early": 0.5}
    assert side.conflicts == [("m", ["'late' is of type int, expected str"])]


def test_what_the_server_has_wins_over_what_was_sent_before_it_answered() -> None:
    table = TypeTable(learning=True)
    side = Side(extension, table)
    for value in (0.5, 1.5):
        assert side.fields({"f": value, "g": 1}) == {"f": value, "g": 1}

    table.learn([("m", "f", str), ("m", "h", float)])
    table.end_learning()

    assert side.fields({"f": "x", "g": 2, "h": 3}) == {"f": "x", "g": 2, "h": 3.0}
    assert side.fields({"f": 0.5, "g": 3}) == {"g": 3}


def test_what_the_server_has_wins_where_its_answer_comes_in_the_middle_of_a_claim() -> None:
    class Answered(TypeTable):
        def claim(self, measurement: str, field: str, kind: type) -> type | None:
            found = super().claim(measurement, field, kind)
            self.learn([("m", "f", str)])
            self.end_learning()
            return found

    side = Side(extension, Answered(learning=True))

    assert side.fields({"f": 0.5}) == {"f": 0.5}
    for _ in range(2):
        assert side.fields({"f": "x"}) == {"f": "x"}


def test_of_a_servers_answer_only_what_it_says_for_sure_is_taken() -> None:
    columns = ["fieldKey", "fieldType"]
    answer = [
        Series("m", {}, columns, [["f", "float"], ["i", "integer"], ["b", "boolean"]]),
        Series("two", {}, columns, [["f", "float"], ["f", "integer"], ["s", "string"]]),
        Series("new", {}, columns, [["u", "unsigned"]]),
        Series("databases", {}, ["name"], [["_internal"]]),  # VictoriaMetrics' answer to anything
    ]

    assert list(server_types(answer)) == [
        ("m", "f", float), ("m", "i", int), ("m", "b", bool), ("two", "s", str)
    ]  # fmt: skip


def test_a_conflict_is_counted_and_said_and_a_point_of_nothing_else_rejected(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    influx = celery_influx.install(app)

    influx.send_data(Point("m", {"f": 0.5, "g": 1}))
    for value in ("x", "y"):
        influx.send_data(Point("m", {"f": value, "g": 2}))
    influx.send_data(Point("m", {"f": True}))
    assert influx.flush()

    assert [dict(point.fields) for point in receiver.points("m", 3)] == [
        {"f": 0.5, "g": 1}, {"g": 2}, {"g": 2}
    ]  # fmt: skip
    found = influx.stats()["main"]
    assert (found["conflicts"], found["rejected"], found["sent"]) == (3, 1, 3)
    said = [message for message in caplog.messages if "left out" in message]
    assert len(said) == 1
    assert said[0].startswith(
        "main: point 'm': left out 1 fields: 'f' is of type str, expected float. InfluxDB fixes"
    )
    assert influx.close()


@pytest.mark.parametrize("option", ["field_types=false", "api=victoria"])
def test_switched_off_each_point_goes_as_it_is(receiver: Receiver, option: str) -> None:
    app = make_app(influx_databases={"main": f"{receiver.url}&{option}"})
    influx = celery_influx.install(app)

    for value in (1, 0.5, "x"):
        influx.send_data(Point("m", {"f": value}))
    assert influx.close()

    assert [point.fields["f"] for point in receiver.points("m", 3)] == [1, 0.5, "x"]


# -- the real server ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["udp", "http"])
def test_one_point_of_another_type_takes_none_of_a_new_databases_first_batch(
    scheme: str, influxd: Influxd, database: str
) -> None:
    if scheme == "udp":
        database = influxd.udp_database
        influxd.query(f'DROP DATABASE "{database}"')
        influxd.query(f'CREATE DATABASE "{database}"')
    options = DatabaseOptions(
        name=database, transport=scheme, host="127.0.0.1",
        http_port=influxd.http_port, udp_port=influxd.udp_port, flush_interval=60,
    )  # fmt: skip
    sender = Database(options)

    sender.send_data(Point("m", {"f": 0.5}, {"n": str(n)}) for n in range(10))
    sender.send_data(Point("m", {"f": "x"}, {"n": "wrong"}))
    sender.send_data(Point("m", {"f": "y", "g": 1}, {"n": "10"}))
    sender.send_data(Point("m", {"f": n}, {"n": str(n)}) for n in range(11, 20))
    assert sender.close()

    wait_for(lambda: influxd.count("m", "f", database) == 19, 10, "19 values of f")
    assert influxd.count("m", "g", database) == 1
    assert {row["n"] for row in influxd.rows("m", database)} == set(map(str, range(20)))
    found = sender.stats()
    assert (found["conflicts"], found["rejected"], found["sent"]) == (2, 1, 20)


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_learns_the_types_that_its_server_has(
    pool: str, influxd: Influxd, database: str
) -> None:
    influxd.write(b'm i=1i,f=1,s="x",b=true\nm,t=a i=2i', database)
    url = f"http://127.0.0.1:{influxd.http_port}/{database}"
    influx = celery_influx.install(make_app(influx_databases={"main": url}))
    influx.start_worker("worker@host", pool)
    influx.send_data(Point("m", {"i": 0.5}))

    influx.default.learn_types()

    influx.send_data(Point("m", {"i": 0.5, "f": 2, "s": True, "b": 1, "new": 1}, {"n": "1"}))
    assert influx.stats()["main"]["conflicts"] == 3
    influx.close()
    rows = [row for row in influxd.rows("m", database) if row["n"]]
    assert [(row["f"], row["new"]) for row in rows] == [(2, 1)]


def test_a_server_that_does_not_answer_keeps_no_type_from_being_fixed(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    url = receiver.url.replace("http_port=0", "http_port=9")
    influx = celery_influx.install(make_app(influx_databases={"main": url}))
    influx.start_worker("worker@host", "threads")

    with caplog.at_level("INFO"):
        influx.default.learn_types()
    for value in (1, 0.5):
        influx.send_data(Point("m", {"f": value, "g": "x"}))
    assert influx.close()

    assert "main: the server's field types are not known: http://127.0.0.1:9" in caplog.text
    assert not influx.default._types.learning
    assert [dict(point.fields) for point in receiver.points("m", 2)] == [
        {"f": 1, "g": "x"}, {"g": "x"}
    ]  # fmt: skip


def test_the_children_of_a_worker_and_its_server_agree(
    influxd: Influxd, database: str, broker: str, sender: Celery, store: redis.Redis, tmp_path: Path
) -> None:
    influxd.write(b"typed theirs=1i", database)
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.1"
    config = {"influx_databases": {"main": url}}
    last = {"f": "x", "g": 1, "theirs": 0.5}
    sent = [("a", {"f": 0.5}), ("b", {"f": 7}), ("c", last)]

    with Worker(tmp_path, "typed", broker, config, concurrency=3) as worker:
        results = []
        for name, fields in sent:  # each in a child of its own, for the others still wait
            results.append(sender.send_task("typed.send", [name, fields]))
            assert store.blpop("sent", timeout=20) == ("sent", name)
        store.rpush("go", *("now" for _ in sent))
        assert len({result.get(timeout=20) for result in results}) == 3
        account = stats(sender, worker)["main"]
        assert worker.stop() == 0

    assert (account["points"], account["conflicts"], account["rejected"]) == (3, 2, 0)
    rows = {row["name"]: row for row in influxd.rows("typed", database)}
    assert [rows[name]["f"] for name, _ in sent] == [0.5, 7, None]
    assert rows["c"]["g"] == 1
    assert (
        "left out 2 fields: 'f' is of type str, expected float; "
        "'theirs' is of type float, expected int"
    ) in worker.log()
