"""Children that kill themselves, time out and are replaced; a shutdown in the middle of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import redis

from tests.integration.worker import Worker, publisher, sending, stats
from tests.servers import Influxd, Redis, wait_for

pytestmark = pytest.mark.long

TASKS = 3_000


@pytest.mark.timeout(1_200)
def test_no_point_is_lost_or_doubled_and_each_run_has_one(
    redis_server: Redis, influxd: Influxd, database: str, tmp_path: Path
) -> None:
    store = redis.Redis.from_url(redis_server.url, decode_responses=True)
    store.flushdb()
    sender = publisher(redis_server.url)
    config = {
        "influx_databases": {
            "main": f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=0.1"
        },
        "influx_task_ids": True,
        "task_time_limit": 1,
    }
    options = ["--autoscale=8,2", "--max-tasks-per-child=3"]

    def worker(name: str) -> Worker:
        return Worker(
            tmp_path / name,
            "torture",
            redis_server.url,
            config,
            concurrency=8,
            options=options,
            level="critical",
        )

    with sending(sender) as send:
        for number in range(TASKS):
            send("torture.work", [number], ignore_result=True)
    accounts = []
    with worker("first") as first:
        wait_for(lambda: int(store.get("runs") or 0) > TASKS // 2, 400, "half of the tasks")
        accounts.append(stats(sender, first)["main"])
        assert first.stop(timeout=60) == 0
    assert int(store.get("runs") or 0) < TASKS
    with worker("second") as second:
        wait_for(lambda: store.llen("celery") == 0, 400, "the rest")
        wait_for(lambda: stats(sender, second)["main"]["queued"] == 0, 60)
        accounts.append(stats(sender, second)["main"])
        assert second.stop(timeout=60) == 0
    sender.close()

    returned = [int(each) for each in store.lrange("returned", 0, -1)]
    starts = Counter(store.lrange("starts", 0, -1))
    stored = sorted(row["serial"] for row in influxd.rows("custom", database))
    runs = influxd.rows("celery_task", database)
    points = Counter(row["id"] for row in runs)
    print(f"{len(returned)} points, {starts.total()} runs of {len(starts)} tasks")
    print(Counter((row["state"], row["exception"]) for row in runs), accounts)
    assert stored == sorted(returned)
    assert points == starts
    assert len(starts) == TASKS
    for account in accounts:
        assert account["dropped"] == account["lost"] == account["rejected"] == 0
