"""A run's start and end at once, by the extension or without it: the same as step by step."""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import pytest
from billiard.process import current_process
from celery import Celery, Task
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

import celery_influx
from celery_influx.plugin import Influx
from celery_influx.point import Point
from celery_influx.signals import HEADER, _runs, on_task_end
from celery_influx.speedups import extension
from tests.conftest import Receiver
from tests.python_only import python_only
from tests.test_relay import exit_code, fork
from tests.test_soft_limits import OURS
from tests.test_under_way import SAID

IN_C = pytest.mark.skipif(not extension, reason="the extension's own")

#: In the worker itself, as with threads, or in a child of its pool.
WHERE = pytest.mark.parametrize("in_child", [False, True], ids=["worker", "pool child"])


def ordinary(**said: Any) -> dict[str, Any]:
    """A message; ``...`` stands for what it does not say."""
    stamp = time.time_ns()
    all_said = {
        "id": "an id",
        "hostname": "worker@host",
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "retries": 0,
        HEADER: f"1;{stamp};{stamp}",
        **said,
    }
    return {name: value for name, value in all_said.items() if value is not ...}


class Process:
    """A worker, or a child of its pool, that runs messages as they come."""

    def __init__(self, receiver: Receiver, *, in_child: bool) -> None:
        self.app = Celery("app", broker="memory://", set_as_current=False)
        self.app.conf.influx_databases = {"main": receiver.url}
        self.app.conf.task_ignore_result = True
        self.influx: Influx = celery_influx.install(self.app)
        self._in_child = in_child

        @self.app.task(name="t", bind=True, shared=False)
        def task(task: Task[Any, Any], how: BaseException | str = "") -> str:
            if isinstance(how, BaseException):
                raise how
            if how == "retry":
                task.retry(countdown=1)
            return how

        self.app.finalize()
        self.task = self.app.tasks["t"]
        self.trace = build_tracer("t", self.task, app=self.app)
        if in_child:
            self.influx.start_worker("worker@host", "prefork")

    def do(self, work: Callable[[], object]) -> None:
        """Do it there, and write all points."""

        def in_pool() -> None:
            current_process().index = 0
            work()
            self.influx.leave_pool()

        if self._in_child:
            pid = fork(in_pool)
            self.influx.start()
            assert exit_code(pid) == 0
        else:
            self.influx.start()
            work()
        assert self.influx.close(5)

    def run(self, how: BaseException | str = "", **said: Any) -> Any:
        """Run one message."""
        message = ordinary(**said)
        return self.trace(message.get("id", "an id"), (how,), {}, message)


ENDS = ["", "retry", KeyError("k"), Ignore(), Reject(), SoftTimeLimitExceeded()]
MESSAGES: list[dict[str, Any]] = [
    {"id": None},
    {"id": "é" * 2_000},
    {"id": ...},
    {"delivery_info": {}, "eta": 1},
    *({name: value} for name, values in SAID.items() for value in values if value != 2**70),
]
#: How runs end, and what their messages say.
RUNS: list[tuple[Any, dict[str, Any]]] = [
    *itertools.product(ENDS, [{}, {"retries": 1}, {"hostname": None}]),
    *(("", message) for message in MESSAGES),
]


@WHERE
def test_whatever_a_message_says_and_a_run_comes_to_the_point_is_the_same(
    in_child: bool, receiver: Receiver, other_receiver: Receiver
) -> None:
    differ(receiver, other_receiver, in_child=in_child)


def differ(receiver: Receiver, other_receiver: Receiver, *, in_child: bool) -> int:
    """Run them all at once, and step by step in Python; how many, or AssertionError."""
    found = []
    for each, slowly in ((receiver, False), (other_receiver, True)):
        with step_by_step() if slowly else nullcontext():
            process = Process(each, in_child=in_child)

            def work(process: Process = process) -> None:
                for how, said in RUNS:
                    process.run(how, **said)

            process.do(work)
            found.append(each.points("celery_task", at_least=len(RUNS)))

    quick, slow = ([said_by(point) for point in points] for points in found)
    assert quick == slow
    assert len(quick) == len(RUNS)
    assert len(set(map(str, quick))) > 12
    return len(RUNS)


@contextmanager
def step_by_step() -> Iterator[None]:
    """No run is an ordinary one; nor does the extension do anything."""
    with python_only(), pytest.MonkeyPatch.context() as patch:
        never = property(lambda _: None, lambda *_: None)
        patch.setattr(Influx, "quick", never, raising=False)
        yield


def said_by(point: Point) -> tuple[Any, ...]:
    """All of a point but its times."""
    return point.tags, point.fields["retries"], sorted(point.fields)


#: Functions of ours that an ordinary run takes: without the extension these, and of each part one.
TAKEN = {"on_task_init", "on_task_end"}
NOT_TAKEN = {"_begin", "_on_end", "_run_of", "_published", "facts_of", "end_run", "_line_of"}


@WHERE
def test_an_ordinary_run_takes_as_few_functions_as_can_be(
    in_child: bool, receiver: Receiver
) -> None:
    process = Process(receiver, in_child=in_child)
    seen: list[str] = []

    def profile(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen.append(frame.f_code.co_name)

    def work() -> None:
        process.run()
        for _ in range(3):
            sys.setprofile(profile)
            try:
                process.run()
            finally:
                sys.setprofile(None)
        if extension:
            assert not seen
        else:
            assert set(seen) >= TAKEN
            assert not NOT_TAKEN.intersection(seen)
            assert len(seen) <= 3 * (22 if in_child else 12)
        sys.setprofile(profile)
        try:
            process.run(retries=1)
        finally:
            sys.setprofile(None)
        assert "_begin" in seen

    process.do(work)
    assert len(receiver.points("celery_task", at_least=5)) == 5


@WHERE
def test_nothing_of_a_run_is_kept(in_child: bool, receiver: Receiver) -> None:
    process = Process(receiver, in_child=in_child)
    queue, task_id = "queue name", "task id"

    def runs() -> None:
        for _ in range(1_000):
            process.run(id=task_id, delivery_info={"exchange": "", "routing_key": queue})

    def work() -> None:
        runs()  # the last ids are kept
        runs()
        database = process.influx.default
        things = {
            "task": process.task,
            "influx": process.influx,
            "quick": process.influx.quick,
            "database": database,
            "send": database._accept,
            "heads": database.heads,
            "queue": queue,
            "id": task_id,
        }
        before = {name: sys.getrefcount(thing) for name, thing in things.items()}
        runs()
        assert {name: sys.getrefcount(thing) for name, thing in things.items()} == before

    process.do(work)
    assert len(receiver.points("celery_task", at_least=3_000)) == 3_000


@pytest.mark.parametrize("name", ["influx", "acks_late", "name"])
@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ValueError, ("SUCCESS", None)),
        (SoftTimeLimitExceeded, ("FAILURE", "SoftTimeLimitExceeded")),
    ],
)
def test_what_a_look_at_a_task_raises_is_the_tasks_own_only_if_its_time_is_up(
    name: str,
    error: type[Exception],
    end: tuple[str, str | None],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time may be up wherever Python code runs, such as a user's property."""
    process = Process(receiver, in_child=True)
    raised: list[type[Exception]] = []

    def look(_: object) -> Any:
        if not raised:
            raised.append(error)
            raise error
        return "t" if name == "name" else True

    def work() -> None:
        process.run()
        monkeypatch.delattr(type(process.task), name, raising=False)
        monkeypatch.setattr(type(process.task), name, property(look), raising=False)
        process.run()
        process.run()
        assert raised

    process.do(work)
    points = receiver.points("celery_task", at_least=3)
    ends = [(point.tags["state"], point.tags.get("exception")) for point in points if point.tags]
    assert ends == [("SUCCESS", None), end, ("SUCCESS", None)]


def test_a_hook_above_ours_may_name_what_it_gives(receiver: Receiver) -> None:
    process = Process(receiver, in_child=False)
    ours = process.app.loader.on_task_init

    def above(task_id: str, task: Any) -> None:
        ours(task_id=task_id, task=task)

    process.app.loader.on_task_init = above  # type: ignore[method-assign]
    process.trace = build_tracer("t", process.task, app=process.app)

    def work() -> None:
        assert process.run("it went through").retval == "it went through"
        process.run()

    process.do(work)
    points = receiver.points("celery_task", at_least=2)
    assert [point.tags["state"] for point in points if point.tags] == ["SUCCESS", "SUCCESS"]


@IN_C
def test_what_ends_the_process_is_let_out_at_a_runs_end(receiver: Receiver) -> None:
    """Celery swallows of what a receiver raises only an ``Exception``."""
    assert extension
    process = Process(receiver, in_child=False)
    process.influx.start()

    def raises(error: BaseException) -> Callable[..., None]:
        def call(**_: object) -> None:
            raise error

        return call

    for first, second, expected in (
        (SoftTimeLimitExceeded(), SystemExit(), SystemExit),
        (SoftTimeLimitExceeded(), KeyError(), SoftTimeLimitExceeded),
        (SystemExit(), KeyError(), SystemExit),
    ):
        end = extension.task_end({}, raises(first), raises(second), len)
        with pytest.raises(expected):
            end(task=process.task, task_id="x", state="SUCCESS")

    class Looked(type(process.task)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name == "request_stack" and failures:
                raise failures.pop()
            return super().__getattribute__(name)

    process.task.__class__ = Looked
    done: list[dict[str, Any]] = []
    end = extension.task_end({}, lambda **named: done.append(named), raises(KeyError()), len)
    failures: list[BaseException] = [SystemExit()]
    with pytest.raises(SystemExit):
        end(task=process.task)
    failures.append(ValueError())
    end(task=process.task)
    assert done == [{"task": process.task}] * 2


@IN_C
def test_a_finaliser_may_change_a_message_while_it_is_read(receiver: Receiver) -> None:
    """Before Python 3.12 memory is collected wherever some is asked for."""
    process = Process(receiver, in_child=False)

    class Finaliser:
        def __init__(self, info: dict[str, Any]) -> None:
            self.info = info
            self.cycle = self

        def __del__(self) -> None:
            self.info["routing_key"] = f"another than {id(self)}"

    process.influx.start()
    process.run()
    hook, stack = process.app.loader.on_task_init, process.task.request_stack
    queues = []
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    gc.enable()
    try:
        for number in range(2_000):
            info = {"exchange": "", "routing_key": f"queue {number}"}
            request = Context(ordinary(delivery_info=info))
            stack.push(request)
            Finaliser(info)
            hook("an id", process.task)
            queues.append(_runs.pop(id(request)).facts[0][1])
            stack.pop()
    finally:
        gc.disable()
        gc.set_threshold(*thresholds)
    assert all(queue.startswith(("queue ", "another than ")) for queue in queues)


@IN_C
def test_a_key_of_a_message_may_change_it_when_it_is_compared(receiver: Receiver) -> None:
    """Its class may be anybody's, where tasks are called in place with headers of their own."""
    process = Process(receiver, in_child=False)
    messages: list[dict[str, Any]] = []
    others: list[dict[str, str]] = []

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            if messages:
                del messages.pop()["delivery_info"]
                others.extend({"exchange": "", "routing_key": "another's"} for _ in range(100))
            return str.__eq__(self, other)

    process.influx.start()
    process.run()
    hook, stack = process.app.loader.on_task_init, process.task.request_stack
    request = Context({**ordinary(), Key("eta"): None})
    messages.append(request.__dict__)
    stack.push(request)
    hook("an id", process.task)
    stack.pop()

    assert len(others) == 100
    assert _runs.pop(id(request)).facts[0][1] == "celery"


def test_no_run_is_written_while_the_plugin_is_not_the_apps(receiver: Receiver) -> None:
    process = Process(receiver, in_child=False)
    influx = process.influx

    def work() -> None:
        process.run()
        process.app.influx = None
        process.run()
        process.app.influx = influx
        process.run()

    process.do(work)
    assert len(receiver.points("celery_task", at_least=2)) == 2


@IN_C
@pytest.mark.parametrize("given", [(), ({},), ([], 1, 2, 3), ({}, 1, 2, 3, 4, 5, 6)])
def test_it_wants_what_it_wants(given: tuple[Any, ...]) -> None:
    assert extension
    for make in (extension.task_init, extension.task_end):
        with pytest.raises(TypeError, match="expected a dict, and"):
            make(*given)


def test_what_is_no_end_of_a_task_is_left_to_python() -> None:
    with pytest.raises(TypeError, match="task"):
        on_task_end()


if __name__ == "__main__":  # as test_speedups.py does, under the sanitizers
    for child in (False, True):
        print(differ(Receiver(), Receiver(), in_child=child), "runs, no difference")
