"""What the extension does done by Python, in a process that has it; for benchmarks, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery_influx import database, line_protocol, ordinary, plugin, relay, signals
from celery_influx.buffer import Buffer
from celery_influx.stamps import python_stamps
from celery_influx.task_points import run_line
from celery_influx.under_way import Run

_PARTS = {
    (database, "extension"): None,
    (line_protocol, "extension"): None,
    (relay, "extension"): None,
    (database, "make_buffer"): Buffer,
    (database, "make_stamps"): python_stamps,
    (plugin, "make_stamps"): python_stamps,
    (plugin, "quick_run_line"): run_line,
    (ordinary, "quick_run_line"): run_line,
    (signals, "make_run"): Run,
    (signals, "quickest"): ordinary,
    (signals, "on_task_end"): ordinary.task_end(
        signals._runs, signals._on_end, signals._on_end_again, signals._ended.append
    ),
}


@contextmanager
def python_only() -> Iterator[None]:
    """What is opened within does without the extension, for as long as it is open."""
    before = {(module, name): getattr(module, name) for module, name in _PARTS}
    for (module, name), value in _PARTS.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
