"""The worker's step, in real workers: what it says, checks and shows, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery

import celery_influx
from tests.integration.worker import Worker, environment, publisher, stats
from tests.servers import Influxd, Redis, free_port, wait_for

WARNINGS = re.compile(r"WARNING/MainProcess\] (celery_influx: .*)")
COMPLAINTS = re.compile(r": (?:WARNING|ERROR|CRITICAL)/\S+\] (.*)")


@pytest.fixture
def broker(redis_server: Redis) -> str:
    """URL of an empty Redis."""
    redis.Redis.from_url(redis_server.url).flushdb()
    return redis_server.url


@pytest.fixture
def sender(broker: str) -> Iterator[Celery]:
    """A publisher with the plugin."""
    app = publisher(broker)
    celery_influx.install(app)
    yield app
    app.close()


def warnings(worker: Worker) -> list[str]:
    """What the step has warned of so far."""
    return WARNINGS.findall(worker.log())


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_it_says_what_it_does_and_shows_its_account(
    pool: str, influxd: Influxd, database: str, broker: str, sender: Celery, tmp_path: Path
) -> None:
    databases = {
        "metrics": f"http://user:geheim@127.0.0.1:{influxd.http_port}/{database}",
        "second": f"udp://127.0.0.1:{influxd.udp_port}?http_port={influxd.http_port}",
    }

    with Worker(tmp_path, "states", broker, {"influx_databases": databases}, pool=pool) as worker:
        assert sender.send_task("states.succeed", [4]).get(timeout=20) == 4
        found = wait_for(
            lambda: (account := stats(sender, worker))["metrics"]["sent"] == 1 and account, 20
        )
        run = subprocess.run(
            [
                *(sys.executable, "-m", "celery", "-A", "tests.integration.apps.states"),
                *("inspect", "stats", "-d", worker.name, "-j"),
            ],
            env=environment(broker),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert worker.stop() == 0

    log = worker.log()
    said = [line.partition("] ")[2] for line in log.splitlines() if "] celery_influx: " in line]
    first = f"metrics → http://127.0.0.1:{influxd.http_port}/{database}"
    second = f"second → udp://127.0.0.1:{influxd.udp_port}"
    assert said == [
        f"celery_influx: {first} (task runs, timed, send_data); {second} (timed, send_data)"
    ]
    assert "geheim" not in log + run.stdout
    shown = json.loads(run.stdout)[worker.name]["influx"]
    assert shown == found
    assert set(shown) == {"metrics", "second"}
    assert "Traceback" not in log


def test_a_worker_with_mistakes_in_its_configuration_names_them_all_and_does_not_start(
    broker: str, tmp_path: Path
) -> None:
    config = {
        "influx_databses": {},
        "influx_databases": {"main": {"udp_prot": 1, "batch_size": 0, "password": "geheim"}},
        "influx_tags": 5,
    }
    worker = Worker(tmp_path, "states", broker, config)

    worker.launch()
    assert worker.process is not None
    code = worker.process.wait(30)

    log = worker.log()
    assert code != 0
    assert "unknown setting 'influx_databses'; did you mean 'influx_databases'?" in log
    assert "unknown option 'udp_prot'; did you mean 'udp_port'?" in log
    assert "influx_databases['main']['batch_size']: expected " in log
    assert "influx_tags: expected a mapping" in log
    assert "geheim" not in log
    assert "ready." not in log


def test_it_warns_once_where_nobody_listens_on_the_udp_port_and_starts_all_the_same(
    influxd: Influxd, broker: str, sender: Celery, tmp_path: Path
) -> None:
    port = free_port()
    url = f"udp://127.0.0.1:{port}?http_port={influxd.http_port}"

    with Worker(tmp_path, "states", broker, {"influx_databases": {"metrics": url}}) as worker:
        wait_for(lambda: warnings(worker), 10, "the warning")
        assert sender.send_task("states.succeed", [4]).get(timeout=20) == 4
        assert worker.stop() == 0

    (warning,) = warnings(worker)
    assert f"metrics: udp://127.0.0.1:{port} did not take the datagram (ECONNREFUSED" in warning
    assert "is the server's [[udp]] service on? See docs/how-to/enable-udp.md." in warning


def test_with_influxdb_as_it_comes_a_worker_starts_and_one_warning_names_the_mend(
    broker: str, sender: Celery, tmp_path: Path
) -> None:
    with Influxd(tmp_path / "influxd", udp=False) as server:
        url = f"udp://127.0.0.1:{server.udp_port}?http_port={server.http_port}"
        config = {"influx_databases": {"metrics": url}}

        with Worker(tmp_path / "worker", "states", broker, config) as worker:
            wait_for(lambda: warnings(worker), 10, "the warning")
            assert stats(sender, worker)["metrics"]["points"] == 0
            at_first = COMPLAINTS.findall(worker.log())
            for lost in (1, 2):
                assert sender.send_task("states.succeed", [4]).get(timeout=20) == 4
                wait_for(lambda: stats(sender, worker)["metrics"]["lost"] == lost, 20)  # noqa: B023
            assert worker.stop() == 0

    (warning,) = at_first
    said = f"metrics: udp://127.0.0.1:{server.udp_port} did not take the datagram (ECONNREFUSED"
    assert warning.startswith(f"celery_influx: {said}")
    assert "is the server's [[udp]] service on? See docs/how-to/enable-udp.md." in warning
    # What is lost then is said once a minute, by the batcher.
    (_, loss) = COMPLAINTS.findall(worker.log())
    assert loss.startswith(said)
    assert loss.endswith("; 1 lines lost")


def test_it_warns_once_where_no_ping_is_answered(
    influxd: Influxd, broker: str, tmp_path: Path
) -> None:
    closed = free_port()
    databases = {
        "blind": f"udp://127.0.0.1:{influxd.udp_port}?http_port={closed}",
        "web": f"http://127.0.0.1:{closed}/x",
        "silent": f"udp://127.0.0.1:{influxd.udp_port}?http_port=0",
        "unknown": "udp://no-such-host.invalid?http_port=0",
    }

    with Worker(tmp_path, "states", broker, {"influx_databases": databases}) as worker:
        wait_for(lambda: len(warnings(worker)) >= 3, 20, "three warnings")
        assert worker.stop() == 0

    blind, unknown, web = sorted(warnings(worker))
    assert blind.startswith("celery_influx: blind: no answer to a ping (")
    assert "ECONNREFUSED" in blind
    assert blind.endswith(
        "; UDP gives no sign either, so points may go nowhere. If this server has no HTTP API, "
        "say so by 'http_port': 0"
    )
    assert "(dns: " in unknown
    assert web.startswith("celery_influx: web: no answer to a ping (")
    assert web.endswith("; points wait until it answers, as many as find room")


def test_a_worker_configured_in_a_namespace_sends_its_tasks_points(
    influxd: Influxd, database: str, broker: str, sender: Celery, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}"
    config = {
        "CELERY_INFLUX_DATABASES": {"metrics": url},
        "CELERY_INFLUX_TAGS": {"site": "here"},
        "INFLUX_DATABASES": "another library's",
    }

    with Worker(tmp_path, "namespaced", broker, config) as worker:
        assert sender.send_task("namespaced.succeed", [4]).get(timeout=20) == 4
        assert worker.stop() == 0

    (run,) = influxd.rows("celery_task", database)
    assert (run["task"], run["state"]) == ("namespaced.succeed", "SUCCESS")
    assert (run["site"], run["worker"]) == ("here", worker.name)
    assert run["wait"] >= 0
    assert warnings(worker) == []


def test_switched_off_it_does_nothing(broker: str, sender: Celery, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/x"
    config = {"influx_databases": {"metrics": url}, "influx_enabled": False}

    with Worker(tmp_path, "states", broker, config) as worker:
        assert sender.send_task("states.timed_above", [3]).get(timeout=20)[1] == 3
        account = stats(sender, worker)
        threads = [
            path.read_text().strip() for path in Path(f"/proc/{worker.pid()}/task").glob("*/comm")
        ]
        assert worker.stop() == 0

    assert set(account["metrics"].values()) == {0}
    assert len(threads) == 1
    assert warnings(worker) == []
    assert "celery_influx is switched off (influx_enabled)" in worker.log()


@pytest.mark.long  # in short: test_a_worker_that_is_told_to_end_sends_all_that_was_accepted
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_the_points_of_the_last_tasks_are_sent_when_a_worker_ends(
    number: signal.Signals, influxd: Influxd, database: str, broker: str, tmp_path: Path
) -> None:
    # So long an interval that only the end sends.
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=600"
    plain = publisher(broker)

    with Worker(tmp_path, "states", broker, {"influx_databases": {"metrics": url}}) as worker:
        done = [plain.send_task("states.succeed", [each]) for each in range(50)]
        for result in done:
            result.get(timeout=20)
        if number == signal.SIGTERM:
            plain.send_task("states.block", [1.0], ignore_result=True)
            wait_for(lambda: re.search(r"Task states\.block\S+ received", worker.log()), 10)
        else:
            wait_for(lambda: stats(plain, worker)["metrics"]["points"] == 50, 10)
        assert influxd.count("celery_task", "runtime", database) == 0
        worker.stop(number)

    expected = 51 if number == signal.SIGTERM else 50
    assert influxd.count("celery_task", "runtime", database) == expected


def test_a_worker_that_is_closed_while_tasks_run_still_takes_their_points(
    influxd: Influxd, database: str, broker: str, store: redis.Redis, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=600"

    with Worker(tmp_path, "closing", broker, {"influx_databases": {"metrics": url}}) as worker:
        publisher(broker).send_task("closing.wait")
        wait_for(lambda: store.get("begun"), 10)
        assert worker.stop() == 0

    assert store.get("closed") == "1"
    assert influxd.count("afterwards", "f", database) == 1
    assert [row["state"] for row in influxd.rows("celery_task", database)] == ["SUCCESS"]


def test_children_that_are_replaced_lose_no_point(
    influxd: Influxd, database: str, broker: str, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=600"
    plain = publisher(broker)
    options = ["--max-tasks-per-child", "1"]

    with Worker(
        tmp_path, "states", broker, {"influx_databases": {"metrics": url}}, options=options
    ) as worker:
        for result in [plain.send_task("states.succeed", [each]) for each in range(20)]:
            result.get(timeout=30)
        wait_for(lambda: stats(plain, worker)["metrics"]["points"] == 20, 10)
        account = stats(plain, worker)["metrics"]
        assert worker.stop() == 0

    assert account["queued"] == 20
    assert account["dropped"] == account["lost"] == account["rejected"] == 0
    assert influxd.count("celery_task", "runtime", database) == 20
