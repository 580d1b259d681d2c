"""install(app) → Influx: an app's databases by name, and how they work in this process."""

from __future__ import annotations

import atexit
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.local import Proxy
from celery.utils.log import current_process_index  # type: ignore[attr-defined]

from celery_influx.batcher import Batcher, is_green
from celery_influx.counters import DROPPED, POINTS, Counters
from celery_influx.database import Database, close_all
from celery_influx.errors import INTERRUPTS, ConfigError
from celery_influx.field_types import TypeTable
from celery_influx.measurements import CELERY_TASK
from celery_influx.options import Options, load, part_urls
from celery_influx.relay import Relay
from celery_influx.runs import Runs, verdict_frame
from celery_influx.stamps import SLOTS, make_stamps
from celery_influx.task_points import Facts, point_of, quick_run_line, tags_of
from celery_influx.timing import Timer
from celery_influx.transports import forks_wait

if TYPE_CHECKING:
    from celery_influx.queries import QueryResult
    from celery_influx.transports.http import Ping
    from celery_influx.under_way import Run

_T = TypeVar("_T")
#: A topic exchange has keys without bound.
_MOST_ROUTES = 1_000
#: Nor have the names of tasks and exceptions.
_MOST_HEADS = 4_096

#: Every Influx of this process, for the hooks that Python calls after a fork and at exit.
_installed: list[Influx] = []


def install(app: Celery) -> Influx:
    """Give ``app`` the plugin: ``app.influx``. Call it once, before or after configuring the app.

    It reads no configuration, opens nothing and starts nothing. Calling it again changes nothing.
    """
    if isinstance(app, Proxy):
        app = app._get_current_object()  # noqa: SLF001 - `current_app` is another one tomorrow
    found = app.__dict__.get("influx")
    if isinstance(found, Influx):
        return found
    from celery_influx import signals
    from celery_influx.bootstep import InfluxStep

    influx = Influx(app)
    app.influx = influx  # type: ignore[attr-defined]
    app.steps["worker"].add(InfluxStep)
    # By name: so it goes along when Celery pickles the app, for a child that it spawns.
    app.fixups = {*app.fixups, f"{__name__}:{install.__name__}"}  # type: ignore[attr-defined]
    if not _installed:
        INTERRUPTS.add(SoftTimeLimitExceeded)
        os.register_at_fork(after_in_child=_after_fork)
        atexit.register(at_exit)
        signals.connect()
        if is_green():
            import_module("requests")  # later it would stop the hub for as long
    signals.attach(app)
    _installed.append(influx)
    return influx


def installed() -> tuple[Influx, ...]:
    """The plugins of all apps of this process."""
    return tuple(_installed)


def find(app: Celery | None) -> Influx | None:
    """The plugin of ``app``, where it has one."""
    found = getattr(app, "influx", None)
    return found if isinstance(found, Influx) else None


class _cached(cached_property[_T]):  # noqa: N801 - a decorator
    """Without the lock of Python 3.10 and 3.11: a child forked meanwhile would wait for it."""

    def __init__(self, find: Callable[[Any], _T]) -> None:
        super().__init__(find)
        self.lock = nullcontext()


class Influx:
    """What ``app.influx`` is: databases by name; the default one answers here itself.

    Configuration is read at the first use, or when the worker starts.

    Raises:
        ConfigError: From any method, at the first use: the configuration has mistakes.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._databases: dict[str, Database] | None = None
        self._worker: _Worker | None = None
        self._lock = threading.RLock()
        self._settled = False
        self._forked = False
        self._child_relay: Relay | None = None  # in a pool child, with what it needs there
        self._number: int
        self._counters: memoryview
        self._queue_names: dict[tuple[str, str], str] = {}
        #: Whether tasks run in greenlets, many to a thread.
        self.is_green = False
        #: Where a run's start and end may be written without us, as ordinary ones are: the default
        #: database, and the relay that is between, if there is one.
        self.quick: tuple[Database, Relay | None] | None = None

    # -- the user's side -------------------------------------------------------------------------

    @_cached
    def options(self) -> Options:
        """The configuration, checked."""
        with forks_wait():  # or what Celery locks for it would stay locked in the child
            settings = _settings(self._app)
            options = load(settings)
            part_urls(settings.get("influx_databases"))
            return options

    def __getitem__(self, name: str) -> Database:
        databases = self._open()
        try:
            return databases[name]
        except KeyError:
            expected = ", ".join(map(repr, databases))
            raise ConfigError(
                f"no database {name!r} in influx_databases; expected one of {expected}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._open()

    def __iter__(self) -> Iterator[Database]:
        return iter(self._open().values())

    @_cached
    def default(self) -> Database:
        """The database that ``influx_default_database`` names."""
        return self._open()[self.options.default_database]

    def send_data(self, point: object, database: str | None = None) -> None:
        """Queue ``point`` for ``database``, or the default one; see ``Database.send_data``."""
        (self.default if database is None else self[database]).send_data(point)

    def flush(self, timeout: float = 5.0) -> bool:
        """Flush the default database; see ``Database.flush``."""
        return self.default.flush(timeout)

    def ping(self, timeout: float | None = None) -> Ping:
        """Ping the default database's server; see ``Database.ping``."""
        return self.default.ping(timeout)

    def query(self, statement: str, **options: Any) -> QueryResult:
        """Query the default database; see ``Database.query``."""
        return self.default.query(statement, **options)

    def post(self, statement: str, **options: Any) -> QueryResult:
        """Run any statement on the default database; see ``Database.post``."""
        return self.default.post(statement, **options)

    def timed(
        self, name: str, *, tags: Mapping[str, Any] | None = None, database: str | None = None
    ) -> Timer:
        """Time a block or a function for this app; see ``timed``."""
        return Timer(name, tags, database, self)

    def stats(self) -> dict[str, dict[str, int]]:
        """Each database's account, by name; see ``Database.stats``."""
        return {database.name: database.stats() for database in self}

    def close(self, timeout: float | None = None) -> bool:
        """Send what waits everywhere and give all back; whether all went out in time.

        A point sent afterwards opens it again, also one of a worker's child.

        Args:
            timeout: Seconds for all databases together; default ``influx_shutdown_timeout``.
        """
        if self._databases is None:
            return True
        limit = self.options.shutdown_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        relayed = True
        if self._worker and self._worker.is_own():
            if self._worker.is_running:
                relayed = self.relayed(limit)
            else:
                relayed = self._worker.close_relay(limit)
                self._worker.ends = deadline
        return close_all(list(self), deadline) and relayed

    def end_worker(self, timeout: float | None = None) -> bool:
        """``close``, where tasks have ended; or in any other process."""
        if self._worker:
            self._worker.is_running = False
        return self.close(timeout)

    def time_to_exit(self) -> float | None:
        """Seconds that ``close`` has at exit, for points that came after a worker's shutdown."""
        ends = self._worker.ends if self._worker and self._worker.is_own() else None
        return None if ends is None else max(Batcher.AFTERWARDS, ends - time.monotonic())

    def __repr__(self) -> str:
        names = list(self._databases) if self._databases is not None else "not opened yet"
        return f"<Influx of {self._app.main!r} databases={names}>"

    # -- the worker's side -----------------------------------------------------------------------

    def start_worker(self, hostname: str, pool: str) -> None:
        """In a worker, before its pool exists: check the configuration, and set out as the worker.

        ``pool`` is the name of the pool's module in ``celery.concurrency``; ``spawn`` for prefork's
        where its children are no forks.

        Raises:
            ConfigError: The worker must not start.
        """
        self.end_worker()
        databases = self._open()
        relay = None
        self.is_green = pool in ("gevent", "eventlet")
        if pool == "prefork" and self.options.enabled:
            # `worker_lost_wait` is how long Celery itself waits for a lost child's result.
            patience = (self._app.conf.worker_lost_wait or 0) + 5
            runs = Runs(self.write_run, patience)
            relay = Relay(self._take_relayed, self._count_broken, runs)
        counters = Counters(len(databases), SLOTS if relay else 1)
        types = [
            TypeTable(shared=bool(relay), learning=database.learns_types)
            for database in databases.values()
        ]
        self._worker = _Worker(hostname, counters, types, relay)
        with self._lock:  # a point that comes in between waits, and finds all anew
            before = []
            if self._settled:
                before = [database.set_out_again() for database in databases.values()]
            self._settled = False
            self.quick = None
        deadline = time.monotonic() + self.options.shutdown_timeout
        for number, end in enumerate(before):
            counters.add(number, end(max(0.0, deadline - time.monotonic())))

    def start(self) -> None:
        """In a worker: start each database's batcher, and the reader of the relay."""
        if self.options.enabled:
            for database in self:
                database.start()
            if self._worker and self._worker.relay:
                self._worker.relay.start()

    def run_tasks(self) -> None:
        """In a worker: from now on its children may write, until ``end_worker``."""
        if self._worker:
            self._worker.is_running = True

    def relayed(self, timeout: float) -> bool:
        """In a worker: wait until all that its children wrote before is in the buffers."""
        relay = self._worker.relay if self._worker and self._worker.is_own() else None
        return relay is None or relay.is_at_rest or relay.sync(timeout)

    def _take_relayed(self, number: int, lines: list[bytes]) -> None:
        list(self)[number].send_lines(lines)

    def _count_broken(self, number: int) -> None:
        list(self)[number].count(DROPPED)

    # -- for the signals -------------------------------------------------------------------------

    def start_run(self, run: Run, *, goes_back: bool) -> None:
        """In a pool child: tell the worker that a run starts, which it must end if we cannot.

        ``goes_back``: if the worker ends before the run does, the queue gives it out again. To do
        so twice is to do it once.
        """
        if not self._settled:
            self._settle()
        if self._child_relay:
            self._child_relay.put_start(run.id, run.began, run.facts, goes_back)

    def leave_pool(self) -> None:
        """In a pool child that ends in peace: hand over what the worker could not take before.

        Or send it, in a child that was spawned: ``atexit`` does not run in any of them.
        """
        if self._child_relay:
            if not self._child_relay.put_owed(self.options.shutdown_timeout):
                self._counters[DROPPED] += self._child_relay.forget_owed()
        else:
            self.close()

    def write_run(
        self,
        facts: Facts,
        state: str,
        exception: str | None,
        runtime: int | None = None,
        cpu: int | None = None,
    ) -> None:
        """Write the point of a run of which nobody was told that it started; times in ns."""
        self.default.send_data(point_of(facts, state, exception, runtime, cpu))

    def end_run(
        self, run: Run, state: str, exception: str | None, runtime: int | None, cpu: int | None
    ) -> None:
        """Write the point of a run that was told of by ``start_run``; times in ns.

        To be done again where a soft time limit has come in between, unless the run is over.
        """
        line, wrong = b"", None
        try:
            line = self._line_of(run.facts, state, exception, runtime, cpu)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # noqa: BLE001 - a point's mistake, dealt with as such
            wrong = error
        self.write_end(run, line, wrong)

    def write_end(self, run: Run, line: bytes, wrong: Exception | None = None) -> None:
        """Write the ``line`` of such a point, or b"" for what is ``wrong`` with it."""
        relay = self._child_relay
        if relay is None:
            run.over = True
            self.default.send_line(line, wrong)
            return
        # The worker must hear of the end, whatever became of the point.
        kept = relay.put_end(self._number, run.began, line)
        made = bool(line)
        dropped = made and not kept
        cells = self._counters
        # In one statement without a call, for a signal's handler runs only between two.
        cells[POINTS], cells[DROPPED], run.over = (
            cells[POINTS] + made,
            cells[DROPPED] + dropped,
            True,
        )
        if dropped:
            self.default.say_unrelayed()
        if wrong:
            self.default.send_line(b"", wrong)

    def _line_of(
        self, facts: Facts, state: str, exception: str | None, runtime: int | None, cpu: int | None
    ) -> bytes:
        """Such a point's line: its beginning, which seldom is a new one, and its numbers."""
        database = self.default
        key = facts[0], state, exception
        head = database.heads.get(key)
        if head is None:
            head = database.head(CELERY_TASK.name, tags_of(*key))
            if len(database.heads) >= _MOST_HEADS:
                database.heads.clear()
            database.heads[key] = head
        if not head or facts[4] or runtime is None:
            return database.encode(point_of(facts, state, exception, runtime, cpu))
        return quick_run_line(head, facts, runtime, cpu, database.stamps, database.unit)

    @property
    def watches_runs(self) -> bool:
        """Whether runs are in processes other than this one, their worker, and may be killed."""
        return bool(self.records_tasks and self._worker and self._worker.relay)

    def judge_run(
        self, pid: int, run_id: str, state: str, exception: str | None, facts: Facts
    ) -> None:
        """In the worker: say what Celery made of the run of a child that was, or will be, killed.

        ``facts`` are for its point if the task's body never started.
        """
        if self._worker and self._worker.relay:
            frame = verdict_frame(pid, run_id, state, exception, facts)
            self._worker.relay.put_verdict(frame)

    @_cached
    def records_tasks(self) -> bool:
        """Whether runs of tasks are written."""
        options = self.options
        return options.enabled and options.task_points

    def queue_name(self, delivery_info: Mapping[str, Any]) -> str:
        """The queue of a message that came by this exchange and routing key."""
        exchange = delivery_info.get("exchange") or ""
        key = delivery_info.get("routing_key") or ""
        if not exchange:
            return key  # the default exchange routes by the queue's own name
        name = self._queue_names.get((exchange, key))
        if name is None:
            if len(self._queue_names) >= _MOST_ROUTES:
                self._queue_names.clear()
            queues = list(self._app.amqp.queues.consume_from.values())
            matching = (queue.name for queue in queues if _leads_to(exchange, key, queue))
            name = self._queue_names[exchange, key] = next(matching, key)
        return name

    def count(self, counter: int) -> None:
        """Count one for the default database; ``counter`` is one of ``counters``' numbers."""
        self.default.count(counter)

    # -- this process ----------------------------------------------------------------------------

    def _open(self) -> dict[str, Database]:
        if self._databases is None:
            options = self.options
            with self._lock:
                if self._databases is None:
                    self._databases = {
                        name: Database(
                            database,
                            strict=options.strict,
                            enabled=options.enabled,
                            settle=self._settle,
                            upstream=self.relayed,
                        )
                        for name, database in options.databases.items()
                    }
        return self._databases

    def _settle(self) -> None:
        """Find out what this process is, and let every database set out in it."""
        with self._lock:
            if self._settled:
                return
            databases = self._open()
            worker, relay = self._worker, None
            row = worker.row() if worker else None
            if worker is None or row is None:
                counters, row, slot = Counters(len(databases)), 0, os.getpid()
                types = [TypeTable() for _ in databases]
            else:
                counters, slot, types = worker.counters, worker.slot + row, worker.types
                relay = worker.relay if row else None
            tags = {"host": socket.gethostname()}
            if worker:
                tags["worker"] = worker.hostname
            stamps = make_stamps(slot)
            for number, database in enumerate(databases.values()):
                database.begin(
                    counters.row(number, row),
                    partial(counters.total, number),
                    stamps,
                    {**tags, **self.options.tags},
                    relay.end_for(number) if relay else None,
                    types[number],
                )
            self._number = list(databases).index(self.options.default_database)
            self._counters = counters.row(self._number, row)
            self._child_relay = relay
            if relay is None and (self._forked or _is_child()):
                _before_exit(self.close)
            self._settled = True
            if self.records_tasks and not self.is_green and not self.options.task_ids:
                self.quick = self.default, relay

    def after_fork(self) -> None:
        """In a forked child, at once: begin anew, in ways that take no lock of the parent's."""
        self._lock = threading.RLock()
        self._settled = False
        self.quick = None
        self._child_relay = None
        self._forked = True
        if self._worker:
            self._worker.after_fork()
        for database in (self._databases or {}).values():
            database.begin_anew()


class _Worker:
    """What the processes of one worker share: made by the worker, before its pool forks."""

    def __init__(
        self, hostname: str, counters: Counters, types: list[TypeTable], relay: Relay | None
    ) -> None:
        self.hostname = hostname
        self.counters = counters
        self.types = types
        self.relay = relay
        self.slot = random.randrange(SLOTS)  # noqa: S311 - of row 0; each row has the next one
        self.is_running = False
        self.ends: float | None = None  # by `time.monotonic`: when it was to be closed by
        self._pid = os.getpid()
        self._generation = 0

    def is_own(self) -> bool:
        """Whether this process is the worker itself."""
        return os.getpid() == self._pid

    def row(self) -> int | None:
        """This process's row: 0 the worker's, then the pool children's; None: it has none."""
        if self.is_own():
            return 0
        if self.relay and self._generation == 1:
            # Billiard numbers its pool's children: from 1, and no two living ones the same. Any
            # other child of the worker (beat, a user's own) has no number.
            number = current_process_index()
            if number is not None and number < self.counters.rows:
                return int(number)
            self.relay.leave()
        return None

    def after_fork(self) -> None:
        """In any forked process: only the worker's own children may be pool children."""
        self._generation += 1
        if self.relay:
            self.relay.after_fork()
            if self._generation > 1:
                self.relay.leave()

    def close_relay(self, timeout: float) -> bool:
        """Deliver what the children wrote; whether all of it was read in time."""
        return self.relay.close(timeout) if self.relay else True


def _leads_to(exchange: str, key: str, queue: Any) -> bool:
    """Whether a message to ``exchange`` with the routing key ``key`` comes to ``queue``."""
    if queue.exchange.name != exchange:
        return False
    kind = queue.exchange.type
    if kind == "topic":
        return _is_topic((queue.routing_key or "").split("."), key.split("."))
    return bool(kind != "direct" or queue.routing_key == key)


def _is_topic(pattern: list[str], words: list[str]) -> bool:
    """AMQP's topics: ``*`` stands for one word, ``#`` for any number of them."""
    if not pattern:
        return not words
    first, rest = pattern[0], pattern[1:]
    if first == "#":
        return any(_is_topic(rest, words[start:]) for start in range(len(words) + 1))
    return bool(words) and first in ("*", words[0]) and _is_topic(rest, words[1:])


def _settings(app: Celery) -> dict[str, Any]:
    """All ``influx_…`` settings of ``app``, by plain lower-case name."""
    # The keys first: the configuration is loaded, and its prefix known, by this access.
    keys = [key for key in app.conf if isinstance(key, str)]
    prefix = (getattr(app.conf, "prefix", None) or "").lower()
    found = {}
    for key in keys:
        name = key.lower()
        if prefix and name.startswith(prefix):
            name = name[len(prefix) :]
        elif prefix and name != key:
            continue  # Django's setting for something else: INFLUX_HOST, for instance
        # With Django's prefix and no namespace="CELERY" nothing would come of it, without a word.
        if name.startswith(("influx_", "celery_influx_")):
            found[name] = app.conf.get(name, app.conf.get(key))
    return found


#: The two libraries whose processes end by ``os._exit``, and so without ``atexit``.
_LIBRARIES = ("multiprocessing", "billiard")


def _is_child() -> bool:
    """Whether one of them has made this process, be it before our import."""
    processes = (sys.modules.get(f"{name}.process") for name in _LIBRARIES)
    return any(each and getattr(each.current_process(), "_parent_pid", None) for each in processes)


def _before_exit(close: Callable[[], object]) -> None:
    """Where one of them has made this process: ``close`` at its end."""
    for name in _LIBRARIES:
        util = sys.modules.get(f"{name}.util")
        if util:
            util.Finalize(None, close, exitpriority=0)


def _after_fork() -> None:
    for influx in _installed:
        influx.after_fork()


def at_exit() -> None:
    """Send what waits."""
    for influx in _installed:
        influx.end_worker(influx.time_to_exit())
