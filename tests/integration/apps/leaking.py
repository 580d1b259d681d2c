"""Tasks that end in every cheap way, and what the plugin keeps of them, asked of each process."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
import time
import types
import weakref
from collections import Counter, deque
from typing import Any

from celery import Task, signals
from celery.exceptions import Ignore, Reject
from celery.worker.control import inspect_command

import celery_influx
from tests.integration.apps.base import make_app

WITH_PLUGIN = os.environ.get("PLUGIN", "yes") == "yes"

app = make_app("leaking", worker_prefetch_multiplier=64, result_expires=10)
if WITH_PLUGIN:
    celery_influx.install(app)


@signals.worker_process_init.connect(weak=False)
def _freeze(**_: Any) -> None:
    """Make a collection cheap: failed tasks leave cycles behind, with or without the plugin.

    Left to Python, 100 MiB of them gather in a child; in front of those nobody sees a leak.
    """
    gc.collect()
    gc.freeze()


class Broken(Exception):
    """What tasks here raise."""


def _note(number: int) -> None:
    """A point with tags of a few values, and a timed block."""
    if number % 10 == 0:
        gc.collect()
    if WITH_PLUGIN:
        tags = {"shop": f"shop {number % 50}", "even": number % 2 == 0}
        fields = {"number": number, "half": number / 2, "text": f"text {number}"}
        with app.influx.timed("block", tags={"shop": number % 5}):
            app.influx.send_data({"measurement": "custom", "tags": tags, "fields": fields})


@app.task(name="leaking.succeed", ignore_result=True)
def succeed(number: int) -> int:
    """End well, and keep no result."""
    _note(number)
    return number


@app.task(name="leaking.store")
def store(number: int) -> int:
    """End well, with a result."""
    _note(number)
    return number


@app.task(name="leaking.fail", ignore_result=True)
def fail(number: int) -> None:
    """Raise."""
    _note(number)
    raise Broken(number)


@app.task(name="leaking.retry", bind=True, ignore_result=True, max_retries=1)
def retry(self: Task, number: int) -> None:
    """Succeed at the second run."""
    _note(number)
    if not self.request.retries:
        raise self.retry(countdown=0, exc=Broken(number))


@app.task(name="leaking.ignore", ignore_result=True)
def ignore(number: int) -> None:
    """End without a result."""
    _note(number)
    raise Ignore


@app.task(name="leaking.reject", acks_late=True, ignore_result=True)
def reject(number: int) -> None:
    """Refuse the message."""
    _note(number)
    raise Reject(number, requeue=False)


# -- what is kept --------------------------------------------------------------------------------


#: Whose objects are looked into: the plugin's, and those of the libraries that it alone uses.
OWNERS = ("celery_influx", "requests", "urllib3", "http.cookiejar")
#: Filled by the test of the test.
_leak: dict[int, int] = {}
if os.environ.get("LEAK") and WITH_PLUGIN:
    # Into a new attribute of the plugin's, an entry with each point.
    app.influx._leak = _leak
    _send = app.influx.send_data

    def _send_and_keep(point: Any, database: str | None = None) -> None:
        _leak[len(_leak)] = time.time_ns()
        _send(point, database)

    app.influx.send_data = _send_and_keep


def kept() -> dict[str, int]:
    """Lengths of all collections that the plugin's modules and objects hold, by where they are.

    And how many objects of its classes there are; those that nothing in it leads to, too.
    """
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "celery_influx":
            waiting.extend((f"{name}.{key}", value) for key, value in vars(module).items())
    if WITH_PLUGIN:
        waiting.append(("app.influx", app.influx))
    while waiting:
        where, found = waiting.popleft()
        if id(found) in seen or isinstance(found, (str, bytes, int, float, types.ModuleType)):
            continue
        seen.add(id(found))
        waiting.extend(_inside(where, found, sizes))
    gc.collect()
    for found in gc.get_objects():
        kind = type(found)
        if str(kind.__module__).partition(".")[0] == "celery_influx":
            sizes[f"objects of {kind.__qualname__}"] += 1
    sizes["all objects"] = len(gc.get_objects())
    return dict(sizes)


def _inside(where: str, found: Any, sizes: Counter[str]) -> list[tuple[str, Any]]:
    """What ``found`` leads to; and note its length, where it has one that can grow."""
    if isinstance(found, dict):
        sizes[where] += len(found)
        held = itertools.chain(list(found.keys()), list(found.values()))
        return [(f"{where}[]", each) for each in held]
    if isinstance(found, (list, set, deque, weakref.WeakSet, bytearray)):
        sizes[where] += len(found)
        return [] if isinstance(found, bytearray) else [(f"{where}[]", each) for each in found]
    if isinstance(found, (tuple, frozenset)):
        return [(f"{where}[]", each) for each in found]
    if isinstance(found, functools.partial):
        return [(where, found.func), (where, found.args), (where, found.keywords)]
    if isinstance(found, types.MethodType):
        return [(where, found.__func__), (where, found.__self__)]
    if isinstance(found, types.CellType):
        try:
            return [(where, found.cell_contents)]
        except ValueError:
            return []
    kind = found if isinstance(found, type) else type(found)
    if isinstance(found, types.FunctionType) or hasattr(found, "cache_info"):
        if hasattr(found, "cache_info"):
            sizes[f"cache of {where}"] += found.cache_info().currsize
        if not str(found.__module__).startswith(OWNERS):
            return []
        inner = getattr(found, "__wrapped__", found)
        name = f"{inner.__qualname__}()"
        cells = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
        more = [(f"{name}.{key}", value) for key, value in vars(inner).items()]
        return [*((f"{name}.{variable}", cell) for variable, cell in cells), *more]
    if isinstance(found, types.BuiltinFunctionType) and not isinstance(
        found.__self__, types.ModuleType
    ):
        return [(where, found.__self__)]
    if not str(kind.__module__).startswith(OWNERS):
        return []
    name = kind.__qualname__
    if kind.__module__ == "celery_influx._speedups":
        return [(name, held) for held in gc.get_referents(found) if not isinstance(held, type)]
    held = list(getattr(found, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            held += [(slot, getattr(found, slot))] if hasattr(found, slot) else []
    return [(f"{name}.{key}", value) for key, value in held]


@app.task(name="leaking.look")
def look(seconds: float) -> tuple[int, dict[str, int]]:
    """What this pool child keeps; it is busy for so long, that the others get their turn."""
    time.sleep(seconds)
    return os.getpid(), kept()


@inspect_command()
def influx_kept(state: Any) -> dict[str, int]:
    """What the worker itself keeps."""
    return kept()
