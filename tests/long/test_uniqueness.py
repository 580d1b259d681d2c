"""Points of one series from many processes at once: which are overwritten, and which never are.

By HTTP, which says what arrived.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from tests.integration.worker import Worker, children, environment, skip_without, stats
from tests.servers import Influxd, answers, free_port, wait_for

pytestmark = pytest.mark.long

POINTS = 100_000
CHILDREN = 16
WEB = 8


@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_children_that_write_one_series_at_once_overwrite_nothing(
    workers: int,
    influxd: Influxd,
    database: str,
    broker: str,
    store: redis.Redis,
    sender: Celery,
    tmp_path: Path,
) -> None:
    # A batch must be full before all children wait for it to be sent (apps/unique.py).
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?batch_size=1000&http_timeout=60"
    config = {"influx_databases": {"metrics": url}, "influx_task_points": False}
    parties = CHILDREN * workers
    accounts: dict[str, dict[str, int]] = {}

    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                Worker(
                    tmp_path / f"w{number}",
                    "unique",
                    broker,
                    config,
                    concurrency=CHILDREN,
                    options=["-Q", f"queue{number}"],
                )
            )
            for number in range(workers)
        ]
        for number in range(workers):
            for _ in range(CHILDREN):
                sender.send_task("unique.race", [parties, POINTS], queue=f"queue{number}")
        wait_for(lambda: store.get("arrived") == str(parties), 60, "all have a task")
        began = time.monotonic()
        wait_for(lambda: store.get("points") == str(POINTS * parties), 600, "all have sent")
        for worker in running:
            accounts[worker.name] = stats(sender, worker)["metrics"]
            assert worker.stop() == 0
        seconds = time.monotonic() - began

    stored = influxd.query('SELECT COUNT("number") FROM "race" GROUP BY "worker"', database)
    counts = {series["tags"]["worker"]: series["values"][0][1] for series in stored}
    print(f"{sum(counts.values()):,} points in {seconds:.0f} s")
    assert len(set(store.lrange("pids", 0, -1))) == parties
    for account in accounts.values():
        assert account["points"] == POINTS * CHILDREN
        assert account["dropped"] == account["lost"] == account["rejected"] == 0
    assert counts == {worker.name: POINTS * CHILDREN for worker in running}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("slot", [None, 567], ids=["own slots", "one slot"])
def test_web_processes_overwrite_only_what_has_one_slot_and_one_microsecond(
    slot: int | None,
    influxd: Influxd,
    database: str,
    broker: str,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    skip_without("gunicorn")
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?queue_size=200000&http_timeout=60"
    port = free_port()
    command = [
        *(sys.executable, "-m", "gunicorn", "tests.integration.apps.unique:application"),
        *("-c", "python:tests.integration.apps.unique", "-b", f"127.0.0.1:{port}"),
        *("-w", str(WEB), "--timeout", "120"),
    ]
    variables = {} if slot is None else {"SLOT": str(slot)}

    def request(number: int) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", f"/?points={POINTS}&parties={WEB}&own=p{number}")
            return json.loads(connection.getresponse().read())

    with (tmp_path / "log").open("wb") as log:
        gunicorn = subprocess.Popen(
            command,
            env=environment(broker, {"influx_databases": {"metrics": url}}, **variables),
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    try:
        wait_for(lambda: answers(port), 20, "gunicorn is up")

        def all_up() -> bool:
            pids = children(gunicorn.pid)
            return len(pids) == WEB and (slot is None or all(pid % 1_000 == slot for pid in pids))

        wait_for(all_up, 60, "eight processes")
        with ThreadPoolExecutor(WEB) as clients:
            found = list(clients.map(request, range(WEB)))
        gunicorn.terminate()
        assert gunicorn.wait(20) == 0
    finally:
        gunicorn.kill()
        gunicorn.wait(10)

    slots = {each["pid"] % 1_000 for each in found}
    assert len({each["pid"] for each in found}) == WEB
    assert len(slots) == (WEB if slot is None else 1)
    for number, each in enumerate(found):
        assert each["flushed"]
        assert each["stats"]["sent"] == POINTS
        # All has arrived: what is missing below was overwritten, not lost.
        assert influxd.count("race", f"p{number}", database) == POINTS
    overwritten = WEB * POINTS - influxd.count("race", "number", database)
    expected = same_microsecond(found) if slot is not None else 0.0
    print(
        f"{overwritten:,} of {WEB * POINTS:,} overwritten ({overwritten / WEB / POINTS:.3%}), "
        f"{expected:,.0f} expected; "
        f"{[round(POINTS / (each['ended'] - each['began'])) for each in found]} points a second"
    )
    if slot is None:
        assert overwritten == 0
    else:
        # The rates are means: on few cores processes run by turns, and faster than that.
        assert expected / 4 < overwritten < expected * 4


def same_microsecond(found: list[dict[str, Any]]) -> float:
    """How many points fall into the microsecond of another's, by life-of-a-point.md's formula."""
    total = 0.0
    for one, other in itertools.combinations(found, 2):
        together = min(one["ended"], other["ended"]) - max(one["began"], other["began"])
        rates = [POINTS / (each["ended"] - each["began"]) for each in (one, other)]
        total += rates[0] * rates[1] * 1e-6 * max(0.0, together)
    return total
