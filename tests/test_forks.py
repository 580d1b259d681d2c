"""Forks at the worst moments: whatever another thread holds then, the child can send and flush.

Each lock of the package, and those of libraries on the way of a point, is held at a fork, each in
turn and all at once; and threads stand in the middle of all that takes time. A held lock is seen
held before the fork, after it, and in the child's copy of it. The long run is in tests/long.

All that is with the buffer and the stamps in Python: those in C have no locks to be held.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import functools
import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from billiard.process import current_process
from celery import Celery

import celery_influx
from celery_influx import timing
from celery_influx.database import Database
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from tests.conftest import run_python
from tests.python_only import python_only
from tests.servers import wait_for
from tests.test_database import Server

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and Linux's pipes"),
    pytest.mark.filterwarnings("ignore:This process"),  # newer Pythons: of a fork beside threads
]

#: Forks of each case; tests/long has another number.
FORKS = int(os.environ.get("FORKS", "3"))
#: Points that each child sends.
POINTS = 3
#: Seconds after which a child that hangs prints where, and ends.
HANGS = 10.0
#: Longest wait for a thread in this process.
WAIT = 20.0

SOURCES = Path(celery_influx.__file__).parent
KINDS = ("database", "app", "pool child")
SCHEMES = ("udp", "http")
#: Every lock that the package makes, and of what kinds of processes it is.
LOCKS = {
    "Database._starting": KINDS,
    "Influx._lock": KINDS[1:],
    "Relay._read_all": KINDS[2:],
    "Report._lock": KINDS,
}
#: Locks that are held until somebody is to be woken; a child has others.
SLEEPERS = {"_held.lock"}
#: Locks that a fork waits for, and so are never held at one.
WAITED_FOR = {"forks_wait.lock"}
#: Of what a child lets go of without taking its lock.
LET_GO = {"Spool._lock"}
#: Those that it uses besides: of ``timed`` and logging; of requests and urllib3.
OTHERS = {"timing._report": KINDS, "the log handler's": KINDS}
HTTP = {"the cookies'": KINDS, "the connections'": KINDS}


class Gate:
    """Where a thread of this process stops, once, until it is let go; others pass."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._inside, self._go = threading.Event(), threading.Event()
        self._armed = False

    def arm(self) -> None:
        """Stop the next one."""
        self._inside.clear()
        self._go.clear()
        self._armed = True

    def stop_here(self) -> None:
        """Called in the middle of the code under test."""
        if self._armed and os.getpid() == self._owner:
            self._armed = False
            self._inside.set()
            assert self._go.wait(WAIT)

    def wait_inside(self) -> None:
        """Until somebody has stopped."""
        assert self._inside.wait(WAIT), "nobody came there"

    def let_go(self) -> None:
        """Go on."""
        self._go.set()


class SlowText:
    """A tag's value, over which ``encode`` stops."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __str__(self) -> str:
        self._gate.stop_here()
        return "slow"


class SlowInt(int):
    """An option over whose value whoever looks at it stops: when comparing, and as a boolean."""

    def __new__(cls, value: int, compared: Gate, asked: Gate) -> SlowInt:
        made = super().__new__(cls, value)
        made._compared, made._asked = compared, asked
        return made

    def __gt__(self, other: int) -> bool:
        self._compared.stop_here()
        return int(self) > other

    def __bool__(self) -> bool:
        self._asked.stop_here()
        return int(self) != 0


class SlowFloat(float):
    """A timeout over which ``flush`` stops when it subtracts from it."""

    def __new__(cls, value: float, gate: Gate) -> SlowFloat:
        made = super().__new__(cls, value)
        made._gate = gate
        return made

    def __radd__(self, other: float) -> SlowFloat:
        return SlowFloat(other + float(self), self._gate)

    def __sub__(self, other: float) -> float:
        self._gate.stop_here()
        return float(self) - other


class SlowLines(list):
    """Lines over which the buffer stops while it puts them."""

    def __init__(self, lines: list[bytes], gate: Gate) -> None:
        super().__init__(lines)
        self._gate = gate

    def __iter__(self) -> Iterator[bytes]:
        self._gate.stop_here()
        return super().__iter__()


class Handler(logging.Handler):
    """Keeps what is logged; stops at its gate."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.gate = Gate()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.stop_here()
        self.said.append(record.getMessage())


class Answers(BaseHTTPRequestHandler):
    """InfluxDB's /write and /ping, as far as they are needed."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.gate.stop_here()
        self.server.lines.extend(filter(None, body.split(b"\n")))
        self.send_response(204)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.gate.stop_here()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class HTTPServer(ThreadingHTTPServer):
    """Keeps every line it gets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.gate = Gate()
        self.lines: list[bytes] = []
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Scene:
    """A process about to fork: one database, and a server of its own.

    Args:
        kind: ``"database"``, one alone; ``"app"``, that of an app; ``"pool child"``, that of a
            worker whose forked children write to its relay.
        scheme: How points are sent.
    """

    def __init__(self, kind: str, scheme: str) -> None:
        self.kind = kind
        self.scheme = scheme
        self.server: Any = Server() if scheme == "udp" else HTTPServer()
        self.compared, self.asked, self.tag = Gate(), Gate(), Gate()
        options: dict[str, Any] = {
            "host": "127.0.0.1",
            "transport": scheme,
            f"{scheme}_port": self.server.port,
            # What is sent before a fork waits until it is over, unless the batcher is woken.
            "flush_interval": 3600.0,
        }
        slow = {
            "batch_size": SlowInt(5000, self.compared, self.asked),
            "datagram_bytes": SlowInt(1400, self.compared, self.asked),
        }
        tags = {"constant": SlowText(self.tag)}
        self.influx: celery_influx.Influx | None = None
        if kind == "database":
            self.database = Database(DatabaseOptions(name="m", **options, **slow), tags=tags)
        else:
            app = Celery("app", broker="memory://", set_as_current=False)
            app.conf.influx_databases = {"m": options}
            app.conf.influx_tags = tags
            self.influx = celery_influx.install(app)
            # What Celery's configuration holds is checked and copied.
            for name, value in slow.items():
                object.__setattr__(self.influx.options.databases["m"], name, value)
            if kind == "pool child":
                self.influx.start_worker("worker@host", "prefork")
                self.influx.start()
            self.database = self.influx.default
        self.handler = Handler()
        logging.getLogger("celery_influx").addHandler(self.handler)
        self.expected: Counter[str] = Counter()
        self._numbers = itertools.count()
        self.forks = 0

    def close(self) -> None:
        for gate in (self.compared, self.asked, self.tag, self.handler.gate):
            gate.let_go()
        logging.getLogger("celery_influx").removeHandler(self.handler)
        if self.influx:
            self.influx.close(1)
        self.database.close(1)
        self.server.close()

    def send(self, who: str, **tags: object) -> None:
        """Send one point, unlike any other, and expect it to arrive."""
        number = next(self._numbers)
        self.expected[f"{who}-{number}"] += 1
        self.database.send_data(Point("m", {"f": 1}, {"n": f"{who}-{number}", **tags}))

    def begin(self) -> None:
        """All is running and has sent something."""
        self.send("first")
        assert self.flush()

    def flush(self) -> bool:
        """In the parent: all that any process has sent is with the server."""
        return self.database.flush(WAIT)

    def locks(self) -> dict[str, Any]:
        """Every lock of the parent's, by name; they are there once ``begin`` has been called."""
        database = self.database
        found = {
            "Database._starting": database._starting,
            "Report._lock": database._report._lock,
            "timing._report": timing._report._lock,
            "the log handler's": self.handler.lock,
        }
        if self.influx:
            found["Influx._lock"] = self.influx._lock
            if self.kind == "pool child":
                found["Relay._read_all"] = self.influx._worker.relay._read_all
        if self.scheme == "http":
            session = database._transport._session[1]
            pools = session.get_adapter("http://").poolmanager.pools
            found["the cookies'"] = session.cookies._cookies_lock
            found["the connections'"] = pools.lock
        return found

    def be_child(self, fork: int, held: dict[str, Any]) -> None:
        """In the child: send and flush, a point that is refused and logged among them."""
        for name, lock in held.items():
            # This one begins anew in its place.
            assert name == "the log handler's" or not lock.acquire(False), f"{name} was free"
        if self.kind == "pool child":
            current_process().index = 0
        said = len(self.handler.said)
        for number in range(POINTS):
            point = Point("m", {"f": 1}, {"n": f"child{fork}-{number}"})
            (self.influx or self.database).send_data(point)
        self.database.send_data({"oops": 1})
        timing._report.warn("fork", "a warning of timed")
        assert len(self.handler.said) == said + 2
        assert self.database.flush(HANGS)
        account = self.database.stats()
        if self.kind != "pool child":  # whose account is the whole worker's
            assert (account["points"], account["sent"], account["rejected"]) == (4, 3, 1)
            assert self.database.close(HANGS)

    def fork(self, held: dict[str, Any]) -> None:
        """Fork while ``held`` are held, and see the child do its work within the time."""
        number = next(self._numbers)
        for name, lock in held.items():
            assert not lock.acquire(blocking=False), f"{name} is free"
        child = os.fork()
        if not child:
            code = 1
            try:
                faulthandler.dump_traceback_later(HANGS, exit=True, file=2)
                self.be_child(number, held)
                code = 0
            except BaseException:
                traceback.print_exc(file=os.fdopen(os.dup(2), "w"))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for name, lock in held.items():
            assert not lock.acquire(blocking=False), f"{name} became free"
        assert code == 0
        self.forks += 1
        self.expected.update(f"child{number}-{each}" for each in range(POINTS))

    def check(self) -> None:
        """All points of all processes have arrived, none of them twice."""
        assert self.flush()
        total = self.expected.total()
        wait_for(lambda: len(self.server.lines) >= total, WAIT, "all points")
        found = Counter(
            line.partition(b",n=")[2].split(b" ")[0].split(b",")[0].decode()
            for line in self.server.lines
        )
        assert found == self.expected


@contextlib.contextmanager
def holding(locks: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Let another thread hold ``locks``."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks.values():
                lock.acquire()
                stack.callback(lock.release)
            held.set()
            assert go.wait(WAIT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(WAIT), "the locks are not free"
        yield locks
    finally:
        go.set()
        thread.join(WAIT)


@contextlib.contextmanager
def standing(gate: Gate, work: Callable[[], object]) -> Iterator[None]:
    """Let another thread do ``work``, and stop at ``gate`` in the middle of it."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    gate.arm()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        gate.wait_inside()
        yield
    finally:
        gate.let_go()
        thread.join(WAIT)
    assert not thread.is_alive()
    assert failures == []


#: What a thread may be in the middle of: a gate of the scene's, and the work that comes there.
Inside = Callable[["Scene"], contextlib.AbstractContextManager[dict[str, Any]]]
INSIDE: dict[str, tuple[Inside, tuple[str, ...], tuple[str, ...], bool]] = {}


def inside(
    kinds: tuple[str, ...] = KINDS, schemes: tuple[str, ...] = ("udp",), *, first: bool = False
) -> Callable[[Inside], Inside]:
    """Keep a case for these kinds and schemes; ``first``: nothing has been sent before it."""

    def keep(case: Any) -> Any:
        made = contextlib.contextmanager(case)
        INSIDE[case.__name__] = (made, kinds, schemes, first)
        return made

    return keep


@inside()
def a_point_being_encoded(scene: Scene) -> Iterator[dict[str, Any]]:
    gate = Gate()
    with standing(gate, lambda: scene.send("encoded", slow=SlowText(gate))):
        yield {}


@inside()
def a_users_generator(scene: Scene) -> Iterator[dict[str, Any]]:
    gate = Gate()

    def points() -> Iterator[Point]:
        yield Point("m", {"f": 1}, {"n": "generated-0"})
        gate.stop_here()
        yield Point("m", {"f": 1}, {"n": "generated-1"})

    scene.expected.update(["generated-0", "generated-1"])
    with standing(gate, lambda: scene.database.send_data(points())):
        yield {}


@inside()
def a_log_handler(scene: Scene) -> Iterator[dict[str, Any]]:
    scene.database._report._said.clear()
    with standing(scene.handler.gate, lambda: scene.database.send_data({"oops": 1})):
        yield {"the log handler's": scene.handler.lock}


@inside(KINDS[:2], first=True)
def the_first_use(scene: Scene) -> Iterator[dict[str, Any]]:
    with standing(scene.tag, lambda: scene.send("first")):
        lock = scene.influx._lock if scene.influx else scene.database._starting
        yield {"Influx._lock" if scene.influx else "Database._starting": lock}


@inside(KINDS[:2], first=True)
def the_batchers_start(scene: Scene) -> Iterator[dict[str, Any]]:
    with standing(scene.asked, lambda: scene.send("first")):
        assert scene.database._opening
        yield {"Database._starting": scene.database._starting}


@inside()
def lines_being_put(scene: Scene) -> Iterator[dict[str, Any]]:
    gate = Gate()
    scene.expected.update(["put-0", "put-1"])
    lines = SlowLines([b"m,n=put-0 f=1 1", b"m,n=put-1 f=1 2"], gate)
    with standing(gate, lambda: scene.database.send_lines(lines)):
        yield {}


@inside()
def the_batcher_taking_and_a_flush_waiting(scene: Scene) -> Iterator[dict[str, Any]]:
    scene.send("taken")
    with standing(scene.compared, scene.flush):
        yield {}


@inside(schemes=("http",))
def the_batcher_sending_and_a_flush_waiting(scene: Scene) -> Iterator[dict[str, Any]]:
    scene.send("sent")
    with standing(scene.server.gate, scene.flush):
        yield {}


@inside()
def a_flush_looking(scene: Scene) -> Iterator[dict[str, Any]]:
    scene.send("flushed")
    gate, batcher = Gate(), scene.database._batcher
    flush = functools.partial(batcher.flush, SlowFloat(WAIT, gate))
    # The batcher may not be done before the flush looks.
    with standing(scene.compared, batcher.wake), standing(gate, flush):
        yield {}
        scene.compared.let_go()


@inside(schemes=("http",))
def a_ping_waiting(scene: Scene) -> Iterator[dict[str, Any]]:
    with standing(scene.server.gate, scene.database.ping):
        yield {}


@inside(KINDS[2:])
def the_relay_delivering_and_a_sync_waiting(scene: Scene) -> Iterator[dict[str, Any]]:
    assert scene.influx
    assert scene.influx._worker
    relay = scene.influx._worker.relay
    assert relay
    synced: list[bool] = []
    syncing = threading.Thread(target=lambda: synced.append(relay.sync(WAIT)))
    gate, deliver = Gate(), relay._deliver

    def stop_and_deliver(*delivered: Any) -> None:
        gate.stop_here()
        deliver(*delivered)

    relay._deliver = stop_and_deliver
    scene.expected["relayed-0"] += 1
    with standing(gate, lambda: relay.put(0, b"m,n=relayed-0 f=1 1")):
        syncing.start()
        assert not relay.sync(0.05)
        yield {}
    syncing.join(WAIT)
    relay._deliver = deliver
    assert synced == [True]


@pytest.fixture
def in_python() -> bool:
    """Whether what the extension can do is done by Python."""
    return True


@pytest.fixture
def scene(kind: str, scheme: str, in_python: bool) -> Iterator[Scene]:
    with python_only() if in_python else contextlib.nullcontext():
        made = Scene(kind, scheme)
        yield made
        made.close()


# -- each lock, and each place -----------------------------------------------------------------


def test_every_lock_that_the_package_makes_has_its_case() -> None:
    kinds = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}
    kinds |= {"Queue", "LifoQueue", "PriorityQueue", "SimpleQueue"}
    made = set()
    for path in SOURCES.rglob("*.py"):
        if path.name == "listener.py":  # a server of its own, that sends nothing
            continue
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func).rpartition(".")[2] in kinds:
                made.add(_name_of(call, tree) or f"{path.name}:{call.lineno}")

    assert made - WAITED_FOR - SLEEPERS - LET_GO == set(LOCKS)


def _name_of(call: ast.Call, tree: ast.Module) -> str:
    """``Class.attribute`` or ``function.variable``, where that is what the call's value becomes."""
    for owner in ast.walk(tree):
        # A function within a class is named by the class.
        if isinstance(owner, (ast.ClassDef, ast.FunctionDef)):
            for node in ast.walk(owner):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is call:
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    return f"{owner.name}.{ast.unparse(target).removeprefix('self.')}"
    return ""


@pytest.mark.parametrize(
    ("lock", "kind", "scheme"),
    [
        (lock, kind, scheme)
        for scheme, locks in (("udp", {**LOCKS, **OTHERS}), ("http", HTTP))
        for lock, kinds in locks.items()
        for kind in kinds
    ],
)
def test_with_any_lock_held_at_the_fork_the_child_sends_and_the_parent_goes_on(
    lock: str, kind: str, scheme: str, scene: Scene
) -> None:
    scene.begin()

    for _ in range(FORKS):
        scene.send("waiting")
        with holding({lock: scene.locks()[lock]}) as held:
            scene.fork(held)
        scene.send("after")

    scene.check()


@pytest.mark.parametrize(
    ("place", "kind", "scheme"),
    [
        (place, kind, scheme)
        for place, (_, kinds, schemes, _) in INSIDE.items()
        for kind in kinds
        for scheme in schemes
    ],
)
def test_with_a_thread_anywhere_at_the_fork_the_child_sends_and_the_parent_goes_on(
    place: str, kind: str, scheme: str, scene: Scene
) -> None:
    case, _, _, first = INSIDE[place]
    if not first:
        scene.begin()

    for _ in range(1 if first else FORKS):
        if not first:
            scene.send("waiting")
        with case(scene) as held:
            scene.fork(held)
        scene.send("after")

    scene.check()


def fork_with_all_held(scene: Scene, forks: int) -> None:
    """Fork so often, each time with every lock held and a thread in each place that takes time."""
    scene.begin()
    for _ in range(forks):
        scene.send("waiting")
        with contextlib.ExitStack() as stack:
            held: dict[str, Any] = {}
            for place in (
                a_users_generator,
                a_point_being_encoded,
                a_log_handler,
                a_flush_looking,
            ):
                held |= stack.enter_context(place(scene))
            locks = scene.locks()
            held |= stack.enter_context(
                holding({name: locks[name] for name in locks.keys() - held.keys()})
            )
            expected = {**LOCKS, **OTHERS, **(HTTP if scene.scheme == "http" else {})}
            assert set(held) == {name for name, kinds in expected.items() if scene.kind in kinds}
            scene.fork(held)
        scene.send("after")
        if scene.expected.total() > len(scene.server.lines) + 100:
            scene.check()
    scene.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_every_lock_held_and_threads_everywhere_the_child_sends(
    kind: str, scheme: str, scene: Scene
) -> None:
    fork_with_all_held(scene, 5 * FORKS)


@pytest.mark.parametrize("in_python", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forks_amid_the_traffic_of_many_threads_lose_and_double_nothing(
    kind: str, scheme: str, scene: Scene
) -> None:
    stop = threading.Event()
    sent: list[Counter[str]] = []

    def work(who: int) -> None:
        mine: Counter[str] = Counter()
        for number in itertools.count():
            if stop.is_set():
                break
            mine[f"thread{who}-{number}"] += 1
            scene.database.send_data(Point("m", {"f": 1}, {"n": f"thread{who}-{number}"}))
            if number % 10 == who:
                assert scene.flush()
            time.sleep(0.0005)
        sent.append(mine)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5 * FORKS):
            scene.fork({})
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT)

    assert len(sent) == len(threads)
    for mine in sent:
        scene.expected.update(mine)
    scene.check()


# -- modules -----------------------------------------------------------------------------------


_FORK = """
    import faulthandler, os, socket, sys, threading, time, traceback
    from importlib.machinery import PathFinder
    from celery_influx.database import Database
    from celery_influx.options import DatabaseOptions
    from celery_influx.point import Point

    first, scheme, port = sys.argv[1:]
    inside, ended, parent, loader = threading.Event(), threading.Event(), os.getpid(), []

    def begun():
        loader.append(threading.current_thread().name)
        inside.set()

    class Finder:
        @staticmethod
        def find_spec(fullname, path=None, target=None):
            if fullname != first or os.getpid() != parent:
                return None
            spec = PathFinder.find_spec(fullname, path, target)
            execute = spec.loader.exec_module

            def exec_module(module):
                begun()
                time.sleep(0.3)
                execute(module)
                ended.set()

            # Not in here: a fork waits for this, and for nothing that comes after it.
            spec.loader.exec_module = exec_module
            return spec

    def look_up(*args, **kwargs):
        socket.getaddrinfo = real
        begun()
        found = real(*args, **kwargs)  # lets the other thread run, once it is in C
        ended.set()
        return found

    if first == "look-up":
        socket.getaddrinfo, real = look_up, socket.getaddrinfo
    else:
        assert first not in sys.modules
        sys.meta_path.insert(0, Finder)
    options = {"host": "localhost", "transport": scheme, f"{scheme}_port": int(port)}
    database = Database(DatabaseOptions(name="m", **options))

    def send(who):
        database.send_data(Point("m", {"f": 1}, {"n": who}))
        assert database.flush(8), (who, database.stats())

    thread = threading.Thread(target=send, args=("parent",))
    thread.start()
    assert inside.wait(10), f"no {first}"
    assert loader != ["MainThread"]
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(10, exit=True)
        try:
            assert ended.is_set(), f"the fork did not wait for {first}"
            send("child")
            os._exit(0)
        except BaseException:
            faulthandler.dump_traceback()
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    thread.join(10)
    sys.exit(code)
"""


@pytest.mark.parametrize(
    ("first", "scheme"),
    [
        ("celery_influx.transports.udp", "udp"),
        ("celery_influx.transports.http", "http"),
        ("requests", "http"),
        ("encodings.idna", "udp"),
        ("look-up", "udp"),
        ("look-up", "http"),
    ],
)
def test_a_fork_while_another_thread_loads_what_it_needs_leaves_the_child_with_all_of_it(
    first: str, scheme: str
) -> None:
    scene = Scene("database", scheme)
    try:
        run = run_python(
            _FORK, first, scheme, str(scene.server.port), flags=("-W", "ignore"), timeout=60
        )

        assert (run.returncode, run.stderr) == (0, "")
        scene.expected.update(["parent", "child"])
        scene.check()
    finally:
        scene.close()


def test_a_fork_while_timed_warns_that_there_is_no_plugin_does_not_hang_the_childs_timers() -> None:
    code = """
        import faulthandler, os, sys, threading
        from celery import Celery
        from celery_influx import timed, timing

        held, go = threading.Event(), threading.Event()

        def hold():
            with timing._report._lock:
                held.set()
                go.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10)
        assert not timing._report._lock.acquire(blocking=False)
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(5, exit=True)
            with timed("block"):
                pass
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go.set()
        thread.join()
        sys.exit(code)
    """

    run = run_python(code, flags=("-W", "ignore"), timeout=60)

    assert run.returncode == 0, run.stderr
    assert "has no celery_influx plugin" in run.stderr
