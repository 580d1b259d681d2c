"""End to end, with real parts only: redis-server, ``celery worker`` processes, influxd.

What the tasks themselves counted in Redis is compared with what InfluxDB counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import NotRegistered

import celery_influx
from tests.integration.worker import Worker, publisher, revoke, sending, stats
from tests.servers import Influxd, Redis, wait_for

TASKS = 5_000
NOTHING_GONE = {"dropped": 0, "lost": 0, "rejected": 0, "errors": 0, "left_out": 0}


@pytest.fixture
def sender(broker: str) -> Iterator[Celery]:
    """A publisher with the plugin, in this process."""
    app = publisher(broker)
    celery_influx.install(app)
    yield app
    app.close()


def target(influxd: Influxd, scheme: str, database: str) -> str:
    """A URL for ``influx_databases``."""
    if scheme == "http":
        return f"http://127.0.0.1:{influxd.http_port}/{database}"
    return f"udp://127.0.0.1:{influxd.udp_port}?http_port={influxd.http_port}"


@pytest.fixture(scope="module")
def clean(influxd: Influxd) -> Any:
    """Empty the database that influxd's UDP service writes to."""

    def empty() -> None:
        influxd.query(f'DROP DATABASE "{influxd.udp_database}"')
        influxd.query(f'CREATE DATABASE "{influxd.udp_database}"')

    return empty


@pytest.mark.parametrize(
    ("pool", "scheme"),
    [
        ("prefork", "udp"),
        *(
            pytest.param(pool, scheme, marks=pytest.mark.long)
            for pool in ("prefork", "threads", "solo")
            for scheme in ("udp", "http")
            if (pool, scheme) != ("prefork", "udp")
        ),
    ],
)
def test_influxdb_counts_what_the_tasks_counted(
    pool: str,
    scheme: str,
    influxd: Influxd,
    clean: Any,
    database: str,
    broker: str,
    store: redis.Redis,
    sender: Celery,
    tmp_path: Path,
) -> None:
    clean()
    where = influxd.udp_database if scheme == "udp" else database
    config = {"influx_databases": {"metrics": target(influxd, scheme, database)}}
    began = time.time_ns()

    with Worker(tmp_path, "load", broker, config, pool=pool, level="warning") as worker:
        with sending(sender) as send:
            for number in range(TASKS):
                send("load.work", [number], ignore_result=True)
        wait_for(lambda: int(store.get("tasks") or 0) >= TASKS, 60, "all tasks have run")
        made = TASKS + int(store.get("custom") or 0)
        account = wait_for(
            lambda: (found := stats(sender, worker)["metrics"])["sent"] >= made and found, 20
        )
        exit_code = worker.stop()
    ended = time.time_ns()

    assert exit_code == 0
    assert int(store.get("tasks") or 0) == TASKS
    sent = int(store.get("custom") or 0)
    assert sent == 4 * TASKS
    wait_for(lambda: influxd.count("custom", "serial", where) >= sent, 10, "all points stored")
    assert influxd.count("custom", "serial", where) == sent
    assert influxd.count("celery_task", "runtime", where) == TASKS
    assert influxd.count("celery_task", "wait", where) == TASKS
    assert account.items() >= {**NOTHING_GONE, "points": made, "sent": made, "queued": 0}.items()  # type: ignore[attr-defined]

    rows = sorted(influxd.rows("custom", where), key=lambda row: row["serial"])
    for serial, row in enumerate(rows):
        assert row["serial"] == serial
        assert row["half"] == serial / 2
        assert row["odd"] is (serial % 2 == 1)
        assert row["text"] == f'a "quoted" text, {serial}\n\\'
        assert row["shop"] == f"shop {serial % 7}"
        assert row["even"] == str(serial % 2 == 0)
        assert row["worker"] == worker.name
        assert -1_000 <= row["time"] - row["clock"] < 5_000_000_000
    # A point is stamped at the call, unless the machine let others run just then.
    assert sum(row["time"] - row["clock"] > 50_000_000 for row in rows) < len(rows) // 100
    runs = influxd.rows("celery_task", where)
    assert {(r["task"], r["queue"], r["worker"], r["state"]) for r in runs} == {
        ("load.work", "celery", worker.name, "SUCCESS")
    }
    assert all(began < run["time"] < ended for run in runs)
    assert all(0 < run["runtime"] < 5 and 0 <= run["cpu"] < 5 for run in runs)
    assert all(0 <= run["wait"] < (ended - began) / 1e9 for run in runs)
    assert all(run["retries"] == 0 for run in runs)


class Running:
    """A worker of one pool with the app ``states``, and all that is needed to look at it."""

    def __init__(
        self,
        worker: Worker,
        sender: Celery,
        store: redis.Redis,
        influxd: Influxd,
        database: str,
        broker: str,
    ) -> None:
        self.broker = broker
        self.worker = worker
        self.sender = sender
        self.store = store
        self._influxd = influxd
        self._database = database

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Send ``states.<name>``."""
        return self.sender.send_task(f"states.{name}", args, **options)

    def rows(self, measurement: str) -> list[dict[str, Any]]:
        """Every point of a measurement."""
        return self._influxd.rows(measurement, self._database)

    def runs(self, *ids: str, at_least: int) -> list[dict[str, Any]]:
        """The ``celery_task`` points of these tasks' runs, as soon as there are so many."""

        def enough() -> list[dict[str, Any]]:
            found = [row for row in self.rows("celery_task") if row.get("id") in ids]
            return found if len(found) >= at_least else []

        found = wait_for(enough, 20, f"{at_least} points of {ids}")
        assert isinstance(found, list)
        return found

    def times(self, key: str) -> list[float]:
        """What a task wrote down."""
        return [float(each) for each in self.store.lrange(key, 0, -1)]


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def running(
    request: pytest.FixtureRequest,
    redis_server: Redis,
    influxd: Influxd,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A worker of each pool in turn, writing to a database of its own."""
    pool = request.param
    # A database of its own: tests of other workers empty theirs while this one runs.
    broker = redis_server.url.removesuffix("/0") + "/1"
    store = redis.Redis.from_url(broker, decode_responses=True)
    store.flushdb()
    database = f"states-{pool}"
    influxd.query(f'CREATE DATABASE "{database}"')
    other = f"{database}-other"
    influxd.query(f'CREATE DATABASE "{other}"')
    url = f"http://127.0.0.1:{influxd.http_port}"
    config = {
        "influx_databases": {
            "main": f"{url}/{database}?flush_interval=0.05",
            "other": f"{url}/{other}?flush_interval=0.05",
            "gone": "http://127.0.0.1:9/x?flush_interval=0.05",
        },
        "influx_task_ids": True,
        "influx_tags": {"site": "test"},
    }
    sender = publisher(broker)
    celery_influx.install(sender)
    folder = tmp_path_factory.mktemp(f"states-{pool}")
    with Worker(folder, "states", broker, config, pool=pool) as worker:
        yield Running(worker, sender, store, influxd, database, broker)
        assert worker.stop() == 0
    sender.close()


def test_every_end_of_a_run_gives_exactly_one_point(running: Running) -> None:
    ended: dict[str, list[tuple[str, str | None, int]]] = {}
    revoked = "revoked-before-it-was-sent"
    revoke(running.sender, revoked)
    past = datetime.now(timezone.utc) - timedelta(seconds=5)

    ended[running.send("succeed").id] = [("SUCCESS", None, 0)]
    ended[running.send("fail").id] = [("FAILURE", "Broken", 0)]
    ended[running.send("give_error").id] = [("SUCCESS", None, 0)]
    ended[running.send("retry").id] = [
        ("RETRY", "Broken", 0),
        ("RETRY", "Broken", 1),
        ("SUCCESS", None, 2),
    ]
    ended[running.send("retry_bare").id] = [("RETRY", "Retry", 0), ("SUCCESS", None, 1)]
    ended[running.send("auto").id] = [("RETRY", "Broken", 0), ("FAILURE", "Broken", 1)]
    ended[running.send("ignored").id] = [("IGNORED", "Ignore", 0)]
    ended[running.send("rejected").id] = [("REJECTED", "Reject", 0)]
    ended[running.send("succeed", expires=past).id] = [("REVOKED", None, 0)]
    ended[running.send("succeed", task_id=revoked).id] = [("REVOKED", None, 0)]
    ended[running.send("does_not_exist").id] = [("REJECTED", "NotRegistered", 0)]
    left_out = running.send("left_out")
    assert left_out.get(timeout=20) == "done"
    expected = sum(map(len, ended.values()))
    found = running.runs(*ended, at_least=expected)
    # What would come too much would have come before this one.
    marks = [running.send("succeed").id for _ in range(4)]
    running.runs(*marks, at_least=4)

    found = running.runs(*ended, left_out.id, at_least=expected)
    by_id: dict[str, list[tuple[str, str | None, int]]] = {}
    for row in sorted(found, key=lambda row: row["retries"]):
        seen = (row["state"], row.get("exception"), row["retries"])
        by_id.setdefault(row["id"], []).append(seen)
        assert row["worker"] == running.worker.name
        assert row["queue"] == "celery"
        assert row["site"] == "test"
        never_ran = row["state"] == "REVOKED" or row["exception"] == "NotRegistered"
        assert (row["runtime"] is None) == never_ran
        assert (row["wait"] is None) == never_ran
    assert by_id == ended
    assert {row["task"] for row in found if row["exception"] == "NotRegistered"} == {
        "states.does_not_exist"
    }


@pytest.mark.parametrize("running", ["prefork"], indirect=True)  # only this pool enforces limits
def test_a_soft_time_limit_inside_of_send_data_ends_the_task(running: Running) -> None:
    ids = [running.send("hammer").id for _ in range(6)]

    found = running.runs(*ids, at_least=6)

    assert {(run["state"], run["exception"]) for run in found} == {
        ("FAILURE", "SoftTimeLimitExceeded")
    }
    assert all(0.4 < run["runtime"] < 3 for run in found)


@pytest.mark.alone
def test_wait_of_plain_countdown_and_retried_tasks_is_right_within_50_ms(
    running: Running,
) -> None:
    for _ in range(2):
        running.send("block", 0.4)
    published = time.time()
    plain = [running.send("note").id for _ in range(4)]
    later = [running.send("note", countdown=1.0).id for _ in range(2)]
    again = running.send("again", 0.3).id

    runs = running.runs(*plain, *later, again, at_least=9)

    for run in runs:
        began = running.times(f"began {run['id']}")[run["retries"]]
        if run["id"] in later:
            ready = published + 1.0
        elif run["retries"]:
            ready = running.times(f"eta {again}")[run["retries"] - 1]
        else:
            ready = published
        assert run["wait"] == pytest.approx(max(0.0, began - ready), abs=0.05)
        if run["retries"]:
            assert run["age"] == pytest.approx(began - published, abs=0.05)
        else:
            assert run["age"] is None
    # They did wait for the tasks that were before them, and the countdown is no wait.
    assert min(run["wait"] for run in runs if run["id"] in plain) > 0.2
    assert max(run["wait"] for run in runs if run["id"] in later) < 0.5


@pytest.mark.alone
def test_a_task_that_hands_on_its_headers_passes_on_no_publish_time(running: Running) -> None:
    sent = running.send("forward", 0.8).get(timeout=20)

    (run,) = running.runs(sent, at_least=1)

    forwarded = running.times("forwarded")[-1]
    began = running.times(f"began {sent}")[0]
    assert run["wait"] == pytest.approx(began - forwarded, abs=0.05)
    assert run["age"] is None


@pytest.mark.alone
def test_each_link_of_a_workflow_waits_from_its_own_publish(running: Running) -> None:
    ids = running.send("workflow").get(timeout=20)
    everyone = [*ids["chain"], *ids["heads"], ids["body"], *ids["group"]]

    runs = {run["id"]: run for run in running.runs(*everyone, at_least=8)}

    first, second, third = ids["chain"]
    for before, after in ((first, second), (second, third)):
        began = running.times(f"began {after}")[0]
        published = running.times(f"ended {before}")[0]
        assert runs[after]["wait"] == pytest.approx(began - published, abs=0.05)
    heads_ended = max(running.times(f"ended {each}")[0] for each in ids["heads"])
    began = running.times(f"began {ids['body']}")[0]
    assert runs[ids["body"]]["wait"] == pytest.approx(began - heads_ended, abs=0.05)
    assert {runs[each]["parent_id"] for each in (second, third)} == {first, second}
    assert len({run["root_id"] for run in runs.values()}) == 1


def test_a_queue_tag_names_the_queue_whatever_the_route(running: Running) -> None:
    routes = {
        running.send("succeed").id: "celery",
        running.send("succeed", queue="letters").id: "letters",
        running.send("route", "post", "parcel").get(timeout=20): "parcels",
        running.send("route", "news", "news.eu.berlin.1").get(timeout=20): "eu",
        running.send("route", "news", "news.us.ny").get(timeout=20): "us",
    }

    runs = running.runs(*routes, at_least=5)

    assert {run["id"]: run["queue"] for run in runs} == routes


@pytest.mark.alone
def test_a_message_of_protocol_1_runs_and_its_wait_is_right(
    running: Running,
) -> None:
    old = publisher(running.broker, task_protocol=1)
    celery_influx.install(old)
    published = time.time()
    result = old.send_task("states.note", countdown=0.3)

    (run,) = running.runs(result.id, at_least=1)

    began = running.times(f"began {result.id}")[0]
    assert run["state"] == "SUCCESS"
    assert run["wait"] == pytest.approx(began - published - 0.3, abs=0.05)


def test_timers_above_and_below_a_task_write_one_point_for_each_run(running: Running) -> None:
    above = running.send("timed_above", 3)
    below = running.send("timed_below", 4)
    shared = running.send("timed_shared")

    assert above.get(timeout=20) == [above.id, 3]
    assert below.get(timeout=20) == [below.id, 4]
    assert type(shared.get(timeout=20, propagate=False)).__name__ == "Broken"

    def written() -> list[dict[str, Any]]:
        rows = running.rows("timed")
        return rows if len(rows) >= 4 else []

    rows = wait_for(written, 10, "four points")
    assert isinstance(rows, list)
    assert sorted(
        (r["timer"], r["outcome"], r["exception"] or "", r["kind"] or "") for r in rows
    ) == [
        ("above", "success", "", "demo"),
        ("inner", "success", "", ""),
        ("shared", "error", "Broken", ""),
        ("tests.integration.apps.states.timed_below", "success", "", ""),
    ]
    assert all(0 < row["runtime"] < 1 for row in rows)
    assert {row["worker"] for row in rows} == {running.worker.name}


def call_here(broker: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a task by name with an app that has the plugin; its result."""
    app = publisher(broker)
    celery_influx.install(app)
    try:
        return app.send_task(name, args, kwargs).get(timeout=20)
    finally:
        app.close()


CALLER = """
import json, sys
from celery import Celery

broker, name, args, kwargs = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
app = Celery(broker=broker, backend=broker)
result = app.send_task(name, args, kwargs).get(timeout=20)
assert not [each for each in sys.modules if each.startswith("celery_influx")]
print(json.dumps(result))
"""


def call_from_a_process_without_the_plugin(
    broker: str, name: str, *args: Any, **kwargs: Any
) -> Any:
    """Call a task by name in a process that knows Celery and nothing of ours; its result."""
    run = subprocess.run(
        [sys.executable, "-c", CALLER, broker, name, json.dumps(args), json.dumps(kwargs)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("call", [call_here, call_from_a_process_without_the_plugin])
def test_helper_tasks_answer_by_name_with_plain_json_values(call: Any, running: Running) -> None:
    (row,) = running.runs(running.send("succeed").id, at_least=1)
    statement = "SELECT state, retries FROM celery_task WHERE id = $id"
    params = {"id": row["id"]}

    ping = call(running.broker, "celery_influx.ping")
    answer = call(running.broker, "celery_influx.query", statement, params=params)
    elsewhere = call(
        running.broker, "celery_influx.query", "SELECT state FROM celery_task", "other"
    )

    assert ping["version"].startswith("1.")
    assert 0 < ping["seconds"] < 5
    (series,) = answer["series"]
    assert series["columns"] == ["time", "state", "retries"]
    assert series["values"] == [[row["time"], "SUCCESS", 0]]
    assert elsewhere["series"] == []


@pytest.mark.parametrize(
    "pool",
    ["prefork", *(pytest.param(pool, marks=pytest.mark.long) for pool in ("threads", "solo"))],
)
def test_a_process_without_the_plugin_may_change_data_where_post_is_allowed(
    pool: str, influxd: Influxd, database: str, broker: str, tmp_path: Path
) -> None:
    call = call_from_a_process_without_the_plugin
    made = f"{database}-made-by-post"
    other = f"{database}-other"
    influxd.query(f'CREATE DATABASE "{other}"')
    for each in (database, other):
        influxd.write(b"gone f=1 1\nkept f=1 1", each)
    url = f"http://127.0.0.1:{influxd.http_port}"
    config = {
        "influx_databases": {"main": f"{url}/{database}", "other": f"{url}/{other}"},
        "influx_allow_post": True,
        "influx_task_points": False,
    }

    with Worker(tmp_path, "states", broker, config, pool=pool) as worker:
        dropped = call(broker, "celery_influx.post", "DROP MEASUREMENT gone")
        created = call(broker, "celery_influx.post", f'CREATE DATABASE "{made}"')
        here = [series["name"] for series in influxd.query("SELECT * FROM gone, kept", database)]
        there = [series["name"] for series in influxd.query("SELECT * FROM gone, kept", other)]
        call(broker, "celery_influx.post", "DROP MEASUREMENT gone", "other")
        assert worker.stop() == 0

    assert dropped == created == {"series": [], "partial": False, "messages": []}
    assert (here, there) == (["kept"], ["gone", "kept"])
    assert influxd.count("gone", "f", other) == 0
    (names,) = influxd.query("SHOW DATABASES")
    assert [made] in names["values"]


def test_helper_tasks_fail_by_name_and_with_the_reason(running: Running) -> None:
    call = running.sender.send_task

    with pytest.raises(celery_influx.QueryError, match="DROP") as refused:
        call("celery_influx.query", ["DROP MEASUREMENT celery_task"]).get(timeout=20)
    with pytest.raises(celery_influx.QueryError, match="error parsing query"):
        call("celery_influx.query", ["SELECT FROM"]).get(timeout=20)
    with pytest.raises(celery_influx.SendError, match="ECONNREFUSED"):
        call("celery_influx.ping", ["gone"]).get(timeout=20)
    with pytest.raises(celery_influx.SendError, match="ECONNREFUSED"):
        call("celery_influx.query", ["SHOW DATABASES", "gone"]).get(timeout=20)
    with pytest.raises(celery_influx.ConfigError, match="no database 'oter'"):
        call("celery_influx.ping", ["oter"]).get(timeout=20)
    with pytest.raises(NotRegistered, match=r"celery_influx\.post"):
        call("celery_influx.post", ["DROP MEASUREMENT celery_task"]).get(timeout=20)
    assert type(refused.value) is celery_influx.QueryError


@pytest.mark.alone
def test_sentry_opentelemetry_and_we_leave_each_others_headers_alone(
    influxd: Influxd, database: str, broker: str, store: redis.Redis, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.05"
    config = {"influx_databases": {"metrics": url}, "influx_task_ids": True}
    plain = publisher(broker)

    with Worker(tmp_path, "instrumented", broker, config) as worker:
        outer = plain.send_task("instrumented.outer").get(timeout=20)
        fresh = plain.AsyncResult(outer["fresh"]).get(timeout=20)
        handed = plain.AsyncResult(outer["handed"]).get(timeout=20)
        assert worker.stop() == 0

    for inner in (fresh, handed):
        assert inner["traceparent"].split("-")[1] == outer["otel"]
        assert inner["headers"]["sentry-trace"].split("-")[0] == outer["sentry"]
    assert fresh["headers"]["mine"] == "kept"
    assert "mine" not in handed["headers"]
    assert int(store.get("envelopes") or 0) > 0
    runs = {
        (run["id"], run["retries"]): run
        for run in influxd.rows("celery_task", database)
        if run["task"] == "instrumented.inner"
    }
    for name in ("fresh", "handed"):
        began = [float(each) for each in store.lrange(f"began {outer[name]}", 0, -1)]
        first, second = runs[outer[name], 0], runs[outer[name], 1]
        # It was published between these, and the first publish of a process takes its time.
        earliest, latest = outer[f"{name} published"]
        assert began[0] - latest - 0.05 < first["wait"] < began[0] - earliest + 0.05
        assert second["wait"] == pytest.approx(began[1] - began[0] - 0.2, abs=0.05)
        assert began[1] - latest - 0.05 < second["age"] < began[1] - earliest + 0.05
