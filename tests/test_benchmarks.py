"""The benchmarks run and print their tables. Nothing here is about time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import find, load

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(output: str) -> dict[str, str]:
    """Each row's name and its figures."""
    cells = [line.strip("| ").split("|", 1) for line in output.splitlines() if line[:1] == "|"]
    return {name.strip(): figures.strip() for name, figures in cells}


def test_send_data_is_measured_beside_every_peer():
    load("datadog")
    load("statsd")
    load("influxdb_client")

    output = run("send_data", "--rounds", "2", "--size", "50")

    names = " ".join(rows(output))
    for peer in ("celery_influx, Point", "celery_influx, dict", "influxdb-client", "datadog"):
        assert peer in names
    for part in ("the calling thread, its batcher beside", "the call alone"):
        assert f"`send_data`: CPU of a point, {part}" in names
    assert "celery_influx, Point, clock floats, the call alone" in names
    for way in ("C", "Python only"):
        assert re.search(
            rf"µs a point for the types of fields, {way}: -?[0-9.]+, bound ≤ 0.3", output
        )
    assert "statsd, pipeline" in names
    assert re.search(r"µs a point: [0-9.]+, bound ≤ 5: (kept|NOT KEPT)", output)
    assert re.search(r"celery \d.*influxdb-client \d.*datadog \d.*statsd \d", output)


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "size", "names", "bound"),
    [
        (
            *("task", 20),
            {"bare, again", "two empty receivers", "celery_influx", "opentelemetry"},
            r"µs added: -?[0-9.]+, bound ≤ 9",
        ),
        (
            *("relay", 2_000, {"celery_influx", "the pipe"}),
            r"µs: [0-9.]+, bound ≤ 0.7",
        ),
        (
            *(
                "batcher",
                1,
                {
                    "60,000 bytes",
                    "60,000 bytes, unixgram",
                    "1,432 bytes",
                    "1,432 bytes, a call for each",
                },
            ),
            r"µs, 1,432 bytes: [0-9.]+, bound ≤ 0.5",
        ),
        (
            *("stalls", 2_000, {"an empty function", "celery_influx"}),
            r"µs, 99.9th percentile: [0-9.]+, bound ≤ 1000",
        ),
        (
            *(
                "influxd",
                5_000,
                {"HTTP", "http.client, bodies made before"},
            ),  # it raises where a point is not stored
            r"points/s over HTTP: [0-9.]+, bound ≥ 250000",
        ),
        (
            *("udp", 1, {"50,000 points/s for 1 s", "300,000 points/s for 1 s"}),
            r"% stored at 300,000 points/s, the worst: [0-9.]+, bound ≥ 100",
        ),
    ],
    ids=["task", "relay", "batcher", "stalls", "influxd", "udp"],
)
def test_a_part_is_measured_beside_its_peers(part: str, size: int, names: set[str], bound: str):
    load("opentelemetry.instrumentation.celery")
    find("influxd")

    output = run(part, "--rounds", "2", "--size", str(size))

    assert names <= set(rows(output))
    assert re.search(f"{bound}: (kept|NOT KEPT)", output)


@pytest.mark.long
def test_the_spool_is_measured_beside_none():
    assert {"no spool", "failed", "always", "always, fsync", "outage", "catching up"} <= set(
        rows(run("spool", "--rounds", "2", "--size", "1"))
    )


@pytest.mark.long
def test_every_worker_variant_is_measured_and_really_watched():
    find("redis-server")
    load("opentelemetry.instrumentation.celery")

    output = run("worker", "--rounds", "1", "--size", "40")

    figures = rows(output)
    for name in ("bare", "bare, again", "celery_influx", "events", "opentelemetry"):
        assert re.match(r"-?[\d,]", figures[name]), figures
    # 2 warming rounds and 1 measured one, of 42 tasks each.
    account = re.search(
        r"([\d,]+) tasks .* ([\d,]+) points .* ([\d,]+) event .* ([\d,]+) span", output
    )
    assert account, output
    tasks, points, events, spans = (int(count.replace(",", "")) for count in account.groups())
    assert tasks == 126
    assert points >= tasks
    assert events >= tasks  # some are sent together
    assert spans >= tasks


@pytest.mark.long
def test_import_is_measured_and_its_modules_named():
    output = run("import", "--rounds", "2", "--size", "3")

    assert any("from celery import Celery → from celery_influx" in name for name in rows(output))
    assert "celery_influx." in output
    for before in ("import celery", "from celery import Celery"):
        assert re.search(rf"ms of CPU added to {before}: [0-9.]+, bound ≤ 15", output)


def test_an_unknown_part_is_named_with_those_there_are():
    command = [sys.executable, "-m", "benchmarks", "wroker"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert (
        "no part wroker; expected one of send_data, task, relay, batcher, spool, stalls, influxd, udp, worker, threads, import"
        in done.stderr
    )
