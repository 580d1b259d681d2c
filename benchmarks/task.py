"""What a run of a task costs in its own process: Celery's tracer, with and without the plugin.

A hook at a run's start and a receiver at its end are what the plugin adds to each task of a worker;
its peers have receivers at both. Each variant runs the same no-op task through Celery's own tracer,
in one process, with its receivers connected only while it is measured; ours write the point into
the buffer of this process. Counted is the CPU time of the thread that runs the tasks.

And the same in a pool child, which writes to its worker's relay: there the worker's CPU is counted,
too.
"""

from __future__ import annotations

import os
import signal
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from billiard.process import current_process
from celery import Celery, signals
from celery.app.trace import build_tracer
from opentelemetry import trace as api
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider

import celery_influx.line_protocol
from benchmarks.sink import Sink
from benchmarks.table import Table, ratios, rotated, share, verdict
from celery_influx import signals as ours
from celery_influx.plugin import Influx
from tests.python_only import python_only

HOST = "celery@benchmark"


def run(rounds: int = 200, size: int = 400) -> None:
    """Measure and print; ``size`` tasks per variant and round."""
    sink = Sink()
    sink.drain()
    with ExitStack() as stack:
        variants = {
            "bare": (_app("bare"), _nothing),
            "bare, again": (_app("again"), _nothing),
            "two empty receivers": (_app("empty"), _empty),
            "celery_influx": (_plugged("c", sink.port, stack), _connected),
            "opentelemetry": (_app("opentelemetry"), _opentelemetry),
        }
        if celery_influx.line_protocol.implementation == "c":
            with python_only():
                variants["celery_influx, Python only"] = (
                    _plugged("python", sink.port, stack),
                    _connected_python,
                )
        child = _plugged("child", sink.port, stack, in_pool=True)
        pools = {
            "bare": (_app("bare child"), _nothing),
            "celery_influx": (child, _connected),
        }
        if celery_influx.line_protocol.implementation == "c":
            with python_only():
                app = _plugged("python child", sink.port, stack, in_pool=True)
            pools["celery_influx, Python only"] = (app, _connected_python_in_pool)
        children = {name: _PoolChild(*pool, child.influx) for name, pool in pools.items()}
        for child in children.values():
            stack.callback(child.stop)
        in_pools: dict[str, list[tuple[float, float]]] = {name: [] for name in pools}
        figures: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(rounds + 2):
            for name in rotated(list(variants), turn):
                app, connected = variants[name]
                with connected():
                    figures[name].append(_round(app, size))
                if hasattr(app, "influx"):
                    app.influx.flush(30)
            for name in rotated(list(pools), turn):
                in_pools[name].append(children[name].round(size))
    sink.stop()
    # The first ones warm up.
    table, receivers = _table({name: found[2:] for name, found in figures.items()})
    table.show()
    _pool_table({name: found[2:] for name, found in in_pools.items()}, receivers).show()


def _app(name: str) -> Celery:
    app = Celery(name, broker="memory://", set_as_current=False)
    app.conf.task_ignore_result = True
    app.task(name=f"{name}.noop", shared=False)(_noop)
    app.finalize()
    return app


def _noop() -> None:
    """What is measured."""


def _plugged(name: str, port: int, stack: ExitStack, *, in_pool: bool = False) -> Celery:
    app = _app(name)
    app.conf.influx_databases = {"metrics": f"udp://127.0.0.1:{port}"}
    influx = celery_influx.install(app)
    ours.shorten()
    signals.task_postrun.disconnect(dispatch_uid="celery_influx.on_task_end")
    if in_pool:
        influx.start_worker(HOST, "prefork")
    influx.start()
    stack.callback(influx.close)
    return app


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _connect(*pairs: tuple[Any, Callable[..., None]]) -> Iterator[None]:
    for sent, receiver in pairs:
        sent.connect(receiver, weak=False, dispatch_uid=f"celery_influx.{receiver.__name__}")
    ours._find_ours()
    yield
    for sent, receiver in pairs:
        sent.disconnect(dispatch_uid=f"celery_influx.{receiver.__name__}")


def _connected() -> Any:
    # What the plugin connects for all apps; at a run's start the app's own loader tells it.
    return _connect((signals.task_postrun, ours.on_task_end))


@contextmanager
def _connected_python() -> Iterator[None]:
    with python_only(), _connected():
        yield


@contextmanager
def _connected_python_in_pool() -> Iterator[None]:
    again = signals.task_postrun, ours._on_end_again
    with python_only(), _connect((signals.task_postrun, ours.on_task_end), again):
        yield


def _empty() -> Any:
    def nothing(**_: object) -> None:
        pass

    return _connect((signals.task_prerun, nothing), (signals.task_postrun, nothing))


@contextmanager
def _opentelemetry() -> Iterator[None]:
    CeleryInstrumentor().instrument(tracer_provider=PROVIDER)
    yield
    CeleryInstrumentor().uninstrument()


PROVIDER = TracerProvider()  # makes spans and exports none, which is cheaper than any use of it
api.set_tracer_provider(PROVIDER)


def _round(app: Celery, size: int) -> float:
    """µs of CPU of a task, by this thread."""
    (name,) = (name for name in app.tasks if name.endswith(".noop"))
    tracer = build_tracer(name, app.tasks[name], app=app, hostname=HOST)
    published = time.time_ns()
    request = {
        "hostname": HOST,
        "delivery_info": {"exchange": "", "routing_key": "celery", "redelivered": False},
        "retries": 0,
        "is_eager": False,
        "ignore_result": True,
        "celery_influx": f"1;{published};{published}",
    }
    requests = [{**request, "id": str(uuid.uuid4())} for _ in range(size)]
    before = time.thread_time()
    for each in requests:
        tracer(each["id"], (), {}, each)
    return (time.thread_time() - before) / size * 1e6


class _PoolChild:
    """A forked child that runs tasks by the round, as a pool's does: it lives through all of them.

    One of its own for each round would count what the first touch of its memory costs.
    """

    def __init__(self, app: Celery, connected: Callable[[], Any], idle: Influx) -> None:
        # A bare one waits for as long: what a round costs is no task's.
        self._influx = getattr(app, "influx", idle)
        self._orders_fd, self._order_fd = os.pipe()
        self._costs_fd, self._cost_fd = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                current_process().index = 0
                with connected():
                    while True:
                        (size,) = struct.unpack("I", os.read(self._orders_fd, 4))
                        os.write(self._cost_fd, struct.pack("d", _round(app, size)))
            finally:
                os._exit(1)

    def round(self, size: int) -> tuple[float, float]:
        """µs of CPU of a task, by the child and by its worker."""
        before = time.process_time()
        os.write(self._order_fd, struct.pack("I", size))
        (cost,) = struct.unpack("d", os.read(self._costs_fd, 8))
        self._influx.flush(30)
        return cost, (time.process_time() - before) / size * 1e6

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for fd in (self._orders_fd, self._order_fd, self._costs_fd, self._cost_fd):
            os.close(fd)


#: µs that two empty receivers cost where the bounds are from.
RECEIVERS = 5.6


def _pool_table(figures: dict[str, list[tuple[float, float]]], receivers: list[float]) -> Table:
    table = Table("`task`: CPU added to a run in a pool child", "µs", "ours / this")
    bare = figures.pop("bare")
    added: dict[str, list[float]] = {}
    for name, found in figures.items():
        child, worker = (
            [this[part] - that[part] for this, that in zip(found, bare, strict=True)]
            for part in range(2)
        )
        added[name] = [sum(both) for both in zip(child, worker, strict=True)]
        table.add(name, added[name], ratios(added["celery_influx"], added[name]))
        table.add(f"{name}: the worker's part", worker)
    table.notes = [
        note
        for name, bound in (("celery_influx", 11), ("celery_influx, Python only", 15))
        if name in added
        for note in (
            verdict(f"µs added by {name}, child and worker", added[name], bound),
            share("of two empty receivers", added[name], receivers, bound, RECEIVERS),
        )
    ]
    return table


def _table(figures: dict[str, list[float]]) -> tuple[Table, list[float]]:
    """And what two empty receivers cost in each round."""
    table = Table("`task`: CPU added to a run, its own thread", "µs", "ours / this")
    bare = figures.pop("bare")

    def added(found: list[float]) -> list[float]:
        return [this - that for this, that in zip(found, bare, strict=True)]

    mine = added(figures["celery_influx"])
    for name, found in figures.items():
        table.add(name, added(found), [] if "again" in name else ratios(mine, added(found)))
    receivers = added(figures["two empty receivers"])
    table.notes = [
        verdict("of opentelemetry's", ratios(mine, added(figures["opentelemetry"])), 1 / 6)
    ]
    for name, bound in (("celery_influx", 9), ("celery_influx, Python only", 13)):
        if name in figures:
            found = added(figures[name])
            table.notes.append(verdict(f"µs added by {name}", found, bound))
            table.notes.append(share("of two empty receivers", found, receivers, bound, RECEIVERS))
    return table, receivers
