"""timed: what it writes, and that nobody but the clock notices it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery, Task, shared_task

import celery_influx
from celery_influx import timing
from celery_influx.plugin import Influx
from celery_influx.point import Point
from celery_influx.report import Report
from tests.conftest import Receiver


class Broken(Exception):
    """What the timed functions raise."""


@pytest.fixture
def app(receiver: Receiver) -> Iterator[Celery]:
    """An app with the plugin, which is Celery's current one."""
    app = Celery("app", broker="memory://", backend="cache+memory://")
    app.conf.influx_databases = {"main": receiver.url}
    celery_influx.install(app)
    app.set_default()
    app.set_current()
    yield app
    app.influx.close()
    app.close()


@pytest.fixture
def timers(app: Celery, receiver: Receiver) -> Callable[[int], list[Any]]:
    """The ``timed`` points so far, when so many have come, and no more than these."""

    def read(count: int) -> list[Any]:
        assert app.influx.flush()
        points = receiver.points("timed", at_least=count)
        assert len(points) == count
        for point in points:
            assert list(point.fields) == ["runtime"]
            assert type(point.fields["runtime"]) is float
        return points

    return read


def outcomes(points: list[Point]) -> list[tuple[Any, ...]]:
    """Timer, outcome and exception of each point."""
    return [
        (point.tags["timer"], point.tags["outcome"], point.tags.get("exception"))
        for point in points
        if point.tags
    ]


def test_bare_it_takes_the_functions_name(timers: Any) -> None:
    @celery_influx.timed
    def work(a: int, *, b: int = 2) -> int:
        """Adds."""
        time.sleep(0.02)
        return a + b

    assert work(1, b=5) == 6

    (point,) = timers(1)
    assert outcomes([point]) == [(f"{__name__}.{work.__qualname__}", "success", None)]
    assert 0.02 <= point.fields["runtime"] < 1


def test_with_name_tags_and_database(
    app: Celery, receiver: Receiver, other_receiver: Receiver
) -> None:
    app.conf.influx_databases = {"main": receiver.url, "second": other_receiver.url}

    @celery_influx.timed("resize", tags={"format": "png", "skip": None}, database="second")
    def work() -> None:
        pass

    work()

    assert app.influx["second"].flush()
    (point,) = other_receiver.points("timed", at_least=1)
    assert point.tags is not None
    assert (point.tags["timer"], point.tags["format"]) == ("resize", "png")
    assert "skip" not in point.tags
    assert receiver.points("timed") == []


def test_tags_of_the_user_do_not_replace_what_the_point_says(timers: Any) -> None:
    with celery_influx.timed("block", tags={"outcome": "none", "timer": "other"}):
        pass

    assert outcomes(timers(1)) == [("block", "success", None)]


def plain() -> None:
    """A docstring."""


async def coroutine() -> None:
    """A docstring."""


def generator() -> Iterator[int]:
    """A docstring."""
    yield 1


async def async_generator() -> AsyncIterator[int]:
    """A docstring."""
    yield 1


@pytest.mark.parametrize("function", [plain, coroutine, generator, async_generator])
def test_signature_docstring_and_kind_of_a_function_are_kept(
    function: Callable[..., Any], app: Celery
) -> None:
    wrapped = celery_influx.timed("t")(function)

    assert inspect.signature(wrapped) == inspect.signature(function)
    assert (wrapped.__doc__, wrapped.__name__) == (function.__doc__, function.__name__)
    for kind in (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ):
        assert kind(wrapped) == kind(function)


def test_an_exception_passes_through_untouched(timers: Any) -> None:
    error = Broken("this very one")

    @celery_influx.timed
    def work() -> None:
        raise error

    with pytest.raises(Broken) as raised:
        work()

    assert raised.value is error
    assert error.__cause__ is error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].line == "raise error"
    assert outcomes(timers(1))[0][1:] == ("error", "Broken")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, StopIteration])
def test_whatever_is_raised_is_an_error(fault: type[BaseException], timers: Any) -> None:
    with pytest.raises(fault), celery_influx.timed("t"):
        raise fault

    assert outcomes(timers(1)) == [("t", "error", fault.__name__)]


def test_a_broken_point_hides_no_exception_of_the_users(app: Celery) -> None:
    app.conf.influx_strict = True
    error = Broken("the user's")

    with pytest.raises(Broken) as raised, celery_influx.timed("t", tags={"time": "refused"}):
        raise error
    with pytest.raises(Broken) as unknown, celery_influx.timed("t", database="unknown"):
        raise error

    assert raised.value is unknown.value is error
    with pytest.raises(celery_influx.PointError), celery_influx.timed("t", tags={"time": "x"}):
        pass


@pytest.mark.alone
def test_a_coroutine_is_timed_from_start_to_end(timers: Any) -> None:
    @celery_influx.timed("work")
    async def work(seconds: float) -> float:
        await asyncio.sleep(seconds)
        if seconds > 0.1:
            raise Broken
        return seconds

    async def main() -> list[Any]:
        return await asyncio.gather(work(0.15), work(0.03), work(0.06), return_exceptions=True)

    results = asyncio.run(main())

    assert results[1:] == [0.03, 0.06]
    points = timers(3)
    assert outcomes(points) == [
        ("work", "success", None),
        ("work", "success", None),
        ("work", "error", "Broken"),
    ]
    runtimes = [point.fields["runtime"] for point in points]
    assert runtimes == pytest.approx([0.03, 0.06, 0.15], abs=0.03)


def test_a_generator_gives_sends_throws_and_returns_as_before(timers: Any) -> None:
    closed = []

    @celery_influx.timed("work")
    def work() -> Iterator[Any]:
        try:
            got = yield "first"
            try:
                yield got
            except Broken:
                yield "caught"
            return "the end"
        finally:
            closed.append(1)

    running: Any = work()
    assert not closed
    assert next(running) == "first"
    assert running.send("sent") == "sent"
    assert running.throw(Broken()) == "caught"
    with pytest.raises(StopIteration) as end:
        next(running)
    assert end.value.value == "the end"
    early: Any = work()
    next(early)
    early.close()
    failing: Any = work()
    next(failing)
    with pytest.raises(KeyError):
        failing.throw(KeyError("x"))
    work()  # never begun: no call, so no point

    assert len(closed) == 3
    assert outcomes(timers(3)) == [
        ("work", "success", None),
        ("work", "success", None),
        ("work", "error", "KeyError"),
    ]


def test_a_generator_may_be_ended_by_another_thread(timers: Any) -> None:
    @celery_influx.timed("work")
    def work() -> Iterator[int]:
        yield 1
        yield 2

    running = work()
    assert next(running) == 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, running).result() == [2]

    assert outcomes(timers(1)) == [("work", "success", None)]


def test_an_async_generator_gives_sends_throws_and_closes_as_before(timers: Any) -> None:
    closed = []

    @celery_influx.timed("work")
    async def work() -> Any:
        try:
            got = yield "first"
            try:
                yield got
            except Broken:
                yield "caught"
        finally:
            await asyncio.sleep(0)
            closed.append(1)

    async def main() -> None:
        running: Any = work()
        assert await running.asend(None) == "first"
        assert await running.asend("sent") == "sent"
        assert await running.athrow(Broken()) == "caught"
        with pytest.raises(StopAsyncIteration):
            await running.asend(None)
        early: Any = work()
        await early.asend(None)
        await early.aclose()
        failing: Any = work()
        await failing.asend(None)
        error = KeyError("x")
        with pytest.raises(KeyError) as raised:
            await failing.athrow(error)
        assert raised.value is error
        assert [item async for item in work()] == ["first", None]

    asyncio.run(main())

    assert len(closed) == 4
    assert outcomes(timers(4)) == [
        ("work", "success", None),
        ("work", "success", None),
        ("work", "error", "KeyError"),
        ("work", "success", None),
    ]


def test_timers_may_be_nested_recursive_and_used_again(timers: Any) -> None:
    timer = celery_influx.timed("same")

    @celery_influx.timed("recursive")
    def count_down(number: int) -> None:
        time.sleep(0.01)
        if number:
            count_down(number - 1)

    with timer:
        time.sleep(0.01)
        with timer:
            time.sleep(0.02)
    with timer:
        pass
    count_down(2)

    points = timers(6)
    inner, outer, again, *recursive = [point.fields["runtime"] for point in points]
    assert again < 0.02 <= inner < outer
    assert outer >= 0.03
    assert recursive == sorted(recursive)
    assert recursive[2] >= 0.03


@pytest.mark.alone
def test_one_timer_serves_many_threads_at_once(timers: Any) -> None:
    timer = celery_influx.timed("same")
    barrier = threading.Barrier(4)

    def run(seconds: float) -> None:
        barrier.wait()
        with timer:
            time.sleep(seconds)

    threads = [threading.Thread(target=run, args=(0.04 * n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    runtimes = [point.fields["runtime"] for point in timers(4)]
    assert runtimes == pytest.approx([0.04, 0.08, 0.12, 0.16], abs=0.03)
    assert not timer._starts


def test_the_plugins_own_timed_needs_no_current_app(
    receiver: Receiver, other_receiver: Receiver, app: Celery
) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.influx_databases = {"main": other_receiver.url}
    celery_influx.install(other)

    @other.influx.timed("decorated")
    def work() -> None:
        with other.influx.timed("block", tags={"a": 1}):
            pass

    work()

    assert other.influx.flush()
    assert outcomes(other_receiver.points("timed", at_least=2)) == [
        ("block", "success", None),
        ("decorated", "success", None),
    ]
    assert receiver.points("timed") == []


def test_inside_a_task_the_tasks_app_is_used_whatever_the_current_app_is(
    app: Celery, receiver: Receiver, other_receiver: Receiver
) -> None:
    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.influx_databases = {"main": other_receiver.url}
    celery_influx.install(other)

    @other.task(name="work", shared=False)
    def work() -> str:
        with celery_influx.timed("inside"):
            return "done"

    assert work.apply().get() == "done"
    assert work() == "done"

    assert other.influx.flush()
    assert len(other_receiver.points("timed", at_least=2)) == 2
    assert receiver.points("timed") == []


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("finalized", [False, True])
def test_above_and_below_a_task(bind: bool, finalized: bool, app: Celery, timers: Any) -> None:
    if finalized:
        app.finalize()

    def body(*args: int) -> int:
        """Adds."""
        numbers = args[1:] if bind else args
        if bind:
            assert isinstance(args[0], Task)
        return sum(numbers)

    suffix = f"{bind}-{finalized}"

    @celery_influx.timed
    @app.task(name=f"above-{suffix}", bind=bind, shared=False)
    @functools.wraps(body)
    def above(*args: int) -> int:
        return body(*args)

    @app.task(name=f"below-{suffix}", bind=bind, shared=False)
    @celery_influx.timed("below")
    @functools.wraps(body)
    def below(*args: int) -> int:
        return body(*args)

    assert above.apply(args=(1, 2)).get() == 3
    assert above(3, 4) == 7
    assert below.apply(args=(1, 2)).get() == 3
    assert app.tasks[above.name].__doc__ == "Adds."

    assert [timer for timer, _, _ in outcomes(timers(3))] == [
        f"above-{suffix}",
        f"above-{suffix}",
        "below",
    ]


def test_below_a_shared_task_it_finds_the_app_by_itself(app: Celery, timers: Any) -> None:
    @shared_task(name="shared-below")
    @celery_influx.timed("shared")
    def work() -> int:
        return 5

    assert work.apply().get() == 5
    assert work() == 5

    assert outcomes(timers(2)) == [("shared", "success", None)] * 2


def test_what_is_called_like_a_function_may_be_timed(timers: Any) -> None:
    class Callable_:
        def __call__(self, number: int) -> int:
            return number + 1

    assert celery_influx.timed(functools.partial(pow, 2))(3) == 8
    assert celery_influx.timed(Callable_())(3) == 4
    assert celery_influx.timed("named")(len)([1]) == 1

    names = [timer for timer, _, _ in outcomes(timers(3))]
    assert names[0] == "functools.partial"
    assert names[1].endswith("Callable_")
    assert names[2] == "named"


def test_methods_are_timed_with_their_object(timers: Any) -> None:
    class Shop:
        @celery_influx.timed("method")
        def price(self) -> int:
            return 5

        @staticmethod
        @celery_influx.timed("static")
        def tax() -> int:
            return 19

        @classmethod
        @celery_influx.timed("class")
        def name(cls) -> str:
            return cls.__name__

    assert (Shop().price(), Shop().tax(), Shop.name()) == (5, 19, "Shop")

    assert [timer for timer, _, _ in outcomes(timers(3))] == ["method", "static", "class"]


@shared_task(name="shared-where-no-plugin-is")
@celery_influx.timed("shared")
def timed_shared(number: int) -> int:
    """A timer below a shared task."""
    return number


def _time_a_block() -> None:
    with celery_influx.timed("t"):
        pass


def _run_a_shared_task() -> None:
    assert timed_shared.apply(args=(3,)).get() == 3


def _call_a_shared_task() -> None:
    assert timed_shared(4) == 4


@pytest.mark.parametrize(
    ("use", "whose"),
    [
        (_time_a_block, "Celery's current"),
        (_run_a_shared_task, "the running task's"),
        (_call_a_shared_task, "the running task's"),
    ],
)
def test_where_the_current_app_has_no_plugin_one_warning_says_so(
    use: Callable[[], None],
    whose: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = Celery("lonely", broker="memory://", backend="cache+memory://")
    without.set_default()
    without.set_current()
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(timing, "_report", Report(logging.getLogger("celery_influx.timing")))

    for _ in range(3):
        use()

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"timed: {whose} app 'lonely' has no celery_influx plugin, so no point is "
        "written; call celery_influx.install(app), or use app.influx.timed(...)"
    )


def test_an_app_attribute_of_the_same_name_is_no_plugin(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("theirs", broker="memory://")
    app.influx = object()
    app.set_current()
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(timing, "_report", Report(logging.getLogger("celery_influx.timing")))

    with celery_influx.timed("t"):
        pass

    assert "has no celery_influx plugin" in caplog.text
    assert not isinstance(app.influx, Influx)
