"""Children that kill themselves, time out and are replaced; a shutdown in the middle of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.integration.worker import Worker, publisher, sending
from tests.servers import Influxd, Redis, wait_for

pytestmark = pytest.mark.long

TASKS = 3_000
LOST = "WorkerLostError"
AGAIN = ("RETRY", LOST)


def end_of(number: int) -> tuple[str, str | None]:
    """How a task ends, by what apps/torture.py does."""
    if number % 5 == 0:
        return "FAILURE", LOST
    ends = {1: ("FAILURE", "TimeLimitExceeded"), 2: ("FAILURE", "ValueError")}
    return ends.get(number % 50, ("SUCCESS", None))


@pytest.mark.timeout(1_200)
def test_no_point_is_lost_or_doubled_and_each_run_has_one(
    redis_server: Redis, influxd: Influxd, database: str, tmp_path: Path
) -> None:
    store = redis.Redis.from_url(redis_server.url, decode_responses=True)
    store.flushdb()
    sender = publisher(redis_server.url)
    url = f"http://127.0.0.1:{influxd.http_port}/{database}"
    config = {"influx_task_ids": True, "task_time_limit": 2}
    options = ["--autoscale=8,2", "--max-tasks-per-child=3"]

    def worker(name: str, limits: str) -> Worker:
        return Worker(
            tmp_path / name,
            "torture",
            redis_server.url,
            {"influx_databases": {"main": f"{url}?{limits}"}, **config},
            concurrency=8,
            options=options,
            level="warning",
        )

    with sending(sender) as send:
        expected = {
            send("torture.work", [number], ignore_result=True).id: end_of(number)
            for number in range(TASKS)
        }

    def runs() -> list[dict[str, Any]]:
        return influxd.rows("celery_task", database)

    def end(row: dict[str, Any]) -> tuple[str, str | None]:
        return row["state"], row["exception"]

    # When it is told to end, lines wait that nothing else would have it send.
    with worker("first", "flush_interval=60&batch_size=100") as first:
        wait_for(lambda: int(store.get("runs") or 0) > TASKS // 2, 400, "half of the tasks")
        assert first.stop(timeout=60) == 0
    assert int(store.get("runs") or 0) < TASKS
    with worker("second", "flush_interval=0.1") as second:
        wait_for(lambda: store.llen("celery") == 0, 400, "the rest is taken")
        wait_for(
            lambda: {row["id"] for row in runs() if end(row) != AGAIN} == set(expected),
            60,
            "a point of each task's end",
        )
        assert second.stop(timeout=60) == 0
    sender.close()

    returned = [int(each) for each in store.lrange("returned", 0, -1)]
    starts = Counter(store.lrange("starts", 0, -1))
    stored = sorted(row["serial"] for row in influxd.rows("custom", database))
    points = Counter(row["id"] for row in runs())
    accounts = [json.loads(each) for each in store.lrange("accounts", 0, -1)]
    ends = [(row["id"], end(row)) for row in runs()]
    print(f"{len(returned)} points, {starts.total()} runs of {len(starts)} tasks")
    print(Counter(end for _, end in ends), accounts)
    assert stored == sorted(returned)
    assert points == starts
    assert len(starts) == TASKS
    # Before a task ends, its child may die before it is seen to have taken it; and a shutdown may
    # give a message back whose run has ended.
    assert {each for each in ends if each[1] != AGAIN} == set(expected.items())
    # At their ends, with all that came while they shut down.
    assert len(accounts) == 2
    for account in accounts:
        assert account["points"] == account["sent"]
        assert account["dropped"] == account["lost"] == account["rejected"] == 0
    assert sum(account["sent"] for account in accounts) == len(returned) + starts.total()
    for each in (first, second):
        assert not re.search(r"could not be sent|dropped|lines lost", each.log())
