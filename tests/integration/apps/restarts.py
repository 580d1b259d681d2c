"""One process in which a worker starts and stops many times: what it leaves behind.

Arguments: how many times, and the pool. With ``PLUGIN=no`` in the environment it has no plugin.
Prints JSON.
"""

from __future__ import annotations

import sys

# Before anything else is imported, as both libraries want it.
if sys.argv[2] == "gevent":
    from gevent import monkey

    monkey.patch_all()
elif sys.argv[2] == "eventlet":
    import eventlet

    eventlet.monkey_patch()

import contextlib
import gc
import json
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery.worker import state

import celery_influx
from tests.integration.apps.base import end_at_once, make_app

POOL = sys.argv[2]
IS_GREEN = POOL in ("gevent", "eventlet")
app = make_app(
    "restarts",
    worker_redirect_stdouts=False,
    broker_transport_options={"polling_interval": 0.01},
    worker_enable_remote_control=not IS_GREEN,  # which takes a second of theirs to stop
)
WITH_PLUGIN = os.environ.get("PLUGIN", "yes") == "yes"
if WITH_PLUGIN:
    celery_influx.install(app)
end_at_once()
WARM_UP = 20
OURS = "celery_influx"


@app.task(name="restarts.last", ignore_result=True)
def last() -> None:
    """Send a point, and have the worker stop when this has ended."""
    if WITH_PLUGIN:
        app.influx.send_data({"measurement": "custom", "fields": {"number": 1}})
    if POOL != "prefork":
        state.should_stop = 0
        for _ in range(2):  # Celery's loop waits 2 s for a message, and told to stop, for one more
            wake.delay()
    else:
        # When the worker knows of the task's end; its children wait for that, 1 s at most.
        threading.Timer(0.05, os.kill, (os.getppid(), signal.SIGTERM)).start()


@app.task(name="restarts.wake", ignore_result=True)
def wake() -> None:
    """Do nothing, perhaps in the next worker."""


def run_worker() -> None:
    """A whole worker, from its blueprint to its end."""
    state.should_stop = None
    last.delay()
    alone = {"without_mingle": True, "without_gossip": True, "without_heartbeat": True}
    quiet = {"loglevel": "ERROR", "quiet": True}
    worker = app.Worker(pool=POOL, concurrency=1, hostname="again@test", **quiet, **alone)
    try:
        worker.start()
    except SystemExit:
        pass
    if WITH_PLUGIN and IS_GREEN:
        app.influx.close()  # as at the exit, until which greenlets may run
    assert not WITH_PLUGIN or app.influx.stats()["main"]["queued"] == 0


def run_plugin() -> None:
    """What the worker's step does with the plugin for a pool of processes, or of greenlets."""
    app.influx.start_worker("again@test", POOL if IS_GREEN else "prefork")
    app.influx.start()
    app.influx.send_data({"measurement": "custom", "fields": {"number": 1}})
    assert app.influx.relayed(5)
    assert app.influx.close(5)


def left_behind() -> dict[str, Any]:
    """Processes, threads, files, objects and bytes of memory of ours that are there now."""
    gc.collect()
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(5)  # one that is just about to end is not left behind
    files = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            files.append(str(link.readlink()).partition(":")[0])
    tasks = Path("/proc/self/task").glob("*/children")
    found = {
        "children": [pid for task in tasks for pid in task.read_text().split()],
        "threads": sorted(t.name for t in threading.enumerate() if "celery_influx" in t.name),
        "all_threads": threading.active_count(),
        "files": sorted(files),
        # By type and not by isinstance, which would wake the proxies among them.
        "objects": sum(str(type(each).__module__).startswith(OURS) for each in gc.get_objects()),
    }
    if tracemalloc.is_tracing():
        statistics = tracemalloc.take_snapshot().statistics("filename")
        ours = f"{os.sep}{OURS}{os.sep}"
        found["bytes"] = sum(s.size for s in statistics if ours in s.traceback[0].filename)
    return found


def measure(run: Callable[[], None], times: int) -> list[dict[str, Any]]:
    """What is left behind after the first few runs, and after all."""
    for number in range(times):
        run()
        if number + 1 == WARM_UP:
            early = left_behind()
    return [early, left_behind()]


if __name__ == "__main__":
    times = int(sys.argv[1])
    result = {"worker": measure(run_worker, times)}
    if WITH_PLUGIN:
        tracemalloc.start()  # too slow for the whole of Celery
        result["plugin"] = measure(run_plugin, times)
    print(json.dumps(result))
