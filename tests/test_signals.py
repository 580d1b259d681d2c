"""Celery's signals → celery_task points and one header, tried in this process.

What each pool does is tried in tests/integration/test_end_to_end.py.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery, Task, signals
from celery.app import trace
from celery.app.task import Context
from celery.contrib.testing.worker import start_worker
from celery.exceptions import SoftTimeLimitExceeded
from celery.loaders.app import AppLoader

import celery_influx
from celery_influx import ordinary
from celery_influx import signals as signals_module
from celery_influx.measurements import CELERY_TASK, STATES
from celery_influx.signals import HEADER, _eta_ns, _published, guard
from tests.conftest import Receiver

_names = iter(range(1_000_000))


def make_app(**config: Any) -> Celery:
    """An app with a broker in memory, and a queue of its own in it."""
    app = Celery("app", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        task_default_queue=f"queue{next(_names)}",
        worker_hijack_root_logger=False,
        broker_transport_options={"polling_interval": 0.01},
    )
    app.conf.update(config)
    return app


@contextmanager
def working(app: Celery) -> Iterator[None]:
    """A worker of the pool solo, in a thread."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with start_worker(app, perform_ping_check=False, pool="solo", shutdown_timeout=20):
            yield
            # It looks every two seconds whether it is to end, and after each message.
            waking = threading.Timer(0.05, app.control.broadcast, ["heartbeat"])
            waking.start()
        waking.join()
    finally:
        # A worker sets up logging for its process, which here is that of other tests as well.
        root.setLevel(level)
        root.handlers[:] = handlers


def giving(app: Celery, name: str, result: Any, **options: Any) -> Task:
    """A task of ``app`` that gives ``result``."""

    @app.task(shared=False, name=name, **options)
    def give() -> Any:
        return result

    return give


@contextmanager
def receiving(signal: Any, receiver: Any) -> Iterator[None]:
    """Connect a receiver of another's for a while."""
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


@pytest.fixture
def eager_app(receiver: Receiver) -> Celery:
    """An app whose runs in place are written."""
    app = make_app(influx_databases={"main": receiver.url}, influx_eager=True)
    celery_influx.install(app)
    return app


def message_of(app: Celery) -> Any:
    """Take the next message off the app's queue."""
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        message = queue.get(timeout=5)
        message.ack()
        return message


def test_a_message_is_stamped_with_one_small_flat_header() -> None:
    app = make_app()
    celery_influx.install(app)
    before = time.time_ns()

    app.send_task("t", headers={"mine": {"kept": 1}})

    headers = message_of(app).headers
    version, last, first = headers[HEADER].split(";")
    assert version == "1"
    assert last == first
    assert before <= int(last) <= time.time_ns()
    assert len(headers[HEADER]) < 64
    assert headers["mine"] == {"kept": 1}
    # Nothing else is ours: the keys are those of a message without the plugin's receiver.
    assert {key for key in headers if "influx" in key} == {HEADER}


def test_a_header_that_is_handed_on_is_stamped_afresh() -> None:
    app = make_app()
    celery_influx.install(app)
    old = "1;1000000000000000000;900000000000000000"

    app.send_task("t", headers={HEADER: old, "mine": 1})

    _, last, first = message_of(app).headers[HEADER].split(";")
    assert int(last) == int(first) > 1_700_000_000_000_000_000


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_retry_keeps_the_first_publish_and_stamps_the_last(protocol: int) -> None:
    app = make_app(task_protocol=protocol)
    celery_influx.install(app)
    first = 1_700_000_000_000_000_000

    app.send_task("t", headers={HEADER: f"1;{first + 5};{first}"}, retries=1)

    _, last, kept = message_of(app).headers[HEADER].split(";")
    assert int(kept) == first
    assert int(last) > first + 5


def test_the_run_that_is_retried_knows_the_first_publish_better_than_a_handed_on_header() -> None:
    app = make_app()
    celery_influx.install(app)
    stamped = 1_700_000_000_000_000_000

    @app.task(shared=False, bind=True, name="t")
    def task(self: Task) -> None:
        # Another task's header, and this run's own, which the message brought.
        self.request.headers = {HEADER: "1;1600000000000000000;1600000000000000000"}
        raise self.retry(countdown=0)

    with pytest.raises(Exception, match="Retry in"):
        _run(app, task, {HEADER: f"1;{stamped};{stamped}"})

    assert message_of(app).headers[HEADER].endswith(f";{stamped}")


def _run(app: Celery, task: Task, request: dict[str, Any]) -> Any:
    """Run the body of a task as a worker does, with this request."""
    task = app.tasks[task.name]
    from celery._state import pop_current_task, push_current_task

    push_current_task(task)
    task.push_request(id="an-id", called_directly=False, is_eager=False, **request)
    try:
        return task.run()
    finally:
        task.pop_request()
        pop_current_task()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        b"1;1;1",
        17,
        ["1;1;1"],
        "1;1",
        "1;1;1;1",
        "2;1700000000000000000;1700000000000000000",
        "1;-5;1",
        "1;1.5;1",
        "1;99999999999999999999;1",
        "1;1;1\n",
        "1;١;1",
        "x" * 100_000,
    ],
)
def test_a_header_of_another_version_or_garbage_is_none(header: object) -> None:
    assert _published(header) is None


def test_a_header_of_ours_gives_both_times() -> None:
    assert _published("1;1700000000000000005;1700000000000000000") == (
        1_700_000_000_000_000_005,
        1_700_000_000_000_000_000,
    )


def test_a_run_whose_message_has_garbage_for_a_header_has_no_wait(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", 1)
    garbage = ["2;17;17", 5, {"a": 1}, None]
    waiting = list(garbage)

    def spoil(headers: dict[str, Any], **_: Any) -> None:
        headers[HEADER] = waiting.pop()

    with working(app), receiving(signals.before_task_publish, spoil):
        for _ in garbage:
            assert task.delay().get(timeout=10) == 1

    for point in receiver.points("celery_task", at_least=len(garbage)):
        assert "wait" not in point.fields
        assert "age" not in point.fields
        assert point.fields["runtime"] >= 0


def test_a_publish_in_the_future_is_no_negative_wait_and_is_counted(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", 1)

    def skew(headers: dict[str, Any], **_: Any) -> None:
        ahead = time.time_ns() + 60_000_000_000
        headers[HEADER] = f"1;{ahead};{ahead}"

    with working(app), receiving(signals.before_task_publish, skew):
        task.delay().get(timeout=10)

    (point,) = receiver.points("celery_task", at_least=1)
    assert point.fields["wait"] == 0.0
    assert app.influx.stats()["main"]["clamped"] == 1


def test_every_tag_and_field_of_a_run_is_in_the_table(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_task_ids=True)
    celery_influx.install(app)
    ids = []

    @app.task(shared=False, name="t", bind=True, max_retries=1)
    def task(self: Task) -> None:
        ids.append(self.request.id)
        raise self.retry(countdown=0, exc=KeyError("x"))

    with working(app):
        result = task.delay()
        result.get(timeout=10, propagate=False)

    points = receiver.points("celery_task", at_least=2)
    table = {column.name: column.type for column in CELERY_TASK.columns}
    for point in points:
        assert point.tags is not None
        assert set(point.tags) <= {n for n, kind in table.items() if kind == "tag"}
        for name, value in point.fields.items():
            assert type(value).__name__ == table[name]
    last = points[-1]
    assert last.tags is not None
    assert last.tags["state"] == "FAILURE"
    assert last.tags["exception"] == "KeyError"
    assert last.tags["queue"] == app.conf.task_default_queue
    assert last.fields["retries"] == 1
    assert {"id", "root_id", "wait", "age", "cpu", "runtime"} <= set(last.fields)
    assert last.fields["id"] == ids[0]
    assert {"RETRY", "FAILURE"} <= set(STATES)


def test_an_app_without_the_plugin_gets_no_point_and_its_messages_work_as_before(
    receiver: Receiver,
) -> None:
    with_plugin = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(with_plugin)
    without = make_app()
    ours = giving(with_plugin, "ours", "ours")

    @without.task(shared=False, name="theirs", bind=True)
    def theirs(self: Task) -> int:
        return int(self.request.headers["mine"])

    with working(without):
        assert theirs.apply_async(headers={"mine": 5}).get(timeout=10) == 5
        assert without.send_task("unknown").id
    with working(with_plugin):
        assert ours.delay().get(timeout=10) == "ours"

    points = receiver.points("celery_task", at_least=1)
    assert [point.tags["task"] for point in points if point.tags] == ["ours"]


def test_two_apps_in_one_process_keep_their_task_points_apart(
    receiver: Receiver, other_receiver: Receiver
) -> None:
    one = make_app(influx_databases={"main": receiver.url}, influx_task_ids=True)
    two = make_app(influx_databases={"main": other_receiver.url})
    celery_influx.install(one)
    celery_influx.install(two)
    # Tasks of one name, so that only the app tells them apart.
    tasks = [giving(one, "t", 1), giving(two, "t", 2)]
    past = datetime.now(timezone.utc) - timedelta(seconds=5)

    for app, task in zip((one, two), tasks, strict=True):
        app.send_task("unknown")
        task.apply_async(expires=past)
    results = [task.delay() for task in tasks]
    with working(one):
        assert results[0].get(timeout=10) == 1
    with working(two):
        assert results[1].get(timeout=10) == 2

    for app, where in ((one, receiver), (two, other_receiver)):
        assert app.influx.flush()
        points = where.points("celery_task", at_least=3)
        tags = [point.tags or {} for point in points]
        assert [each["state"] for each in tags] == ["REJECTED", "REVOKED", "SUCCESS"]
        assert {each["queue"] for each in tags} == {app.conf.task_default_queue}
        assert app.influx.stats()["main"]["points"] == 3
        assert all(("id" in point.fields) == (app is one) for point in points)


def test_a_task_that_wants_none_and_an_app_that_wants_none_get_no_points(
    receiver: Receiver,
) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    off = make_app(influx_databases={"main": receiver.url}, influx_task_points=False)
    celery_influx.install(app)
    celery_influx.install(off)
    silent = giving(app, "silent", 1, influx=False)
    heard = giving(app, "heard", 2)
    quiet = giving(off, "quiet", 3)

    with working(app):
        assert silent.delay().get(timeout=10) == 1
        assert heard.delay().get(timeout=10) == 2
    with working(off):
        assert quiet.delay().get(timeout=10) == 3

    points = receiver.points("celery_task", at_least=1)
    assert [point.tags["task"] for point in points if point.tags] == ["heard"]


def test_an_exception_that_is_a_result_is_no_exception_of_the_run(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", ValueError("a value"), ignore_result=True)

    with working(app):
        task.delay()
        (point,) = receiver.points("celery_task", at_least=1)

    assert point.tags is not None
    assert point.tags["state"] == "SUCCESS"
    assert "exception" not in point.tags


def test_a_call_in_place_is_no_run_of_a_message(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", 1)

    assert task.apply().get() == 1
    assert task() == 1

    assert app.influx.stats()["main"]["points"] == 0


def test_who_else_listens_is_told_of_a_runs_end_and_where_nobody_does_no_signal_is_sent(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process a worker may have been before.
    monkeypatch.setattr(trace, "send_postrun", signals.task_postrun.send)
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", 42)
    find, sent = signals.task_postrun._live_receivers, []
    told: list[tuple[object, ...]] = []

    def receivers(sender: Any) -> Any:
        sent.append(sender.name)
        return find(sender)

    def other(sender: Any = None, retval: Any = None, state: str = "", **said: Any) -> None:
        told.append((sender.name, retval, state, *sorted(said)))

    monkeypatch.setattr(signals.task_postrun, "_live_receivers", receivers)
    with working(app):
        task.delay().get(timeout=10)
        receiver.points("celery_task", at_least=1)
        with receiving(signals.task_postrun, other):
            task.delay().get(timeout=10)
            receiver.points("celery_task", at_least=2)
        task.delay().get(timeout=10)
        receiver.points("celery_task", at_least=3)
        assert app.influx.flush(5)

    assert sent == ["t"]
    assert told == [("t", 42, "SUCCESS", "args", "kwargs", "signal", "task", "task_id")]
    assert app.influx.stats()["main"]["points"] == 3


def test_what_celerys_tracer_calls_is_left_alone_where_it_is_anothers(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []

    def others(**said: Any) -> Any:
        sent.append(said["state"])
        return signals.task_postrun.send(**said)

    monkeypatch.setattr(trace, "send_postrun", others)
    app = make_app(influx_databases={"main": receiver.url})
    celery_influx.install(app)
    task = giving(app, "t", 42)
    with working(app):
        task.delay().get(timeout=10)
        receiver.points("celery_task", at_least=1)

    assert sent == ["SUCCESS"]
    assert trace.send_postrun is others  # type: ignore[comparison-overlap]


def test_what_our_receiver_raises_at_a_runs_end_does_the_task_no_harm(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_strict=True)
    celery_influx.install(app)
    task = giving(app, "t" * 65_536, 42)  # no tag of a point
    with working(app):
        assert task.delay().get(timeout=10) == 42
        assert task.delay().get(timeout=10) == 42
        assert app.influx.flush(5)

    assert app.influx.stats()["main"]["rejected"] == 2
    assert "at the end of a run" in caplog.text


def test_where_the_loader_does_not_call_us_the_signal_of_a_runs_start_is_used(
    receiver: Receiver, eager_app: Celery
) -> None:
    del eager_app.loader.on_task_init  # as by somebody who puts their own there
    task = giving(eager_app, "t", 1)
    try:
        for _ in range(3):
            task.apply()
        first, *others = receiver.points("celery_task", at_least=3)
        assert signals_module._unheard == {"t"}  # for the others their loader's word stands
    finally:
        signals.task_prerun.disconnect(dispatch_uid="celery_influx._begin_unheard")
        signals_module._unheard.clear()

    assert "runtime" not in first.fields  # nobody saw it begin
    assert [point.fields["runtime"] < 1 for point in others] == [True, True]
    assert all(point.tags and point.tags["state"] == "SUCCESS" for point in (first, *others))


def test_the_loaders_own_way_is_gone_as_well_and_what_it_raises_the_run_has(
    receiver: Receiver,
) -> None:
    class Loader(AppLoader):
        def on_task_init(self, task_id: str, task: Task) -> None:
            called.append(task.name)
            raise LookupError("the loader's")

    called: list[str] = []
    app = make_app(influx_databases={"main": receiver.url}, influx_eager=True)
    app.loader = Loader(app)
    celery_influx.install(app)

    with pytest.raises(LookupError):  # as without us
        giving(app, "t", 1).apply()

    (point,) = receiver.points("celery_task", at_least=1)
    assert point.tags
    assert (point.tags["state"], point.tags["exception"]) == ("FAILURE", "LookupError")
    assert called == ["t"]


def test_a_run_of_which_we_cannot_tell_goes_its_way(
    receiver: Receiver, eager_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    task = giving(eager_app, "t", 1)
    influx = eager_app.influx
    influx.queue_name = lambda _: 1 / 0

    assert task.apply().get() == 1

    assert influx.flush(5)
    assert influx.stats()["main"]["points"] == 0
    (said,) = (record for record in caplog.records if record.name.startswith("celery_influx"))
    assert said.getMessage() == "celery_influx: a run of t has no point"


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_run_within_a_run_of_the_same_task_and_id_leaves_that_its_own_end(
    receiver: Receiver, counted: bool, guarded: bool
) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_eager=counted)
    celery_influx.install(app)

    @app.task(shared=False, name="t", bind=True)
    def task(self: Task, depth: int = 2) -> None:
        if depth:
            self.apply((depth - 1,), task_id=self.request.id, retries=depth)
        else:
            time.sleep(0.05)

    if guarded:
        guard()
    with working(app):
        task.delay()
        points = receiver.points("celery_task", at_least=3 if counted else 1)
        assert app.influx.flush(5)
    signals.task_postrun.disconnect(dispatch_uid="celery_influx._guard")

    assert app.influx.stats()["main"]["points"] == len(points)
    found = [point.fields["retries"] for point in points]
    assert found == ([1, 2, 0] if counted else [0])
    assert all(point.fields["runtime"] >= 0.05 for point in points)


@pytest.mark.parametrize("counted", [True, False])
def test_a_limit_on_the_way_to_the_end_of_a_run_in_place_ends_that_one_alone(
    receiver: Receiver, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_eager=counted)
    celery_influx.install(app)
    send = signals.task_postrun.send

    def send_or_raise(**said: Any) -> Any:
        if said["task"].request.is_eager:
            raise SoftTimeLimitExceeded
        return send(**said)

    @app.task(shared=False, name="t", bind=True)
    def task(self: Task) -> int:
        if not self.request.is_eager:
            with pytest.raises(SoftTimeLimitExceeded):
                self.apply(task_id=self.request.id)
        return 42

    monkeypatch.setattr(trace, "send_postrun", send_or_raise)
    with working(app):
        assert task.delay().get(timeout=10) == 42
        points = receiver.points("celery_task", at_least=1 + counted)
        assert app.influx.flush(5)

    assert app.influx.stats()["main"]["points"] == len(points)
    assert [point.tags["state"] for point in points] == ["FAILURE"] * counted + ["SUCCESS"]
    assert not signals_module._runs


@pytest.mark.parametrize("with_extension", [True, False])
def test_what_fails_twice_at_a_runs_end_does_the_task_no_harm_and_is_not_kept(
    receiver: Receiver, with_extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    influx = celery_influx.install(app)
    task = giving(app, "t", 42)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(trace, "send_postrun", signals.task_postrun.send)
    monkeypatch.setattr(type(influx), "end_run", fail)
    if not with_extension:
        monkeypatch.setattr(signals_module, "quickest", ordinary)
        guard()
        end = ordinary.task_end(
            signals_module._runs, signals_module._on_end, signals_module._on_end_again, print
        )
        monkeypatch.setattr(signals_module, "on_task_end", end)
    try:
        with working(app):
            assert task.delay().get(timeout=10) == 42
    finally:
        signals.task_postrun.disconnect(dispatch_uid="celery_influx._guard")
        signals_module._find_ours()

    assert not signals_module._runs


def test_nothing_is_kept_of_a_run_after_its_end(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url}, task_ignore_result=True)
    influx = celery_influx.install(app)
    seen: list[weakref.ref[Context]] = []
    requests: list[Context] = []

    @app.task(shared=False, name="t", bind=True)
    def task(self: Task, keep: bool = False) -> None:
        seen.append(weakref.ref(self.request))
        if keep:
            requests.append(self.request)

    with working(app):
        for number in range(300):
            task.delay(keep=number == 0)
        receiver.points("celery_task", at_least=300)
        influx.flush()

    gc.collect()
    assert not signals_module._runs
    assert len(seen) == 300
    alive = [reference for reference in seen[1:] if reference() is not None]
    assert len(alive) <= 1  # Celery's own last one
    assert not [key for key in vars(requests[0]) if key.startswith("influx")]
    tables = [value for value in vars(influx).values() if isinstance(value, dict)]
    assert sum(map(len, tables)) <= 3


def test_a_revoked_task_gives_one_point_that_never_ran(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_task_ids=True)
    celery_influx.install(app)
    task = giving(app, "t", 1)
    past = datetime.now(timezone.utc) - timedelta(seconds=5)

    with working(app):
        expired = task.apply_async(expires=past)
        (point,) = receiver.points("celery_task", at_least=1)

    assert point.tags is not None
    assert point.tags["state"] == "REVOKED"
    assert point.tags["queue"] == app.conf.task_default_queue
    assert point.tags["worker"]
    assert point.fields["id"] == expired.id
    assert point.fields["retries"] == 0
    assert "runtime" not in point.fields


ETAS = [
    ("2030-01-02T03:04:05.000678+00:00", 1_893_553_445_000_678_000),
    ("2030-01-02T03:04:05.000678Z", 1_893_553_445_000_678_000),
    ("2030-01-02T03:04:05", 1_893_553_445_000_000_000),
    ("2030-01-02T05:04:05.000001+02:00", 1_893_553_445_000_001_000),
    ("soon", 0),
    ("", 0),
    (None, 0),
    (5, 0),
]


@pytest.mark.parametrize(("eta", "expected"), ETAS)
def test_an_eta_is_read_as_celery_writes_it(eta: object, expected: int) -> None:
    assert _eta_ns(eta) == expected
