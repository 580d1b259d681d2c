"""timed: one point per call of a function, or per run of a block, with its runtime and outcome."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from celery import Task, current_app, current_task
from celery.local import PromiseProxy, Proxy

from celery_influx.errors import InfluxError
from celery_influx.measurements import TIMED
from celery_influx.point import Point
from celery_influx.report import Report

if TYPE_CHECKING:
    from celery_influx.plugin import Influx

_report: Report


def _begin_anew() -> None:
    """At import, and in a forked child: a lock of the parent's may be held for ever."""
    global _report  # noqa: PLW0603 - the one thing this module keeps
    _report = Report(logging.getLogger(__name__))


_begin_anew()
# By itself: `timed` is used, and warns, where no app has the plugin.
os.register_at_fork(after_in_child=_begin_anew)

F = TypeVar("F", bound=Callable[..., Any])


@overload
def timed(name: F) -> F: ...


@overload
def timed(
    name: str | None = None,
    *,
    tags: Mapping[str, Any] | None = None,
    database: str | None = None,
    influx: Influx | None = None,
) -> Timer: ...


def timed(
    name: Any = None,
    *,
    tags: Mapping[str, Any] | None = None,
    database: str | None = None,
    influx: Influx | None = None,
) -> Any:
    """Write a ``timed`` point for each call of a function, or for each run of a block.

    Use it bare or with arguments, above or below ``@app.task``, on plain, async and generator
    functions (one point from the first item to the end), and as a context manager::

        @timed
        def resize(path): ...

        @timed("resize", tags={"format": "png"}, database="metrics")
        def resize(path): ...

        with timed("decode"):
            ...

    The point has the field ``runtime`` (seconds) and the tags ``timer``, ``outcome`` (success or
    error) and, on error, ``exception`` (the class's name). An exception passes through untouched.

    Args:
        name: The tag ``timer``; by default the function's module and qualified name.
        tags: More tags.
        database: Name from ``influx_databases``; default: ``influx_default_database``.
        influx: The plugin to use. Default: that of the running task's app, or else of Celery's
            current app; where that has none, a warning says so and no point is written.
    """
    if name is None or isinstance(name, str):
        return Timer(name, tags, database, influx)
    return Timer(None, tags, database, influx)(name)


class Timer:
    """What ``timed`` makes: a decorator, and a context manager.

    As a context manager it may be nested, reused, and used by several threads; coroutines that
    run side by side need one each, as ``with timed("name")`` makes it.
    """

    def __init__(
        self,
        name: str | None,
        tags: Mapping[str, Any] | None,
        database: str | None,
        influx: Influx | None,
    ) -> None:
        self._name = name
        self._tags = dict(tags or {})
        self._database = database
        self._influx = influx
        self._starts: dict[int, list[float]] = {}

    def __call__(self, function: F) -> F:
        """Wrap ``function``, or the body of a Celery task."""
        kind = type(function)
        if kind is PromiseProxy:
            # A task that its app has not made yet: wait for it, and do not force it.
            function.__then__(self._wrap_promised, function)  # type: ignore[attr-defined]
        elif kind is Proxy:
            raise TypeError(
                "@timed stands above @shared_task, which makes a task for each app only later; "
                "put @timed below it, next to the function"
            )
        elif isinstance(function, Task):
            self._wrap_task(function)
        elif callable(function):
            wrapped: F = self._wrap(function)
            return wrapped
        else:
            raise TypeError(
                f"timed got a value of type {kind.__name__}; expected a function, or a string as "
                "the timer's name"
            )
        return function

    def _wrap_task(self, task: Task[Any, Any]) -> None:
        task.run = self._wrap(task.run, task.name)  # type: ignore[method-assign]

    def _wrap_promised(self, promise: Any) -> None:
        self._wrap_task(promise._get_current_object())  # noqa: SLF001 - Celery's own way

    def _wrap(self, function: Callable[..., Any], default: str | None = None) -> Any:
        # Objects that can be called, partial() among them, have no name of their own.
        named = function if hasattr(function, "__qualname__") else type(function)
        name = self._name or default or f"{named.__module__}.{named.__qualname__}"
        run = functools.partial(Timer, name, self._tags, self._database, self._influx)

        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def asyncgen(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
                with run():
                    inner = function(*args, **kwargs)
                    try:
                        item = await inner.asend(None)
                        while True:
                            try:
                                sent = yield item
                            except GeneratorExit:
                                raise
                            except BaseException as error:  # noqa: BLE001 - it is passed on
                                item = await inner.athrow(error)
                            else:
                                item = await inner.asend(sent)
                    except StopAsyncIteration:
                        return
                    finally:
                        await inner.aclose()

            return asyncgen

        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                with run():
                    return (yield from function(*args, **kwargs))

            return generator

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def coroutine(*args: Any, **kwargs: Any) -> Any:
                with run():
                    return await function(*args, **kwargs)

            return coroutine

        @functools.wraps(function)
        def plain(*args: Any, **kwargs: Any) -> Any:
            with run():
                return function(*args, **kwargs)

        return plain

    def __enter__(self) -> Timer:
        """Start the clock."""
        self._starts.setdefault(threading.get_ident(), []).append(time.perf_counter())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the clock and write the point."""
        end = time.perf_counter()
        me = threading.get_ident()
        # A generator may be begun by one thread and ended by another.
        mine = me if me in self._starts else next(iter(self._starts))
        starts = self._starts[mine]
        runtime = end - starts.pop()
        if not starts:
            del self._starts[mine]
        # Closing a generator before its end is no error of anyone's.
        failed = kind if kind is not GeneratorExit else None
        tags = {
            **self._tags,
            "timer": self._name or "block",
            "outcome": "error" if failed else "success",
            "exception": failed.__name__ if failed else None,
        }
        influx = self._influx or current_influx()
        if influx is None:
            return
        try:
            influx.send_data(Point(TIMED.name, {"runtime": runtime}, tags), self._database)
        except InfluxError as failure:
            if error is None:
                raise
            # The block's own exception must not be replaced by ours.
            _report.warn("failed", "timed: %s", failure)

    def __repr__(self) -> str:
        return f"<Timer {self._name!r} tags={self._tags} database={self._database!r}>"


def current_influx() -> Influx | None:
    """The plugin of the running task's app, or else of Celery's current app; a warning if none."""
    app = current_task.app if current_task else current_app
    from celery_influx.plugin import find  # which imports this module

    found = find(app)
    if found is None:
        _report.warn(
            "no plugin",
            "timed: %s app %r has no celery_influx plugin, so no point is written; "
            "call celery_influx.install(app), or use app.influx.timed(...)",
            "the running task's" if current_task else "Celery's current",
            app.main,
        )
    return found
