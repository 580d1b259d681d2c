"""One InfluxDB database, as users hold it: send_data, flush, ping, query, post, stats, close."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from _signal import getsignal as handler_of  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from celery_influx.batcher import Batcher
from celery_influx.buffer import Buffer, make_buffer
from celery_influx.counters import CONFLICTS, DROPPED, LEFT_OUT, POINTS, REJECTED, Counters
from celery_influx.delivery import Delivery
from celery_influx.errors import (
    INTERRUPTS,
    ConfigError,
    FieldError,
    InfluxError,
    PointError,
    show,
    show_caught,
)
from celery_influx.field_types import FieldTypes, TypeTable, server_types
from celery_influx.line_protocol import Encoder
from celery_influx.line_reader import decode
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point, Precision
from celery_influx.report import Report
from celery_influx.speedups import extension
from celery_influx.stamps import Stamps, make_stamps
from celery_influx.transports import Transport, load, open_transport

if TYPE_CHECKING:
    from celery_influx.queries import QueryResult
    from celery_influx.relay import RelayEnd
    from celery_influx.spool import Spool
    from celery_influx.transports.http import HTTPClient, Ping

logger = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])
#: Iterable, and yet each is one point or a mistake.
_NOT_MANY = (dict, Mapping, Point, str, bytes)  # a dict is a Mapping, but that is slow to find out
_KEYS = ("measurement", "fields", "tags", "time")
_NEEDED, _ALLOWED = frozenset(_KEYS[:2]), frozenset(_KEYS)
#: The option ``api`` of a server that has numbers alone, and so no types.
_VICTORIA = ("victoria", "victoria-cluster")
#: influxdb-client's words for the unit of a point's time, in nanoseconds.
_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


class _Way:
    """Where C finds it, too: what ``send_data`` does with a Point."""

    __slots__ = ("_accept",)

    if TYPE_CHECKING:
        _accept: Callable[[Point], None]


def _quickest(function: _F) -> _F:
    """``send_data``, or with the extension a method that does the same, of a ``Point`` in C."""
    if extension is None:
        return function
    method = extension.method(function, Point, vars(_Way)["_accept"])
    return cast("_F", functools.update_wrapper(method, function))


class Database(_Way):
    """Sends points to one database, and asks it questions.

    It starts nothing until the first point. In every process it begins anew: a forked child has
    a buffer, a thread and sockets of its own, or, in a worker's pool child, none of these and
    a way to the worker instead. When the interpreter ends, it sends what waits; where no plugin
    sees to that, for 5 seconds at the most.

    Args:
        options: Where it is, and the limits.
        strict: Raise what is wrong with a point, instead of counting and logging it.
        enabled: False: ``send_data`` does nothing.
        settle: Called at the first use in each process; it must call ``begin``. Default: write
            into a buffer of its own, with ``tags`` on each point.
        upstream: Called by ``flush`` with the seconds left; it waits for lines that others hand
            to this process, and says whether they all came.
        tags: Tags of every point, where ``settle`` is not given.
    """

    def __init__(
        self,
        options: DatabaseOptions,
        *,
        strict: bool = False,
        enabled: bool = True,
        settle: Callable[[], None] | None = None,
        upstream: Callable[[float], bool] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self._strict = strict
        self._enabled = enabled
        self._settle = settle or self._begin_alone
        self._upstream = upstream
        self._tags = tags or {}
        # A small queue must not be full before the batch that wakes the batcher is.
        self._wake_lines = min(options.batch_size, max(1, options.queue_size // 2))
        self._wake_bytes = min(options.batch_bytes, options.queue_bytes // 2)
        self._retired: list[object] = []
        self._transport: Transport | None = None
        self._spool: Spool | None = None
        self._http: HTTPClient | None = None
        self._batcher: Batcher | None
        self._unrelayed: int  # lines that the relay had not taken at the last flush
        self._opening: bool
        self._closing: bool
        self._encode: Callable[[Point], bytes]
        self._types: TypeTable
        self._constant: Mapping[str, Any]
        #: Gives this process's present time, unlike any other of its times, in ns.
        self.stamps: Stamps
        #: Of the times of its lines, in ns.
        self.unit = Precision(options.precision).nanoseconds
        #: By what its caller likes: beginnings of lines, kept for as long as they hold.
        self.heads: dict[Any, str]
        self._relay: RelayEnd | None
        self._forget()
        if settle is None:
            _alone().add(self)

    @property
    def name(self) -> str:
        """The entry's name in ``influx_databases``."""
        return self.options.name

    # -- points ----------------------------------------------------------------------------------

    @_quickest
    def send_data(self, point: object) -> None:
        """Queue ``point`` for the next batch. Returns at once; never waits for the network.

        Args:
            point: A ``Point``; a mapping with ``measurement``, ``fields`` and, where wanted,
                ``tags`` and ``time`` (integer ns, or a datetime); an object with
                ``to_line_protocol()``; or an iterable of these. A point without a timestamp
                gets the present time, in nanoseconds and unlike any other of this process.

        Raises:
            PointError: Only with ``influx_strict``: the point cannot be stored as given.
                Otherwise it is counted as ``rejected`` and logged, once a minute.

        When the buffer is full the oldest line is dropped, and counted as ``dropped``.
        """
        if type(point) is Point:
            self._accept(point)
            return
        if not self._enabled:
            return  # and an iterable is left as it is
        try:
            points: Iterator[object] | None = (
                None
                if isinstance(point, _NOT_MANY)
                or not isinstance(point, Iterable)
                or hasattr(point, "to_line_protocol")
                else iter(point)
            )
        except Exception as error:  # noqa: BLE001 - a proxy asks its function what it is
            self._reject(error)
            return
        if points is None:
            self._send_one(point)
            return
        while True:
            try:
                each = next(points)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - a user's generator may raise anything
                self._reject(error)
                return
            self._send_one(each)

    def _send_one(self, given: object) -> None:
        """What stands for one point."""
        try:
            point = given if type(given) is Point else _as_point(given)
        except Exception as error:  # noqa: BLE001 - as above
            self._reject(error)
            return
        self._accept(point)

    def _send(self, point: Point) -> None:
        if not self._enabled:
            return
        try:
            line = self._encode(point)
        except Exception as error:  # noqa: BLE001 - and so may any object when it is read
            self._reject(error)
            return
        self._put(line)

    def send_line(self, line: bytes, wrong: Exception | None = None) -> None:
        """Queue a line of ``encode``'s, b"" for none.

        ``wrong``: what making it raised, to be dealt with as ``send_data`` does.
        """
        if line:
            self._put(line)
        if wrong:
            self._reject(wrong)

    def encode(self, point: Point) -> bytes:
        """The line of ``point`` as this process writes it, and a time where it has none."""
        return self._encode(point)

    def head(self, measurement: str, tags: Mapping[str, Any]) -> str:
        """How each line of a series begins, up to its fields.

        For callers that write plain numbers only, and keep it in ``heads``. "" where it cannot
        stand for itself: whether influxd reads a backslash as given depends on all of the line.
        """
        line = self.encode(Point(measurement, {"runtime": 0.0}, tags, 0)).decode()
        texts = (measurement, *tags.values(), *self._constant.values())
        if len(line) > 1_024 or any("\\" in str(text) for text in texts):
            return ""
        return line.removesuffix("runtime=0.0 0")

    def send_lines(self, lines: list[bytes]) -> None:
        """Queue encoded lines that others have counted: the relay's, from pool children."""
        self._settled()
        self._queue(lines)

    def _reject(self, error: Exception) -> None:
        if isinstance(error, ConfigError):
            raise error  # no point's fault
        if not isinstance(error, PointError):
            wrong = PointError(
                f"the point cannot be read: {show_caught(error)}; "
                "expected a Point or a mapping of plain values"
            )
            wrong.__cause__ = error
            error = wrong
        self._settled()
        cells = self._counters
        # In one statement without a call, for a signal's handler runs only between two.
        cells[POINTS], cells[REJECTED] = cells[POINTS] + 1, cells[REJECTED] + 1
        if self._strict:
            raise error
        self._report.warn("point", "%s: rejected a point: %s", self.name, error)

    def flush(self, timeout: float = 5.0) -> bool:
        """Send what waits now; whether all of it went out within ``timeout`` seconds.

        UDP does not say whether anything arrived: True means handed to the network. In a pool
        child it means that all it took since the last flush has been handed to the worker.
        """
        self._settled()
        deadline = time.monotonic() + timeout
        arrived = self._upstream(timeout) if self._upstream else True
        batcher = self._batcher
        if batcher is None:
            before = self._unrelayed
            if self._relay:
                self._unrelayed = self._counters[DROPPED]
            return arrived and before == self._unrelayed and not len(self._buffer)
        return batcher.flush(max(0.0, deadline - time.monotonic())) and arrived

    def finish(self, deadline: float) -> None:
        """Begin to close: send what waits until ``deadline`` (``time.monotonic``)."""
        if self._batcher:
            self._batcher.finish(deadline)

    def close(self, timeout: float = 5.0) -> bool:
        """Send what waits and give everything back; whether all went out in ``timeout`` seconds.

        What could not be sent is dropped, counted and logged. A point sent afterwards opens it
        again.
        """
        with self._starting:
            if self._batcher is None and len(self._buffer):
                self._start()  # which failed before, or is just to come
            batcher, self._batcher = self._batcher, None
            self._accept = self._send
            self._closing = self._closing or batcher is not None
        client, self._http = self._http, None
        if client:
            client.close()
        if batcher is None:
            spool, self._spool = self._spool, None
            if spool:
                spool.close()
            return not self._closing and self._drop_unstarted()
        try:
            return batcher.close(timeout)
        finally:
            with self._starting:
                self._closing = False
                # It is closed, or belongs to the thread that hangs in it; `begin_anew` would
                # keep it for ever, one for each start of a worker in this process.
                self._transport = self._spool = None
                if len(self._buffer):
                    self._start()  # for what came after its last look

    def _drop_unstarted(self) -> bool:
        """Where no thread can be started, even now, drop what waits; whether that is nothing."""
        dropped = self._buffer.clear()
        if dropped:
            self._counters[DROPPED] += dropped
            logger.warning(
                "%s: %d lines were dropped at the end: no thread could be started to send them",
                self.name,
                dropped,
            )
        return not dropped

    def stats(self) -> dict[str, int]:
        """What became of every point: counter to count, as ``counters.COUNTERS`` explains.

        In a worker and its pool children: of all of the worker's processes together.
        """
        self._settled()
        return self._account()

    def count(self, counter: int) -> None:
        """Count one in this process's row; ``counter`` is one of ``counters``' numbers."""
        self._settled()
        self._counters[counter] += 1

    @property
    def address(self) -> str:
        """Where points go, as a URL without secrets."""
        return (self._transport or open_transport(self.options)).address

    # -- questions -------------------------------------------------------------------------------

    def ping(self, timeout: float | None = None) -> Ping:
        """Ask the server over HTTP whether it is up; its version, and the round trip in seconds.

        Raises:
            SendError: It is not, and why.
        """
        return self._client().ping(timeout)

    def query(self, statement: str, **options: Any) -> QueryResult:
        """Run one or more reading statements; see ``HTTPClient.query`` for the options.

        Raises:
            QueryError: The statement writes, or the server refused it.
            SendError: The server did not answer.
        """
        return self._client().query(statement, **options)

    def post(self, statement: str, **options: Any) -> QueryResult:
        """Run any statement, also one that changes or deletes data; see ``HTTPClient.post``.

        Raises:
            QueryError: The server refused it.
            SendError: The server did not answer.
        """
        return self._client().post(statement, **options)

    def _client(self) -> HTTPClient:
        if self._http is None:
            if not self.options.http_port:
                raise InfluxError(
                    f"{self.name}: no HTTP API, since 'http_port' is 0; expected a port, 8086 for "
                    "instance; ping, query and post need it"
                )
            self._http = load("celery_influx.transports.http").HTTPClient(self.options)
        return self._http

    @property
    def learns_types(self) -> bool:
        """Whether its server may be asked for the types of fields."""
        return bool(self._enabled and self._has_types and self.options.http_port)

    @property
    def _has_types(self) -> bool:
        return self.options.field_types and self.options.api not in _VICTORIA

    def learn_types(self) -> None:
        """Ask the server for the types of its fields: in a thread, for it may be slow."""
        self._settled()
        try:
            if self.learns_types:
                self._types.learn(server_types(self.query("SHOW FIELD KEYS")))
        except (InfluxError, ValueError) as error:
            logger.info("%s: the server's field types are not known: %s", self.name, error)
        finally:
            self._types.end_learning()

    # -- this process ----------------------------------------------------------------------------

    def begin(
        self,
        counters: memoryview,
        account: Callable[[], dict[str, int]],
        stamps: Stamps,
        tags: Mapping[str, Any],
        relay: RelayEnd | None = None,
        types: TypeTable | None = None,
    ) -> None:
        """Set out in this process: count in ``counters``, and queue here or write to ``relay``.

        ``types``: those of the fields, where other processes share them.
        """
        self._counters = counters
        self._unrelayed = counters[DROPPED]  # by the child that had the row before
        self._account = account
        self._relay = relay
        self._put = self._hand_over if relay else self._keep
        self._constant, self.stamps, self.heads = tags, stamps, {}
        self._types = types or TypeTable()
        # Last: other threads take it as the sign that all the rest is there.
        encode = Encoder(
            tags=tags,
            precision=Precision(self.options.precision),
            clock=stamps,
            on_left_out=self._count_left_out,
            types=FieldTypes(self._types, self._count_conflicts, self._say_full)
            if self._has_types
            else None,
        ).encode
        self._encode = _without_newlines(encode) if _parts_at_newlines(self.options) else encode
        if relay:
            self._accept = self._quickest()

    def start(self) -> None:
        """Start the batcher and open the transport, before the first point asks for it."""
        if not self._enabled:
            return
        self._settled()
        with self._starting:
            # Two batchers would share one transport. The lock is reentrant, so it alone does
            # not keep a finaliser that sends a point in the middle of this from starting one.
            if self._batcher is not None or self._closing or self._opening:
                return
            if self._encode == self._first_encode:
                return  # a worker has set out meanwhile, and starts it
            self._opening = True
            try:
                self._transport = self._transport or open_transport(self.options)
                self._spool = self._spool or self._make_spool()
                delivery = Delivery(
                    self.name,
                    self._transport,
                    self._counters,
                    self._report,
                    retry_age=self.options.retry_age,
                    retry_tries=self.options.retry_tries,
                    spool=self._spool,
                    spool_first=self.options.spool_mode == "always",
                )
                quickest = self._quickest()
                self._batcher = Batcher(
                    self.name,
                    self._buffer,
                    delivery,
                    self._counters,
                    self._report,
                    batch_size=self.options.batch_size,
                    flush_interval=self.options.flush_interval,
                )
                # Else who has let go of the database would lose what the thread is to send.
                self._batcher.owner = self
                # With no call in between, and so no signal's handler that may close it.
                self._accept = quickest
            finally:
                self._opening = False

    def _make_spool(self) -> Spool | None:
        options = self.options
        if not options.spool_dir:
            return None
        destination = (
            *(options.transport, options.host, options.http_port, options.tcp_port),
            *(options.socket_path, options.api, options.organization, options.tenant),
            *(options.database, options.retention_policy, options.precision),
        )
        spool: Spool = load("celery_influx.spool").Spool(
            self.name,
            repr(destination),
            options.spool_dir,
            options.spool_bytes,
            self._counters,
            self._report,
            fsync=options.spool_fsync,
        )
        return spool

    def _quickest(self) -> Callable[[Point], None]:
        """``_send``, or what does the same more quickly; that knows no start of a batcher."""
        buffer, stamps, relay = self._buffer, self.stamps, self._relay
        if not self._enabled:
            return self._send
        points = self._counters[POINTS : POINTS + 1]
        if relay is None and type(buffer) is Buffer:
            return buffer.sender(
                self._encode,
                points,
                self._wake_lines,
                self._wake_bytes,
                self._reject,
                self._after_put,
            )
        if extension is None or FunctionType in (type(stamps), type(self._encode)):
            # What is Python's has nothing to gain from C.
            if relay is None:
                return self._send
            return relay.sender(self._encode, self._counters, self._reject, self._hand_over)
        quick: Callable[[Point], None]
        if relay:
            quick = extension.relay_sender(
                self._encode,
                relay.pipe,
                relay.database,
                points,
                self._send,
                self._hand_over,
                handler_of,
            )
            return quick
        quick = extension.sender(
            self._encode,
            buffer,
            points,
            self._wake_lines,
            self._wake_bytes,
            self._send,
            self._after_put,
        )
        return quick

    def _start(self) -> None:
        try:
            self.start()
        except tuple(INTERRUPTS):
            raise
        except Exception as error:  # noqa: BLE001
            # "can't start new thread": at the end of the interpreter, or at the user's limit.
            self._report.warn("thread", "%s: points wait unsent: %s", self.name, error)

    def begin_anew(self) -> None:
        """In a forked child, at once: nothing of the parent's is used, sent again or closed.

        The parent's thread does not exist here, and its locks may be held for ever.
        """
        try:
            if self._transport:
                self._transport.abandon()
            if self._spool:
                self._spool.abandon()
        finally:
            # Kept, for their finalisers would close file numbers that may be others' by then.
            self._retired += filter(None, (self._transport, self._spool, self._http))
            self._transport = self._spool = self._http = None
            self._forget()

    def _forget(self) -> None:
        self._accept = self._send
        self._batcher = None
        self._buffer = make_buffer(self.options.queue_size, self.options.queue_bytes)
        self._report = Report(logger)
        self._unrelayed = 0
        self._relay = None
        self._starting = threading.RLock()
        self._opening = self._closing = False
        # Replaced by `begin`, at the first point: so a point costs no look at where we are.
        self._encode = self._first_encode
        self.heads = {}

    def set_out_again(self) -> Callable[[float], dict[str, int]]:
        """In a process that becomes a worker: ``begin_anew``, while other threads may send.

        Returns:
            What has the rest of that sent, in so many seconds at the most, and tells the account
            of all until then.
        """
        with self._starting:
            if self._batcher is None and len(self._buffer):
                self._start()
            batcher, account, starting = self._batcher, self._account, self._starting
            if batcher:
                self._transport = self._spool = None  # these it closes
            self.begin_anew()
            self._starting = starting  # others may wait for it

        def end(timeout: float) -> dict[str, int]:
            if batcher:
                batcher.close(timeout)
            return account()

        return end

    def _settled(self) -> None:
        if self._encode == self._first_encode:
            self._settle()

    def _first_encode(self, point: Point) -> bytes:
        self._settle()
        return self._encode(point)

    def _begin_alone(self) -> None:
        with self._starting:
            if self._encode == self._first_encode:
                counters = Counters(1)
                stamps = make_stamps(os.getpid())
                self.begin(counters.row(0), lambda: counters.total(0), stamps, self._tags)

    def _count_left_out(self, fields: int) -> None:
        self._counters[LEFT_OUT] += fields
        self._report.warn(
            "left out",
            "%s: left out %d fields that were NaN or infinite: InfluxDB cannot store them",
            self.name,
            fields,
        )

    def _count_conflicts(self, measurement: str, conflicts: list[str]) -> None:
        self._counters[CONFLICTS] += len(conflicts)
        self._report.warn(
            "conflict",
            "%s: point %.100r: left out %d fields: %s. InfluxDB fixes a field's type at its first "
            "value: send one type, 9.0 and not 9 where 9.5 may follow, or use another name. Where "
            "types do not matter, set 'field_types': False",
            self.name,
            measurement,
            len(conflicts),
            "; ".join(conflicts)[:500],
        )

    def _say_full(self, measurement: str, field: str) -> None:
        self._report.warn(
            "types",
            "%s: field %.100r of %.100r: there are more fields than the %d on whose types the "
            "processes of a worker can agree; each of them fixes it by itself",
            self.name,
            field,
            measurement,
            TypeTable.CELLS,
        )

    def _hand_over(self, line: bytes) -> bool:
        """Count a point, and write its line to the worker; whether that took it."""
        taken, cells = False, self._counters
        begun: list[bool] = []
        try:
            taken = self._relay is not None and self._relay.put(line, begun=begun)
        finally:
            # A soft time limit may come in there, too. Counted in one statement without a call,
            # for a signal's handler runs only between two.
            taken = taken or begun != []
            cells[POINTS], cells[DROPPED] = cells[POINTS] + 1, cells[DROPPED] + (not taken)
        if not taken:
            self.say_unrelayed()
        return taken

    def say_unrelayed(self) -> None:
        """A line was counted as dropped: a warning is due."""
        self._report.warn(
            "relay", "%s: dropped a line: the worker did not take it in time", self.name
        )

    def _keep(self, line: bytes) -> None:
        self._counters[POINTS] += 1
        self._queue((line,))

    def _queue(self, lines: Sequence[bytes]) -> None:
        buffer = self._buffer
        dropped = buffer.put(lines)
        if self._batcher is None:
            self._start()
        if dropped or buffer.bytes >= self._wake_bytes or len(buffer) >= self._wake_lines:
            self._after_put(dropped)

    def _after_put(self, dropped: int) -> None:
        """The buffer is full, or there is enough in it for a batch."""
        batcher = self._batcher
        if batcher:
            batcher.wake()
        if dropped:
            self._counters[DROPPED] += dropped
            self._report.warn(
                "full", "%s: the buffer is full: dropped the oldest %d lines", self.name, dropped
            )

    def __repr__(self) -> str:
        return f"<Database {self.name!r} {self.address} started={self._batcher is not None}>"


def close_all(databases: Sequence[Database], deadline: float) -> bool:
    """Close them until ``deadline`` (``time.monotonic``); whether all that waited went out.

    All are told first, so that one hung server does not use up the others' time.
    """
    for database in databases:
        database.finish(deadline)
    closed = [database.close(max(0.0, deadline - time.monotonic())) for database in databases]
    return all(closed)


@functools.cache
def _alone() -> weakref.WeakSet[Database]:
    """The databases that no plugin tells of a fork, or of the interpreter's end."""
    databases: weakref.WeakSet[Database] = weakref.WeakSet()

    def after_fork() -> None:
        for database in list(databases):
            database.begin_anew()

    def at_exit() -> None:
        close_all(list(databases), time.monotonic() + 5.0)

    os.register_at_fork(after_in_child=after_fork)
    atexit.register(at_exit)
    return databases


def _parts_at_newlines(options: DatabaseOptions) -> bool:
    """Whether a newline ends a line for the server even where it stands in a string.

    What follows it would be a point that nobody sent. So are VictoriaMetrics and, over TCP,
    Telegraf (https://docs.victoriametrics.com/victoriametrics/integrations/influxdb/ and
    https://github.com/influxdata/telegraf/tree/master/plugins/inputs/socket_listener); QuestDB
    hangs up (https://questdb.com/docs/ingestion/ilp/columnset-types/).
    """
    return options.transport == "tcp" or options.api in _VICTORIA


def _without_newlines(encode: Callable[[Point], bytes]) -> Callable[[Point], bytes]:
    def encode_on_one_line(point: Point) -> bytes:
        line = encode(point)
        if b"\n" in line:
            raise FieldError(
                f"point {point.measurement!r:.80}: a string with a newline, which ends the line "
                "for this server; replace it"
            )
        return line

    return encode_on_one_line


def _as_point(given: object) -> Point:
    """The one point that ``given`` stands for.

    Raises:
        PointError: It stands for none.
    """
    if isinstance(given, Point):
        return Point(*given)  # of a subclass, too
    if isinstance(given, (dict, Mapping)):
        return _from_mapping(given)
    if hasattr(given, "to_line_protocol"):
        return _from_line(given)
    raise PointError(
        f"a point of type {type(given).__name__}; expected a Point, a mapping with the keys "
        f"{', '.join(_KEYS)}, an object with to_line_protocol(), or an iterable of these"
    )


def _from_mapping(given: Mapping[str, Any]) -> Point:
    if not _NEEDED <= frozenset(given) <= _ALLOWED:
        unknown = [key for key in given if key not in _KEYS]
        missing = [key for key in ("measurement", "fields") if key not in given]
        wrong = [f"unknown key {show(key)}" for key in unknown[:10]]
        if unknown[10:]:
            wrong.append(f"{len(unknown) - 10} more of these")
        wrong += [f"no {key!r}" for key in missing]
        raise PointError(
            f"a point that is a mapping has {', '.join(wrong)}; expected the keys "
            "'measurement', 'fields' and, where wanted, 'tags' and 'time'"
        )
    return Point(given["measurement"], given["fields"], given.get("tags"), given.get("time"))


def _from_line(given: Any) -> Point:
    """A point of influxdb-client's, by its own line, read again: so its rules hold as well."""
    source = f"to_line_protocol() of {type(given).__name__}"
    try:
        line = given.to_line_protocol()
        unit = str(getattr(given, "write_precision", None) or "ns")
        point: Point | None = decode(line.encode()) if line else None
    except Exception as error:  # a user's class may raise anything
        raise PointError(
            f"{source} failed: {show_caught(error)}; expected one line of text"
        ) from error
    if point is None:
        raise FieldError(
            f"{source} gave nothing, which is a point without fields; "
            "InfluxDB stores only points with at least one field"
        )
    if unit not in _UNITS:
        raise PointError(
            f"a {type(given).__name__} whose write_precision is {unit!r:.80}; "
            f"expected one of {', '.join(_UNITS)}"
        )
    if isinstance(point.timestamp, int):
        point = point._replace(timestamp=point.timestamp * _UNITS[unit])
    return point
