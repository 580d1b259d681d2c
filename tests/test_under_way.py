"""A run under way: its clocks, and what the extension makes of a message by itself."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context

import celery_influx
from celery_influx import under_way
from celery_influx.signals import HEADER, _run_of, _runs
from celery_influx.speedups import extension
from celery_influx.under_way import Run, ordinary_run

KINDS = list(dict.fromkeys([Run, under_way.make_run]))  # the same where there is no extension
FACTS = ("t", "q", "w"), 0, None, None, None


@pytest.mark.parametrize("kind", KINDS)
def test_its_clocks_run_from_start_to_stop(kind: type[Run]) -> None:
    run = kind(None, "id", FACTS, 1)
    assert run.clock == 0
    assert run.stop() == (None, None)

    before = time.perf_counter_ns()
    run.start()
    begun = time.perf_counter_ns()
    assert before <= run.clock <= begun
    while time.perf_counter_ns() < begun + 20_000_000:
        pass
    runtime, cpu = run.stop()

    assert runtime is not None
    assert cpu is not None
    assert 20_000_000 <= runtime <= time.perf_counter_ns() - before
    assert 0 < cpu <= runtime + 1_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_what_it_is_given_and_no_longer_than_it_lives(kind: type[Run]) -> None:
    class Thing:
        """Something that can be seen to be gone."""

    things = [Thing(), Thing()]
    run = kind(things[0], "id", FACTS, 2**62)
    seen = [weakref.ref(thing) for thing in things]
    assert (run.influx, run.id, run.facts, run.began) == (things[0], "id", FACTS, 2**62)
    assert (run.is_eager, run.over) == (False, False)
    run.over = run.is_eager = True
    assert (run.is_eager, run.over) == (True, True)

    things[0].runs = [run, things[1]]  # type: ignore[attr-defined] # a cycle
    del things, run
    gc.collect()

    assert [reference() for reference in seen] == [None, None]


NOW = time.time_ns()
#: A few of what a message may say, of each the ordinary first; ``...``: nothing.
SAID: dict[str, list[Any]] = {
    HEADER: [
        f"1;{NOW};{NOW}",
        f"1;{NOW};0",
        "1;0;9999999999999999999",
        "1;9223372036854775807;1",
        "1;9223372036854775808;1",
        "1;00000000000000000005;1",
        f"1;{NOW};{NOW};",
        f"1;{NOW}",
        f"1;{NOW};",
        f"1;;{NOW}",
        f"1;{NOW};{NOW}\0",
        f"1;{NOW};{NOW} ",
        f"1; {NOW};{NOW}",
        f"1;-{NOW};{NOW}",
        f"1;{NOW};1_000",
        f"2;{NOW};{NOW}",
        "1;\u0661;1",
        "1",
        "1;",
        "",
        b"1;1;1",
        1,
        None,
        ...,
    ],
    "eta": [None, ..., "", "2026-01-01T00:00:00+00:00", 5],
    "retries": [0, ..., None, 1, 2**70],
    "is_eager": [False, ..., None],
    "hostname": ["w@host", ..., None, "w\u00e9"],
    "delivery_info": [
        {"exchange": "", "routing_key": "celery"},
        {"exchange": None, "routing_key": "celery", "priority": 0},
        {"routing_key": "celery"},
        {"exchange": "", "routing_key": None},
        {"exchange": "", "routing_key": ""},
        {"exchange": "e", "routing_key": "celery"},
        {"exchange": ""},
        {},
        None,
        ...,
    ],
}


@pytest.mark.skipif(not extension, reason="without it there is one way only")
def test_the_extension_makes_the_same_of_a_message_or_leaves_it_to_python() -> None:
    app = Celery("app", broker="memory://", set_as_current=False)
    app.conf.influx_databases = {"main": "udp://127.0.0.1:9"}
    influx = celery_influx.install(app)

    @app.task(name="t", shared=False)
    def task() -> None:
        """What is never run."""

    app.finalize()
    ordinary = {name: said[0] for name, said in SAID.items()}
    said = [{**ordinary, name: value} for name, values in SAID.items() for value in values]
    pairs = itertools.combinations(SAID, 2)
    said += [
        {**ordinary, one: this, other: that}
        for one, other in pairs
        for this, that in itertools.product(SAID[one], SAID[other])
    ]

    made = 0
    for each in said:
        request = {name: value for name, value in each.items() if value is not ...}
        run = ordinary_run(influx, "id", "t", Context(request).__dict__)
        if run is None:
            continue
        made += 1
        expected = _run_of(influx, task, "id", Context(request))
        _runs.clear()  # it never ends
        series, retries, wait, age, ids = expected.facts
        assert wait is not None
        assert run.facts == (series, retries, wait - expected.began + run.began, age, ids)
        for name in ("influx", "id", "is_eager", "over", "clock"):
            assert getattr(run, name) == getattr(expected, name)

    assert ordinary_run(influx, "id", "t", Context(ordinary).__dict__)
    assert made > 50


@pytest.mark.skipif(not extension, reason="its own")
@pytest.mark.parametrize("given", [(), (1, 2, 3), (1, 2, 3, [])])
def test_the_extension_wants_what_it_wants(given: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        ordinary_run(*given)


@pytest.mark.skipif(not extension, reason="its own")
def test_the_extension_lets_no_run_leak() -> None:
    request = {name: said[0] for name, said in SAID.items()}
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(2_000):
        run = ordinary_run(None, "id", "t", request)
        assert run
        run.request = [run]
        run.start()
        run.stop()
    del run
    gc.collect()

    assert len(gc.get_objects()) - before < 100
