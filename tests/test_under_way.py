"""A run under way: its clocks, and what is made of an ordinary message at once."""

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
from celery_influx import signals
from celery_influx.signals import HEADER, _run_of, _runs
from celery_influx.under_way import Run, make_run
from tests.conftest import Receiver

KINDS = list(dict.fromkeys([Run, make_run]))  # the same where there is no extension
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


def test_what_is_made_of_a_message_at_once_is_what_is_made_of_any(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("app", broker="memory://", set_as_current=False)
    app.conf.influx_databases = {"main": receiver.url}
    influx = celery_influx.install(app)

    @app.task(name="t", shared=False)
    def task() -> None:
        """What is never run."""

    app.finalize()
    influx.start()
    ordinary = {name: said[0] for name, said in SAID.items()}
    said = [{**ordinary, name: value} for name, values in SAID.items() for value in values]
    pairs = itertools.combinations(SAID, 2)
    said += [
        {**ordinary, one: this, other: that}
        for one, other in pairs
        for this, that in itertools.product(SAID[one], SAID[other])
    ]
    slow: list[Run] = []
    begin = signals._begin

    def begin_slowly(task_id: str, task: Any) -> None:
        begin(task_id, task)
        slow.append(_runs[id(task.request_stack.top)])

    monkeypatch.setattr(signals, "_begin", begin_slowly)

    def start(said: dict[str, Any]) -> Run:
        request = Context({name: value for name, value in said.items() if value is not ...})
        task.request_stack.push(request)
        app.loader.on_task_init("id", task)
        assert task.request_stack.pop() is request
        return _runs.pop(id(request))

    start(ordinary)
    made = 0
    for each in said:
        run = start(each)
        if run is slow[-1]:
            continue
        made += 1
        request = {name: value for name, value in each.items() if value is not ...}
        expected = _run_of(influx, task, "id", Context(request))
        _runs.clear()  # it never ends
        series, retries, wait, age, ids = expected.facts
        assert wait is not None
        assert run.facts == (series, retries, wait - expected.began + run.began, age, ids)
        assert run.clock
        for name in ("influx", "id", "is_eager", "over"):
            assert getattr(run, name) == getattr(expected, name)

    assert start(ordinary) is not slow[-1]
    assert made > 20
    assert influx.close(5)


def test_no_run_leaks() -> None:
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(2_000):
        run = make_run(None, "id", FACTS, 1)
        run.request = [run]
        run.start()
        run.stop()
    del run
    gc.collect()

    assert len(gc.get_objects()) - before < 100
