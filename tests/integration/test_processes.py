"""Every process that is none of a worker's pool, and every way to run a pool: nothing lost, no
line twice, and no thread or connection of a parent's used by its child.

What the processes counted themselves is compared with what influxd counts. A tap between them
keeps every line as it was sent, and over whose connection: InfluxDB does not show a line that
came twice.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.integration.worker import Worker, alive, children, environment, skip_without
from tests.servers import Influxd, answers, free_port, wait_for

# As in apps/processes.py.
POINTS = 500
CHILDREN = 2
APP = "tests.integration.apps.processes"
PATCHES = {
    "": "",
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


class Tap:
    """A TCP proxy that keeps what clients send, each connection by itself."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._heard: list[bytearray] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def connections(self) -> list[list[tuple[str, int]]]:
        """For each connection the lines that came over it: measurement, and who made it."""
        line = re.compile(rb"(?:^|\n)(\w+),[^\n]*?\bpid=(\d+)")
        return [
            [(name.decode(), int(pid)) for name, pid in line.findall(heard)]
            for heard in map(bytes, self._heard)
        ]

    def count(self, measurement: str) -> int:
        """How many lines of ``measurement`` came altogether."""
        return sum(name == measurement for lines in self.connections() for name, _ in lines)

    def cut(self) -> None:
        """Close every connection, as servers and balancers do with those that are idle."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections, and end those there are."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                heard = bytearray()
                self._heard.append(heard)
                self._open += [client, server]
                for way in ((client, server, heard), (server, client, None)):
                    threading.Thread(target=self._pass, args=way, daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, heard: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if heard is not None:
                    heard += data
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Ear:
    """A UDP port that keeps which socket sent which process's lines."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.1)
        self.port = self._socket.getsockname()[1]
        self._heard: dict[int, bytes] = {}

    def connections(self) -> list[list[tuple[str, int]]]:
        """For each sender's port the lines that came from it: measurement, and who made it."""
        with contextlib.suppress(TimeoutError):
            while True:
                data, (_, port) = self._socket.recvfrom(65_536)
                self._heard[port] = self._heard.get(port, b"") + data + b"\n"
        line = re.compile(rb"^(\w+),[^\n]*?\bpid=(\d+)", re.MULTILINE)
        return [
            [(name.decode(), int(pid)) for name, pid in line.findall(heard)]
            for heard in self._heard.values()
        ]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


@pytest.fixture
def tap(influxd: Influxd) -> Iterator[Tap]:
    """In front of influxd."""
    found = Tap(influxd.http_port)
    yield found
    found.close()


@pytest.fixture
def config(tap: Tap, database: str) -> dict[str, object]:
    """Points go through the tap, and a line waits for the end of its process, or a full batch."""
    url = f"http://127.0.0.1:{tap.port}/{database}?flush_interval=60"
    return {"influx_databases": {"metrics": url}}


def count(store: redis.Redis, key: str) -> int:
    """A counter of the processes'."""
    return int(store.get(key) or 0)


def owners(lines: list[tuple[str, int]]) -> set[int]:
    """Whose lines these are."""
    return {pid for _, pid in lines}


def is_clean(log: str) -> bool:
    """Whether nobody complained."""
    return not re.search(
        r"Traceback|ERROR/|CRITICAL/|exitcode|exited with|dropped|lost|rejected|did not end", log
    )


# -- web processes ---------------------------------------------------------------------------------

REQUESTS = 120
GUNICORN = """
control_socket_disable = True

def post_worker_init(worker):
    open(f"ready {worker.pid}", "w").close()
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("worker", "preload"),
    [
        ("sync", "preload"),
        pytest.param("gthread", "", marks=pytest.mark.long),
        pytest.param("gevent", "", marks=pytest.mark.long),
        ("gevent", "preload"),
        pytest.param("sync", "", marks=pytest.mark.long),
        pytest.param("gthread", "preload", marks=pytest.mark.long),
    ],
)
def test_web_processes_lose_no_point_and_send_none_twice(
    worker: str,
    preload: str,
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    skip_without("gunicorn")
    if worker == "gevent":
        skip_without(worker)
    # Some batches go out while they serve, the rest at their end.
    url = f"http://127.0.0.1:{tap.port}/{database}?flush_interval=60&batch_size=64"
    config["influx_databases"] = {"metrics": url}
    port = free_port()
    command = [
        *(sys.executable, "-m", "gunicorn", "tests.integration.apps.web:application"),
        *("-b", f"127.0.0.1:{port}", "-k", worker, "-w", "2"),
        # Processes end, and others begin, in the middle of it.
        *("--max-requests", str(REQUESTS // 3), "--max-requests-jitter", "20"),
        *(["--threads", "4"] if worker == "gthread" else []),
        *(["--preload"] if preload else []),
    ]
    (tmp_path / "gunicorn.conf.py").write_text(GUNICORN)

    def request(_: int) -> tuple[int, int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/?points=10")
            answer = connection.getresponse()
            return answer.status, int(answer.read())

    with (tmp_path / "log").open("wb") as log:
        gunicorn = subprocess.Popen(
            command, env=environment(broker, config), stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        wait_for(lambda: answers(port), 20, "gunicorn is up")
        with ThreadPoolExecutor(8) as clients:
            served = list(clients.map(request, range(REQUESTS)))
        first = {pid for _, pid in served}

        def from_a_later_process() -> bool:
            served.append(request(0))
            return len({pid for _, pid in served}) > len(first)

        wait_for(from_a_later_process, 20, "processes are replaced")

        def steady() -> bool:
            # One that is just beginning does not hear gunicorn's signal to end.
            printed = (tmp_path / "log").read_text()
            pids = children(gunicorn.pid)
            ending = {*re.findall(r"\[(\d+)\] \[INFO\] Autorestarting", printed)}
            return (
                len(pids) == 2
                and printed.count("Booting") == len(ending) + 2
                and all((tmp_path / f"ready {pid}").exists() for pid in pids)
            )

        wait_for(steady, 20, "two processes, and none that begins or ends")
        gunicorn.terminate()
        assert gunicorn.wait(20) == 0
    finally:
        gunicorn.kill()
        gunicorn.wait(10)

    importers = [int(pid) for pid in store.lrange("importers", 0, -1)]
    assert {status for status, _ in served} == {200}
    assert importers == [gunicorn.pid] if preload else gunicorn.pid not in importers
    points = count(store, "points")
    assert points == 10 * len(served)
    assert influxd.count("hits", "number", database) == tap.count("hits") == points
    early = influxd.count("early", "number", database)
    assert early == tap.count("early") == 2 * len(importers)
    assert store.llen("celery") == len(served)
    assert all(len(owners(lines)) <= 1 for lines in tap.connections())
    printed = (tmp_path / "log").read_text()
    # One that ends while gunicorn does may be "sent SIGTERM" after its handlers are gone.
    assert not re.search(r"Traceback|exited with|SIGKILL|SIGABRT|dropped|lost", printed), printed


# -- processes without a worker --------------------------------------------------------------------


def run(kind: str, config: dict[str, object], folder: Path, *command: str) -> str:
    """Run ``apps/processes.py`` to its good end; what it printed."""
    # Newer Pythons warn of a fork while threads run, which is just what is tried.
    found = subprocess.run(
        [sys.executable, "-W", "ignore", *(command or ("-m", APP, kind))],
        env=environment("memory://", config, FOLDER=str(folder)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    printed = found.stdout + found.stderr
    assert found.returncode == 0, printed
    return printed


@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver", "pool", "executor"])
def test_children_of_multiprocessing_send_their_own_points_and_no_others(
    kind: str,
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    tmp_path: Path,
) -> None:
    assert run(kind, config, tmp_path) == ""

    assert influxd.count("child", "number", database) == CHILDREN * POINTS
    assert influxd.count("parent", "number", database) == 3 * POINTS
    assert tap.count("child") == CHILDREN * POINTS
    assert tap.count("parent") == 3 * POINTS
    assert all(len(owners(lines)) <= 1 for lines in tap.connections())
    # In a pool, one child may have been quick enough to do it all.
    fewest = 1 if kind in ("pool", "executor") else CHILDREN
    senders = {pid for lines in tap.connections() for pid in owners(lines)}
    assert 1 + fewest <= len(senders) <= 1 + CHILDREN


def test_forked_children_open_udp_sockets_of_their_own(tmp_path: Path) -> None:
    ear = Ear()
    url = f"udp://127.0.0.1:{ear.port}?http_port=0&flush_interval=60"

    assert run("fork", {"influx_databases": {"metrics": url}}, tmp_path) == ""

    heard = ear.connections()
    ear.close()
    made = [line[0] for lines in heard for line in lines]
    assert (made.count("parent"), made.count("child")) == (3 * POINTS, CHILDREN * POINTS)
    assert all(len(owners(lines)) == 1 for lines in heard)


def test_a_forked_child_that_first_imports_the_app_sends_at_its_end(
    influxd: Influxd, database: str, tap: Tap, config: dict[str, object], tmp_path: Path
) -> None:
    script = f"""
import multiprocessing, sys

def child():
    from {APP} import child
    child()

one = multiprocessing.get_context("fork").Process(target=child)
one.start()
one.join()
sys.exit(one.exitcode)
"""

    assert run("", config, tmp_path, "-c", script) == ""

    assert influxd.count("child", "number", database) == tap.count("child") == POINTS


def test_a_forked_child_that_leaves_by_os_exit_loses_what_waits_and_nothing_of_its_parents(
    influxd: Influxd, database: str, tap: Tap, config: dict[str, object], tmp_path: Path
) -> None:
    assert run("leave", config, tmp_path) == ""

    assert influxd.count("child", "number", database) == tap.count("child") == POINTS
    assert influxd.count("parent", "number", database) == tap.count("parent") == 3 * POINTS


@pytest.mark.parametrize(
    "library", ["", *(pytest.param(each, marks=pytest.mark.long) for each in PATCHES if each)]
)
def test_what_a_thread_or_a_greenlet_sends_after_atexit_has_run_is_lost_uncounted(
    library: str, influxd: Influxd, database: str, config: dict[str, object], tmp_path: Path
) -> None:
    if library:
        skip_without(library)
    script = f"""
import atexit, os, threading
from pathlib import Path
{PATCHES[library]}
begin = threading.Event()

def late():
    begin.set()
    sender.join(5)

atexit.register(late)  # before the plugin does, and so called after it
from {APP} import influx, send

def stream():
    begin.wait()
    before = influx.stats()["metrics"]
    send("late", {POINTS})
    after = influx.stats()["metrics"]
    counted = {{name: after[name] - before[name] for name in after if after[name] > before[name]}}
    Path(os.environ["FOLDER"], "counted").write_text(str(counted))

send("early", {POINTS})
sender = threading.Thread(target=stream, daemon=True)
sender.start()
"""

    printed = run("", config, tmp_path, "-c", script)

    assert influxd.count("early", "number", database) == POINTS
    assert influxd.count("late", "number", database) == 0
    # It says that they wait, and nobody is there any more who could say that they are lost.
    counted = (tmp_path / "counted").read_text()
    assert counted == str({"points": POINTS, "queued": POINTS})
    assert re.fullmatch(r"(metrics: points wait unsent: [^\n]*\n)?", printed)


def test_a_daemonised_script_goes_on_sending_and_writes_into_nobodys_file(
    influxd: Influxd, database: str, tap: Tap, config: dict[str, object], tmp_path: Path
) -> None:
    assert run("daemon", config, tmp_path) == ""
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text(), 20, "the daemon is done")
    wait_for(lambda: not alive(int(pid.read_text())), 10, "the daemon has ended")

    assert influxd.count("parent", "number", database) == tap.count("parent") == 2 * POINTS
    assert influxd.count("child", "number", database) == tap.count("child") == 2 * POINTS
    assert all(len(owners(lines)) <= 1 for lines in tap.connections())
    written = [each.read_text() for each in tmp_path.glob("file*")]
    assert written == ["mine"] * 16


@pytest.mark.alone
def test_threads_that_still_send_neither_break_nor_hold_up_the_end_of_the_interpreter(
    influxd: Influxd, database: str, config: dict[str, object], tmp_path: Path
) -> None:
    began = time.monotonic()
    printed = run("threads", config, tmp_path)
    seconds = time.monotonic() - began

    counts = memoryview((tmp_path / "counts").read_bytes()).cast("Q")
    accepted, before_the_end = sum(counts[:4]), counts[7]
    stored = influxd.count("thread", "number", database)
    print(f"{accepted} accepted, {before_the_end} before the end, {stored} stored, {seconds:.1f} s")
    print(printed)
    assert before_the_end >= 5_000
    # Each thread may have been stopped between the sending and the counting of one.
    assert before_the_end <= stored <= accepted + 4
    # What comes while all is being closed may be dropped, and then that is said: nothing else is.
    said = r"(metrics: \d+ lines could not be sent [^\n]* at the end: \d+ dropped\n)?"
    if sys.version_info >= (3, 12):
        # No thread can be started for what comes after it.
        said += r"(metrics: points wait unsent: can't create new thread at interpreter shutdown\n)?"
    assert re.fullmatch(said, printed)
    assert seconds < 4, "the shutdown timeout is for a server that does not answer"


#: Seconds: of the setting; and for the thread that sends to have its turn, and the server's answer.
FLUSH_INTERVAL, SENDING = 0.2, 0.5


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "the end of its multiprocessing.Pool"])
def test_a_process_that_is_killed_loses_at_most_the_last_flush_interval(
    how: str,
    influxd: Influxd,
    database: str,
    config: dict[str, object],
    tmp_path: Path,
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}?flush_interval={FLUSH_INTERVAL}"
    config["influx_databases"] = {"metrics": url}
    processes, kind = (1, "stream") if how.startswith("SIG") else (CHILDREN, "ended_pool")

    def accepted() -> dict[int, list[float]]:
        """When each point was accepted, by process and number; a line may be half-written."""
        notes = {
            int(path.name.split()[1]): path.read_text().rpartition("\n")[0].splitlines()
            for path in tmp_path.glob("accepted *")
        }
        return {pid: [float(line.split()[1]) for line in lines] for pid, lines in notes.items()}

    def span(times: list[float]) -> float:
        return times[-1] - times[0] if times else 0

    script = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", APP, kind],
        env=environment("memory://", config, FOLDER=str(tmp_path)),
    )
    try:
        wait_for(lambda: len(accepted()) == processes, 20, "points are sent")
        wait_for(lambda: min(map(span, accepted().values())) > 1.5, 20, "and more of them")
        if kind == "stream":
            killed = time.time()
            script.send_signal(signal.Signals[how])
            assert script.wait(10) == -signal.Signals[how]
        else:
            (tmp_path / "go").touch()
            assert script.wait(10) == 0
            killed = float((tmp_path / "go").read_text())
    finally:
        script.kill()
        script.wait(10)

    rows = influxd.rows("stream", database)
    for pid, times in accepted().items():
        stored = [row["number"] for row in rows if row["pid"] == pid]
        promised = sum(when < killed - FLUSH_INTERVAL - SENDING for when in times)
        print(f"{how}: {len(times)} accepted, {promised} promised, {len(stored)} stored")
        assert promised > 100
        # All but the newest ones. The last that was accepted may not have been written down.
        assert stored == [*range(len(stored))]
        assert promised <= len(stored) <= len(times) + 1


def test_a_long_idle_process_sends_at_once_when_it_is_used_again(
    influxd: Influxd, database: str, tap: Tap, config: dict[str, object], tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{tap.port}/{database}?flush_interval=0.2"
    config["influx_databases"] = {"metrics": url}

    def enter(text: str) -> None:
        assert shell.stdin is not None
        shell.stdin.write(text + "\n")
        shell.stdin.flush()

    def stored() -> int:
        return influxd.count("cell", "number", database)

    with (tmp_path / "log").open("wb") as log:
        shell = subprocess.Popen(
            [sys.executable, "-i", "-q"],
            env=environment("memory://", config),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        enter(f"from {APP} import *")
        for number in range(1, 4):
            enter(f'send("cell", {POINTS})')
            wait_for(lambda: stored() == number * POINTS, 10, "sent without an exit")  # noqa: B023
            enter(f'print("flushed", {number}, app.influx.flush())')  # its answer has come, too
            said = f"flushed {number} True"
            wait_for(lambda: said in (tmp_path / "log").read_text(), 10, said)  # noqa: B023
            # The server ends the connection while nobody uses it, as servers do.
            tap.cut()
            idle_since = cpu(shell.pid)
            time.sleep(0.5)
            assert cpu(shell.pid) - idle_since < 0.1
        enter('print(dict(app.influx.stats()["metrics"], ended=True))')
        wait_for(lambda: "ended" in (tmp_path / "log").read_text(), 10, "an answer")
        enter(f'send("cell", {POINTS})')
        assert shell.stdin is not None
        shell.stdin.close()
        assert shell.wait(10) == 0
    finally:
        shell.kill()
        shell.wait(10)

    assert stored() == tap.count("cell") == 4 * POINTS
    printed = (tmp_path / "log").read_text()
    assert f"'sent': {3 * POINTS}, 'dropped': 0, 'lost': 0" in printed
    assert "Traceback" not in printed


def cpu(pid: int) -> float:
    """Seconds of CPU that ``pid`` has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_beat_alone_sends_all_that_it_took(
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "celery", "-A", APP, "beat", "-s", str(tmp_path / "schedule")]
    with (tmp_path / "log").open("wb") as log:
        beat = subprocess.Popen(
            [*command, "--pidfile="],
            env=environment(broker, config),
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    try:
        wait_for(lambda: store.get("beat has sent") and store.llen("celery") > 3, 20, "beat beats")
        assert tap.count("beat") == 0
        store.set("beat may end", 1)
        assert beat.wait(10) == 0
    finally:
        beat.kill()
        beat.wait(10)

    assert influxd.count("beat", "number", database) == tap.count("beat") == POINTS
    assert is_clean((tmp_path / "log").read_text())


# -- a worker's tasks that start processes ---------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", pytest.param("threads", marks=pytest.mark.long)])
def test_processes_that_tasks_start_send_their_own_points(
    pool: str,
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    forks, spawns, programs, works = 3, 1, 2, 40

    with Worker(tmp_path, "processes", broker, config, pool=pool) as worker:
        for _ in range(works):
            sender.send_task("processes.work", [0.01])
        started = [
            sender.send_task("processes.start_children", [method])
            for method in ["fork"] * forks + ["spawn"] * spawns
        ]
        ran = [sender.send_task("processes.start_program") for _ in range(programs)]
        codes = [each.get(timeout=30) for each in started]
        programs_ended = [each.get(timeout=30) for each in ran]
        wait_for(lambda: count(store, "works") == works, 20)
        assert worker.stop() == 0

    # multiprocessing itself gives 1 where a thread of a ThreadPoolExecutor forks: at its end the
    # child waits for that thread, which it is.
    forked = 0 if pool == "prefork" else 1
    assert codes == [[forked] * CHILDREN] * forks + [[0] * CHILDREN] * spawns
    for code, printed, pipe in programs_ended:
        assert code == 0
        assert "socket:" not in printed
        assert pipe not in printed
        assert pool != "prefork" or "pipe:[" in pipe
    senders = CHILDREN * (forks + spawns) + programs
    for measurement, number in (
        ("child", POINTS * senders),
        ("parent", 2 * (forks + spawns) + programs),
        ("work", 5 * works),
    ):
        assert influxd.count(measurement, "number", database) == number, measurement
        assert tap.count(measurement) == number, measurement
    tasks = works + forks + spawns + programs
    assert influxd.count("celery_task", "runtime", database) == tasks
    of_children = [lines for lines in tap.connections() if "child" in dict(lines)]
    assert len(of_children) == senders
    assert all(len(owners(lines)) == 1 for lines in of_children)
    assert is_clean(worker.log()), worker.log()


# -- ways to run a worker --------------------------------------------------------------------------


def celery(folder: Path, config: dict[str, object], broker: str, *arguments: str) -> None:
    """Run a command of Celery's to its good end."""
    found = subprocess.run(
        [sys.executable, "-m", "celery", "-A", APP, *arguments],
        env=environment(broker, config),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=40,
        cwd=folder,
    )
    assert found.returncode == 0, found.stdout


def log_of(folder: Path) -> str:
    """All logs in ``folder``."""
    return "".join(each.read_text(errors="replace") for each in folder.glob("*.log"))


@pytest.mark.parametrize(
    "command",
    [
        "multi",
        *(
            pytest.param(command, marks=pytest.mark.long)
            for command in ("multi, restarted", "worker --detach")
        ),
    ],
)
def test_detached_workers_send_all_that_their_tasks_made(
    command: str,
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    names = ["one", "two"] if command.startswith("multi") else ["one"]
    options = ["-c", "2", "-l", "info", "--pidfile=%n.pid", "--logfile=%n.log"]
    # So long that a restart comes in the middle of them.
    least, seconds = (400, 0.05) if "restarted" in command else (100, 0.01)
    tasks = 0

    def multi(what: str) -> None:
        celery(tmp_path, config, broker, "multi", what, *names, *options)

    def started(times: int) -> set[int]:
        wait_for(lambda: log_of(tmp_path).count(" ready.") == times * len(names), 20, "ready")
        return {int(each.read_text()) for each in tmp_path.glob("*.pid")}

    def work() -> None:
        nonlocal tasks
        sender.send_task("processes.work", [seconds], ignore_result=True)
        tasks += 1

    def all_work() -> bool:
        """Whether each child has had a task: on a busy machine one is up late. If not, one more."""
        if store.scard("pids") == 2 * len(pids):
            return True
        work()
        return False

    if command == "worker --detach":
        celery(tmp_path, config, broker, "worker", "--detach", "-n", "one", *options)
    else:
        multi("start")
    try:
        pids = started(1)
        for _ in range(least):
            work()
        wait_for(all_work, 20, "each child has work")
        if "restarted" in command:
            wait_for(lambda: count(store, "works") > 20, 20)
            multi("restart")
            before = count(store, "works")
            pids |= started(2)
            assert 20 < before < tasks
            wait_for(all_work, 20, "each new child has work")
        wait_for(lambda: count(store, "works") == tasks, 20)
        if command.startswith("multi"):
            multi("stopwait" if "restarted" in command else "stop")
    finally:
        for each in tmp_path.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                os.kill(int(each.read_text()), signal.SIGTERM)
        wait_for(lambda: not [*tmp_path.glob("*.pid")], 20, "all have ended")

    assert len(pids) == len(names) * (2 if "restarted" in command else 1)
    wait_for(lambda: not any(map(alive, pids)), 10, "all have ended")
    assert len(store.smembers("pids")) == 2 * len(pids)
    assert count(store, "works") == tasks
    assert influxd.count("work", "number", database) == tap.count("work") == 5 * tasks
    assert influxd.count("celery_task", "runtime", database) == tasks
    assert is_clean(log_of(tmp_path)), log_of(tmp_path)


@pytest.mark.once
@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.long), 32])
def test_each_child_of_a_pool_has_a_slot_of_its_own(
    concurrency: int,
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    tasks = 3 * concurrency

    with Worker(tmp_path, "processes", broker, config, concurrency=concurrency) as worker:
        for _ in range(tasks):
            sender.send_task("processes.work_side_by_side", [concurrency], ignore_result=True)
        wait_for(lambda: count(store, "works") == tasks, 30)
        assert worker.stop() == 0

    rows = influxd.rows("work", database)
    assert len(rows) == tap.count("work") == 5 * tasks
    assert influxd.count("celery_task", "runtime", database) == tasks
    slots = {(row["pid"], row["time"] % 1_000) for row in rows}
    assert {str(pid) for pid, _ in slots} == store.smembers("pids")
    assert len(slots) == len({slot for _, slot in slots}) == concurrency
    assert is_clean(worker.log()), worker.log()


def test_a_pool_that_grows_shrinks_and_grows_again_loses_nothing(
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    # Long enough that Celery ends no child to which it has just given a task.
    options, variables = ["--autoscale=6,1"], {"AUTOSCALE_KEEPALIVE": "1.5"}
    sizes = []

    with Worker(
        tmp_path, "processes", broker, config, options=options, variables=variables
    ) as worker:
        for done in (60, 120):
            for _ in range(60):
                sender.send_task("processes.work", [0.08], ignore_result=True)
            wait_for(lambda: len(worker.children()) == 6, 10, "six children")
            sizes.append(len(worker.children()))
            wait_for(lambda: count(store, "works") == done, 20)  # noqa: B023
            if done == 60:
                wait_for(lambda: len(worker.children()) == 1, 20, "one child")
                sizes.append(len(worker.children()))
        assert worker.stop() == 0

    assert sizes == [6, 1, 6]
    assert len(store.smembers("pids")) > 6
    assert influxd.count("work", "number", database) == tap.count("work") == 600
    assert influxd.count("celery_task", "runtime", database) == 120
    assert is_clean(worker.log()), worker.log()


@pytest.mark.long
def test_children_that_are_replaced_for_their_memory_lose_nothing(
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    options = ["--max-memory-per-child=1"]  # KiB: one task each

    with Worker(tmp_path, "processes", broker, config, options=options) as worker:
        for _ in range(20):
            sender.send_task("processes.work", [0.0], ignore_result=True)
        wait_for(lambda: count(store, "works") == 20, 20)
        assert worker.stop() == 0

    assert len(store.smembers("pids")) == 20
    assert influxd.count("work", "number", database) == tap.count("work") == 100
    assert influxd.count("celery_task", "runtime", database) == 20
    assert is_clean(worker.log()), worker.log()


def test_a_pool_that_is_restarted_loses_nothing(
    influxd: Influxd,
    database: str,
    tap: Tap,
    config: dict[str, object],
    broker: str,
    sender: Celery,
    store: redis.Redis,
    tmp_path: Path,
) -> None:
    config = {**config, "worker_pool_restarts": True}

    with Worker(tmp_path, "processes", broker, config) as worker:
        for done in (40, 80, 120):
            if done > 40:
                # Each child sees it after its next task.
                (answer,) = sender.control.pool_restart(reply=True, timeout=10, limit=1)
                assert answer[worker.name] == {"ok": "reload started"}
            for _ in range(40):
                sender.send_task("processes.work", [0.01], ignore_result=True)
            wait_for(lambda: count(store, "works") == done, 20)  # noqa: B023
        assert worker.stop() == 0

    assert len(store.smembers("pids")) >= 4
    assert influxd.count("work", "number", database) == tap.count("work") == 600
    assert influxd.count("celery_task", "runtime", database) == 120
    assert is_clean(worker.log()), worker.log()
