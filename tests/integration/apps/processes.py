"""Every kind of process that has no worker, or is none of its pool: as a script, or from tasks.

As a script: ``python -m tests.integration.apps.processes KIND``; one function for each kind.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from celery import signals

import celery_influx
from tests.integration.apps.base import end_at_once, make_app, store

app = make_app(
    "processes",
    beat_schedule={"tick": {"task": "processes.work", "schedule": 0.1, "args": [0.0]}},
    beat_max_loop_interval=0.1,
)
influx = celery_influx.install(app)
end_at_once()  # at a restart of the pool, too

#: Of each child that is no pool child; of the script itself, three times; of beat.
POINTS = 500
CHILDREN = 2


def send(measurement: str, points: int) -> None:
    """Send points that say who made them."""
    for number in range(points):
        influx.send_data(
            {"measurement": measurement, "tags": {"pid": os.getpid()}, "fields": {"number": number}}
        )


def child(_: object = None) -> int:
    """What a child does."""
    send("child", POINTS)
    return os.getpid()


def _run_children(method: str) -> list[int | None]:
    """Two children by ``multiprocessing``, to their end; their exit codes."""
    context = multiprocessing.get_context(method)
    children = [context.Process(target=child) for _ in range(CHILDREN)]
    for each in children:
        each.start()
    for each in children:
        each.join()
        # At each start multiprocessing looks after all children: another task's thread may have
        # been told of this one's end, and is about to note it.
        until = time.monotonic() + 5
        while each.exitcode is None and time.monotonic() < until:
            time.sleep(0.001)
    return [each.exitcode for each in children]


# -- a worker's tasks ------------------------------------------------------------------------------


@app.task(name="processes.work", ignore_result=True)
def work(seconds: float) -> None:
    """Send five points of one series, whichever the pool child is; count them."""
    for number in range(5):
        influx.send_data({"measurement": "work", "fields": {"number": number, "pid": os.getpid()}})
    time.sleep(seconds)
    with store().pipeline(transaction=False) as pipe:
        pipe.incrby("points", 5)
        pipe.incr("works")
        pipe.sadd("pids", os.getpid())
        pipe.execute()


@app.task(name="processes.work_side_by_side", ignore_result=True)
def work_side_by_side(children: int) -> None:
    """The same, in so many pool children at once: none ends before all have begun."""
    work(0.0)
    until = time.monotonic() + 25
    while store().scard("pids") < children and time.monotonic() < until:
        time.sleep(0.01)


@app.task(name="processes.start_children")
def start_children(method: str) -> list[int | None]:
    """Start children, with a line of this process's own before and after."""
    send("parent", 1)
    # The pool's children are daemons, which multiprocessing lets have none, and billiard's key
    # cannot be handed on; so people do this.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.current_process()._config["authkey"] = (  # type: ignore[attr-defined]
        multiprocessing.process.AuthenticationString(b"key")  # type: ignore[attr-defined]
    )
    codes = _run_children(method)
    send("parent", 1)
    return codes


@app.task(name="processes.start_program")
def start_program() -> tuple[int, str, str]:
    """Run this module as a program that inherits all that it can; what files it had."""
    send("parent", 1)
    command = [sys.executable, "-m", "tests.integration.apps.processes", "plain"]
    run = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=False)
    relay = influx._worker.relay if influx._worker else None
    pipe = f"pipe:[{relay._pipe[1]}]" if relay else "none"
    return run.returncode, run.stdout + run.stderr, pipe


# -- beat ------------------------------------------------------------------------------------------


@signals.beat_init.connect(weak=False)
def _send_from_beat(**_: object) -> None:
    threading.Thread(target=_stream, daemon=True).start()
    signals.after_task_publish.connect(_end_when_asked)


def _end_when_asked(**_: object) -> None:
    # From outside, the signal may come while redis-py waits for an answer: there the SystemExit of
    # Celery's handler becomes a ValueError, and beat dies of it.
    if store().get("beat may end"):
        signal.raise_signal(signal.SIGTERM)


def _stream() -> None:
    send("beat", POINTS)
    store().set("beat has sent", 1)


# -- scripts ---------------------------------------------------------------------------------------


def plain() -> None:
    """Say which pipes are open, send, end."""
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that was open for this list
            print(each.readlink())
    send("child", POINTS)


def _busy_parent() -> None:
    """Have a thread and a connection, and lines that wait."""
    send("parent", POINTS)
    influx.flush(5)
    send("parent", POINTS)


def fork() -> None:
    """multiprocessing.Process, by fork."""
    _busy_parent()
    codes = _run_children("fork")
    send("parent", POINTS)
    sys.exit(str(codes) if any(codes) else 0)


def leave() -> None:
    """os.fork; the child sends some, and leaves with others that wait."""
    _busy_parent()
    pid = os.fork()
    if not pid:
        child()
        influx.flush(5)
        child()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    send("parent", POINTS)
    sys.exit(code)


def spawn() -> None:
    """multiprocessing.Process, by spawn."""
    _busy_parent()
    codes = _run_children("spawn")
    send("parent", POINTS)
    sys.exit(str(codes) if any(codes) else 0)


def forkserver() -> None:
    """multiprocessing.Process, by a server that forks."""
    _busy_parent()
    codes = _run_children("forkserver")
    send("parent", POINTS)
    sys.exit(str(codes) if any(codes) else 0)


def pool() -> None:
    """multiprocessing.Pool, closed and joined: ``with`` would end its children by SIGTERM."""
    _busy_parent()
    workers = multiprocessing.get_context("fork").Pool(CHILDREN)
    workers.map(child, range(CHILDREN), chunksize=1)
    workers.close()
    workers.join()
    send("parent", POINTS)


def executor() -> None:
    """concurrent.futures."""
    _busy_parent()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(CHILDREN, mp_context=context) as workers:
        list(workers.map(child, range(CHILDREN)))
    send("parent", POINTS)


def daemon() -> None:
    """Become a daemon as Stevens has it, in the middle of sending; write into files meanwhile."""
    _busy_parent()
    for _ in range(2):
        if os.fork():
            sys.exit(0)  # what waits in the first parent is its own to send
        os.setsid()
    os.closerange(0, 1024)
    # These get the numbers that the parent's connection, and its log, had.
    with contextlib.ExitStack() as files:
        for number in range(16):
            path = Path(os.environ["FOLDER"], f"file{number}")
            files.enter_context(path.open("w")).write("mine")
        child()
        influx.flush(5)
        child()
    Path(os.environ["FOLDER"], "pid").write_text(str(os.getpid()))


def threads() -> None:
    """End while four threads are sending: each counts in a file what was accepted."""
    path = Path(os.environ["FOLDER"], "counts")
    path.write_bytes(bytes(64))
    with path.open("r+b") as file:
        counts = memoryview(mmap.mmap(file.fileno(), 64)).cast("Q")

    def stream(row: int) -> None:
        while True:
            send("thread", 1)
            counts[row] += 1
            time.sleep(0.0002)

    for row in range(4):
        threading.Thread(target=stream, args=(row,), daemon=True).start()
    while sum(counts) < 5_000:
        time.sleep(0.01)
    counts[7] = sum(counts[:4])


def stream(_: object = None) -> None:
    """Send a point about every ms until killed; write down each that was accepted, and when."""
    path = Path(os.environ["FOLDER"], f"accepted {os.getpid()}")
    with path.open("wb", buffering=0) as notes:
        for number in itertools.count():
            point = {"measurement": "stream", "fields": {"number": number, "pid": os.getpid()}}
            influx.send_data(point)
            notes.write(f"{number} {time.time()}\n".encode())
            time.sleep(0.001)


def ended_pool() -> None:
    """multiprocessing.Pool, whose ``with`` ends its children by SIGTERM; when, is written down."""
    go = Path(os.environ["FOLDER"], "go")
    with multiprocessing.get_context("fork").Pool(CHILDREN) as workers:
        workers.map_async(stream, range(CHILDREN), chunksize=1)
        while not go.exists():
            time.sleep(0.01)
        go.write_text(str(time.time()))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
