"""install and what it gives: lazily configured, opened at the first use, an app's own."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import socket
import threading
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.process import current_process
from celery import Celery
from kombu import Exchange, Queue

import celery_influx
from celery_influx import plugin
from celery_influx.counters import COUNTERS
from celery_influx.errors import ConfigError
from celery_influx.field_types import TypeTable
from celery_influx.plugin import find
from celery_influx.relay import SYNC
from celery_influx.under_way import make_run
from tests.conftest import Receiver, run_python
from tests.servers import Influxd, free_port, wait_for
from tests.test_relay import exit_code, fork


def make_app(name: str = "app", **config: Any) -> Celery:
    """An app that is not Celery's current one and needs no broker."""
    app = Celery(name, broker="memory://", set_as_current=False)
    app.conf.update(config)
    return app


def _settings(url: str, namespace: str | None) -> dict[str, Any]:
    """Two settings, by the names that they have in this namespace."""
    settings = {"influx_databases": {"main": url}, "influx_tags": {"site": "here"}}
    if namespace is None:
        return settings
    return {f"{namespace}_{name.upper()}": value for name, value in settings.items()}


def _by_object(app: Celery, url: str, namespace: str | None) -> None:
    app.config_from_object(SimpleNamespace(**_settings(url, namespace)), namespace=namespace)


def _by_keys(app: Celery, url: str, namespace: str | None) -> None:
    for name, value in _settings(url, namespace).items():
        setattr(app.conf, name, value)


def _by_keys_without_prefix(app: Celery, url: str, namespace: str | None) -> None:
    for name, value in _settings(url, None).items():
        setattr(app.conf, name, value)


def _by_update_after_object(app: Celery, url: str, namespace: str | None) -> None:
    app.config_from_object(SimpleNamespace(), namespace=namespace)
    app.conf.update(_settings(url, None))


#: These take the namespace from ``Celery(namespace=…)``; the others give it to the app.
_WITHOUT_OBJECT = (_by_keys, _by_keys_without_prefix)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("namespace", [None, "CELERY"])
@pytest.mark.parametrize("configure", [_by_object, *_WITHOUT_OBJECT, _by_update_after_object])
def test_install_may_come_before_or_after_the_configuration_with_a_namespace_or_without(
    when: str,
    namespace: str | None,
    configure: Callable[[Celery, str, str | None], None],
    receiver: Receiver,
) -> None:
    of_app = namespace if configure in _WITHOUT_OBJECT else None
    app = Celery("app", set_as_current=False, namespace=of_app)
    if when == "before":
        celery_influx.install(app)
    configure(app, receiver.url, namespace)
    if when == "after":
        celery_influx.install(app)

    app.influx.send_data({"measurement": "m", "fields": {"f": 1}})

    assert app.conf.prefix == (f"{namespace}_" if namespace else None)
    assert app.influx.flush()
    (point,) = receiver.points("m", at_least=1)
    assert point.tags is not None
    assert point.tags["site"] == "here"


def test_djangos_settings_for_other_libraries_are_none_of_ours(receiver: Receiver) -> None:
    app = Celery("app", set_as_current=False)
    settings = SimpleNamespace(
        INFLUX_HOST="elsewhere",
        INFLUX_DATABASES={"theirs": 1},
        INFLUXDB_URL="x",
        CELERY_INFLUX_DATABASES={"main": receiver.url},
    )
    app.config_from_object(settings, namespace="CELERY")

    influx = celery_influx.install(app)

    assert [database.name for database in influx] == ["main"]
    assert "main" in influx
    assert "other" not in influx


def test_install_again_changes_nothing() -> None:
    app = make_app()

    first = celery_influx.install(app)
    second = celery_influx.install(app)

    assert first is second is app.influx
    assert len([step for step in app.steps["worker"] if step.__name__ == "InfluxStep"]) == 1


def test_install_on_celerys_current_app_is_install_on_that_very_app(receiver: Receiver) -> None:
    from celery import current_app

    app = Celery("current", broker="memory://")
    app.conf.influx_databases = {"main": receiver.url}
    influx = celery_influx.install(current_app)
    Celery("another", broker="memory://")

    influx.send_data({"measurement": "m", "fields": {"f": 1}})

    assert influx.flush()
    assert app.influx is influx
    assert len(receiver.points("m", at_least=1)) == 1


def test_install_reads_no_configuration_opens_nothing_and_starts_nothing() -> None:
    code = """
        import json, logging, os, sys, threading
        from celery import Celery
        records = []
        class Keep(logging.Handler):
            def emit(self, record):
                records.append(record.getMessage())
        logging.getLogger().addHandler(Keep(level=0))
        logging.getLogger().setLevel(0)
        app = Celery("app", broker="memory://")
        app.conf.influx_databases = {"x": 7}
        before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
        import celery_influx
        celery_influx.install(app)
        after = sorted(os.listdir("/proc/self/fd")), threading.active_count()
        print(json.dumps({"same": before == after, "configured": app.configured,
                          "requests": "requests" in sys.modules, "said": records}))
    """

    run = run_python(code)

    assert run.stderr == ""
    assert json.loads(run.stdout) == {
        "same": True,
        "configured": False,
        "requests": False,
        "said": [],
    }


def test_nothing_is_started_before_the_first_point(receiver: Receiver) -> None:
    app = make_app(influx_databases={"quiet": receiver.url})
    influx = celery_influx.install(app)

    assert influx.stats() == {"quiet": dict.fromkeys([*COUNTERS, "queued"], 0)}
    assert influx["quiet"].options.http_port == 0
    repr(influx)

    assert "celery_influx quiet" not in {thread.name for thread in threading.enumerate()}


def test_two_apps_in_one_process_keep_apart(receiver: Receiver, other_receiver: Receiver) -> None:
    one = make_app("one", influx_databases={"main": receiver.url}, influx_tags={"app": "one"})
    two = make_app("two", influx_databases={"main": other_receiver.url})
    celery_influx.install(one)
    celery_influx.install(two)

    one.influx.send_data({"measurement": "m", "fields": {"f": 1}})
    two.influx.send_data({"measurement": "m", "fields": {"f": 2}})

    assert one.influx.flush()
    assert two.influx.flush()
    (first,) = receiver.points("m", at_least=1)
    (second,) = other_receiver.points("m", at_least=1)
    assert (first.fields["f"], second.fields["f"]) == (1, 2)
    assert first.tags is not None
    assert second.tags is not None
    assert first.tags["app"] == "one"
    assert "app" not in second.tags
    assert one.influx.stats()["main"]["points"] == two.influx.stats()["main"]["points"] == 1


def test_an_app_without_the_plugin_has_none() -> None:
    celery_influx.install(make_app("one"))

    assert find(make_app("two")) is None
    assert find(None) is None


def test_without_influx_databases_there_is_one_on_localhost() -> None:
    influx = celery_influx.install(make_app())

    (database,) = influx

    assert database.name == influx.default.name == "celery"
    options = database.options
    assert (options.transport, options.host) == ("udp", "localhost")
    assert (options.udp_port, options.http_port, options.database) == (8089, 8086, "celery")


def test_mistakes_in_the_configuration_are_all_named_at_the_first_use_and_at_every_one() -> None:
    app = make_app(
        influx_databses={},
        influx_strickt=True,
        influx_databases={"main": {"udp_prot": 1}, "web": "ftp://x"},
        influx_default_database="mian",
    )
    influx = celery_influx.install(app)
    uses: list[Callable[[], object]] = [
        lambda: influx.send_data({"measurement": "m", "fields": {"f": 1}}),
        lambda: influx["main"],
        influx.stats,
        influx.flush,
        influx.ping,
    ]

    for use in uses:
        with pytest.raises(celery_influx.ConfigError) as raised:
            use()
        mistakes = str(raised.value).splitlines()
        assert len(mistakes) == 5
        for words in (
            "influx_databases['main']: unknown option 'udp_prot'; did you mean 'udp_port'?",
            "influx_databases['web']: unknown scheme 'ftp'; expected ",
            "influx_default_database: 'mian' is not in influx_databases; expected ",
            "unknown setting 'influx_databses'; did you mean 'influx_databases'?",
            "unknown setting 'influx_strickt'; did you mean 'influx_strict'?",
        ):
            assert len([each for each in mistakes if each.startswith(words)]) == 1
    assert influx.close()


def test_the_default_database_answers_for_the_plugin(
    receiver: Receiver, other_receiver: Receiver
) -> None:
    app = make_app(
        influx_databases={"first": receiver.url, "second": other_receiver.url},
        influx_default_database="second",
    )
    influx = celery_influx.install(app)

    influx.send_data({"measurement": "m", "fields": {"f": 1}})
    influx.send_data({"measurement": "m", "fields": {"f": 2}}, "first")
    influx["first"].send_data({"measurement": "m", "fields": {"f": 3}})

    assert influx.close()
    assert [point.fields["f"] for point in other_receiver.points("m", at_least=1)] == [1]
    assert [point.fields["f"] for point in receiver.points("m", at_least=2)] == [2, 3]


def test_a_prefix_without_its_namespace_is_a_mistake_and_not_silently_nothing() -> None:
    app = Celery("prefixed", set_as_current=False)
    app.config_from_object({"CELERY_INFLUX_DATABASES": {"metrics": "udp://metrics"}})

    with pytest.raises(ConfigError) as error:
        celery_influx.install(app).stats()

    assert str(error.value) == (
        "unknown setting 'celery_influx_databases'; did you mean 'influx_databases'? The prefix is "
        "read only where the app has namespace='CELERY'"
    )


def test_the_default_database_is_flushed_pinged_queried_and_posted_to_though_another_is_first(
    influxd: Influxd, database: str
) -> None:
    # So long an interval that only the flush sends.
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval=600"
    closed = f"http://127.0.0.1:{free_port()}/x"
    app = make_app(
        influx_databases={"first": closed, "second": url}, influx_default_database="second"
    )
    influx = celery_influx.install(app)
    influx.send_data({"measurement": "m", "fields": {"f": 1}})
    assert influxd.count("m", "f", database) == 0

    flushed = influx.flush()
    stored = influxd.count("m", "f", database)
    ping = influx.ping()
    found = influx.query("SELECT f FROM m")
    influx.post("DROP MEASUREMENT m")

    assert flushed
    assert stored == 1
    assert ping.version.startswith("1.")
    assert [row["f"] for row in found.rows()] == [1]
    assert influxd.count("m", "f", database) == 0
    assert influx.close()


def test_switched_off_it_does_nothing(receiver: Receiver) -> None:
    app = make_app(influx_databases={"off": receiver.url}, influx_enabled=False)
    influx = celery_influx.install(app)

    influx.send_data({"measurement": "m", "fields": {"f": 1}})
    with influx.timed("t"):
        pass

    assert influx.flush()
    assert influx.close()
    assert influx.stats()["off"]["points"] == 0
    assert "celery_influx off" not in {thread.name for thread in threading.enumerate()}
    assert receiver.points("m") == receiver.points("timed") == []


def test_a_forked_child_sends_its_own_points_and_none_of_the_parents(receiver: Receiver) -> None:
    url = f"{receiver.url}&flush_interval=60"
    influx = celery_influx.install(make_app(influx_databases={"main": url}))
    influx.send_data({"measurement": "parent", "fields": {"f": 1}})

    child = os.fork()
    if child == 0:
        try:
            influx.send_data({"measurement": "child", "fields": {"f": 1}})
            sent = influx.flush() and influx.stats()["main"]["points"] == 1
            os._exit(0 if sent else 1)
        finally:
            os._exit(2)

    assert os.waitpid(child, 0)[1] == 0
    assert len(receiver.points("child", at_least=1)) == 1
    assert receiver.points("parent") == []
    assert influx.flush()
    assert len(receiver.points("parent", at_least=1)) == 1


@pytest.mark.parametrize("library", ["multiprocessing", "billiard"])
def test_what_a_child_of_multiprocessing_sent_last_is_sent_at_its_end(
    library: str, receiver: Receiver
) -> None:
    url = f"{receiver.url}&flush_interval=60"
    influx = celery_influx.install(make_app(influx_databases={"main": url}))
    context = importlib.import_module(library).get_context("fork")

    child = context.Process(
        target=influx.send_data, args=({"measurement": "child", "fields": {"f": 1}},)
    )
    child.start()
    child.join(20)

    assert child.exitcode == 0
    assert len(receiver.points("child", at_least=1)) == 1


@pytest.mark.once
def test_a_fork_in_the_middle_of_many_threads_points_does_not_hang_the_child(
    receiver: Receiver,
) -> None:
    influx = celery_influx.install(make_app(influx_databases={"main": receiver.url}))
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            influx.send_data({"measurement": "parent", "fields": {"f": 1}})

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            child = os.fork()
            if child == 0:
                try:
                    influx.send_data({"measurement": "child", "fields": {"f": 1}})
                    os._exit(0 if influx.flush(5) else 1)
                finally:
                    os._exit(2)
            ended_child = wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] and True, 20)  # noqa: B023
            assert ended_child
    finally:
        ended.set()
        for thread in threads:
            thread.join()

    assert len(receiver.points("child", at_least=6)) == 6


class Stop:
    """Keeps the thread that comes here until there is a fork, and a little longer."""

    def __init__(self) -> None:
        self.reached, self._forks = threading.Event(), threading.Event()
        os.register_at_fork(before=self._forks.set)

    def __call__(self, **_: object) -> None:
        self.reached.set()
        assert self._forks.wait(20)
        time.sleep(0.1)


class StopsWhereItIsRead(UserDict[str, Any]):
    """A configuration of ours."""

    def __init__(self, given: dict[str, Any], stop: Stop) -> None:
        super().__init__(given)
        self._stop = stop

    def __iter__(self) -> Iterator[str]:
        self._stop()
        return super().__iter__()


@pytest.mark.parametrize("where", ["as Celery loads it", "as we read it"])
def test_a_fork_in_the_middle_of_the_first_look_at_the_configuration_does_not_hang_the_child(
    receiver: Receiver, where: str
) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    influx = celery_influx.install(app)
    celery_influx.install(make_app("other")).options  # noqa: B018 - it is no process's very first
    stop = Stop()
    if where == "as Celery loads it":
        app.on_configure.connect(stop, weak=False)
    else:
        app.conf.influx_databases = StopsWhereItIsRead({"main": receiver.url}, stop)

    def send(who: str) -> bool:
        influx.send_data({"measurement": who, "fields": {"f": 1}})
        return influx.flush(5)

    thread = threading.Thread(target=send, args=("parent",))
    thread.start()
    assert stop.reached.wait(10)
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(8, exit=True, file=2)
        os._exit(0 if send("child") else 2)
    _, status = os.waitpid(child, 0)
    thread.join(10)

    assert os.waitstatus_to_exitcode(status) == 0
    for who in ("parent", "child"):
        assert len(receiver.points(who, at_least=1)) == 1


def test_a_point_that_comes_after_a_workers_end_does_not_hold_up_its_exit() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/m?http_timeout=600"
        influx = celery_influx.install(
            make_app(influx_databases={"m": url}, influx_shutdown_timeout=0.5)
        )
        influx.start_worker("worker@host", "threads")
        influx.start()
        influx.close()
        influx.send_data({"measurement": "late", "fields": {"f": 1}})

        began = time.monotonic()
        influx.close(influx.time_to_exit())
        assert time.monotonic() - began < 1

        influx.start_worker("worker@host", "threads")
        assert influx.time_to_exit() is None
        influx.close(0)


def test_a_point_after_close_opens_it_again(receiver: Receiver) -> None:
    influx = celery_influx.install(make_app(influx_databases={"main": receiver.url}))
    influx.send_data({"measurement": "m", "fields": {"f": 1}})
    assert influx.close()

    influx.send_data({"measurement": "m", "fields": {"f": 2}})

    assert influx.close()
    assert influx.close()
    assert len(receiver.points("m", at_least=2)) == 2


ROUTES = [
    ("", "celery", "celery"),
    ("", "created-on-the-way", "created-on-the-way"),
    ("post", "letter", "letters"),
    ("post", "parcel", "parcels"),
    ("post", "unbound", "unbound"),
    ("news", "news.eu", "eu"),
    ("news", "news.eu.berlin.mitte", "eu"),
    ("news", "news.us.ny", "us"),
    ("news", "news.us.ny.brooklyn", "rest"),
    ("loud", "anything", "everyone"),
    (None, None, ""),
]


@pytest.mark.parametrize(("exchange", "key", "queue"), ROUTES)
def test_a_queue_is_found_by_exchange_and_routing_key(
    exchange: str | None, key: str | None, queue: str
) -> None:
    queues = [
        Queue("celery"),
        Queue("letters", Exchange("post", type="direct"), routing_key="letter"),
        Queue("parcels", Exchange("post", type="direct"), routing_key="parcel"),
        Queue("eu", Exchange("news", type="topic"), routing_key="news.eu.#"),
        Queue("us", Exchange("news", type="topic"), routing_key="news.us.*"),
        Queue("rest", Exchange("news", type="topic"), routing_key="#"),
        Queue("everyone", Exchange("loud", type="fanout")),
    ]
    influx = celery_influx.install(make_app(task_queues=queues))

    for _ in range(2):
        name = influx.queue_name({"exchange": exchange, "routing_key": key})
        assert name == queue


def test_workers_that_are_made_and_never_started_leave_no_pipe_open(receiver: Receiver) -> None:
    influx = celery_influx.install(make_app(influx_databases={"main": receiver.url}))
    before = sorted(each.name for each in Path("/proc/self/fd").iterdir())

    for _ in range(3):
        influx.start_worker("worker@host", "prefork")
    influx.close()

    assert sorted(each.name for each in Path("/proc/self/fd").iterdir()) == before


def test_points_sent_before_the_worker_starts_stay_in_its_account(receiver: Receiver) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    influx = celery_influx.install(app)
    influx.send_data([{"measurement": "m", "fields": {"f": number}} for number in range(5)])

    influx.start_worker("worker@host", "prefork")
    influx.start()

    assert len(receiver.points("m", at_least=5)) == 5
    found = influx.stats()["main"]
    assert (found["points"], found["sent"], found["queued"]) == (5, 5, 0)
    assert influx.close()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_points_that_other_threads_send_while_the_worker_sets_out_stay_in_its_account(
    pool: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(**how: bool) -> TypeTable:
        influx.send_data({"measurement": "m", "fields": {"f": 2}})  # as a thread may, just then
        return TypeTable(**how)

    app = make_app(influx_databases={"main": f"{receiver.url}&flush_interval=600"})
    influx = celery_influx.install(app)
    influx.send_data({"measurement": "m", "fields": {"f": 1}})
    threads = threading.active_count()
    monkeypatch.setattr(plugin, "TypeTable", table)

    influx.start_worker("worker@host", pool)
    influx.start()
    influx.send_data({"measurement": "m", "fields": {"f": 3}})
    influx.close()

    points = receiver.points("m", at_least=3)
    assert [point.fields["f"] for point in points] == [1, 2, 3]
    found = influx.stats()["main"]
    assert (found["points"], found["sent"], found["queued"]) == (3, 3, 0)
    assert threading.active_count() < threads


def test_flush_says_true_also_before_the_workers_children_are_there_and_after_its_end(
    receiver: Receiver,
) -> None:
    app = make_app(influx_databases={"main": receiver.url})
    influx = celery_influx.install(app)
    answers = []

    def send_and_flush() -> None:
        influx.send_data({"measurement": "m", "fields": {"f": len(answers)}})
        answers.append(influx.flush(5))

    influx.start_worker("worker@host", "prefork")
    send_and_flush()  # as from `celeryd_after_setup`
    influx.start()
    send_and_flush()
    influx.close()
    send_and_flush()  # as from `worker_shutdown`
    influx.start_worker("worker@host", "prefork")  # and another step failed
    influx.close()
    send_and_flush()

    assert answers == [True] * 4
    assert len(receiver.points("m", at_least=4)) == 4


def test_a_runs_point_that_the_worker_does_not_take_from_a_child_that_ends_is_counted(
    receiver: Receiver,
) -> None:
    app = make_app(influx_databases={"main": receiver.url}, influx_shutdown_timeout=0.2)
    influx = celery_influx.install(app)
    influx.start_worker("worker@host", "prefork")
    assert influx._worker
    relay = influx._worker.relay
    assert relay

    def run_and_end() -> None:
        current_process().index = 0
        run = make_run(influx, "id", (("t", "q", None), 0, None, None, None), time.time_ns())
        influx.start_run(run, goes_back=False)
        relay.PATIENCE = 0.0
        while relay.put(0, bytes(4), SYNC):
            pass
        influx.end_run(run, "SUCCESS", None, 1, 1)
        influx.leave_pool()

    assert exit_code(fork(run_and_end)) == 0
    influx.start()
    assert influx.close(5)

    # The worker knows of no end but the child's.
    (point,) = receiver.points("celery_task", at_least=1)
    assert point.tags
    assert point.tags["exception"] == "WorkerLostError"
    found = influx.stats()["main"]
    assert (found["points"], found["sent"], found["dropped"], found["queued"]) == (2, 1, 1, 0)
