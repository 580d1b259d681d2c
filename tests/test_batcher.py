"""Batcher: when it sends, what flush and close promise, and that nothing ends its thread."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from celery_influx.batcher import Batcher
from celery_influx.buffer import Buffer
from celery_influx.counters import COUNTERS, Counters
from celery_influx.delivery import Delivery
from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions
from celery_influx.report import Report
from celery_influx.spool import Spool
from celery_influx.transports import Transport
from celery_influx.transports.http import HTTPClient
from celery_influx.transports.udp import UDPPool
from tests.servers import wait_for

NEVER = 3600.0


class Gate:
    """A transport that keeps its payloads and when each had gone; it may be shut, or fail."""

    address = "udp://gate:1"
    confirms = False

    def __init__(self, max_bytes: int = 1_000) -> None:
        self.limit = max_bytes
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.failures: list[BaseException] = []
        self.limit_failures: list[BaseException] = []
        self.payloads: list[bytes] = []
        self.calls: list[int] = []
        self.burst = 1
        self.last_sent = 0.0
        self.seconds = 0.0
        self.closed = threading.Event()

    @property
    def max_bytes(self) -> int:
        if self.limit_failures:
            raise self.limit_failures.pop()
        return self.limit

    def write(self, *payloads: bytes) -> int:
        self.entered.set()
        self.open.wait(60)
        if self.seconds:
            time.sleep(self.seconds)
        if self.failures:
            raise self.failures.pop()
        self.payloads += payloads
        self.calls.append(len(payloads))
        self.last_sent = time.monotonic()
        return 0

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        self.closed.set()

    @property
    def lines(self) -> list[bytes]:
        return b"\n".join(self.payloads).split(b"\n") if self.payloads else []


class Setup:
    """A batcher and all that it stands on."""

    def __init__(
        self,
        transport: Transport,
        *,
        flush_interval: float = NEVER,
        batch_size: int = 5_000,
        max_lines: int = 100_000,
        spool: Path | None = None,
    ) -> None:
        self.counters = Counters(1)
        row = self.counters.row(0)
        report = Report(logging.getLogger("tests.batcher"))
        self.buffer = Buffer(max_lines, 10_000_000)
        disk = Spool("metrics", "here", str(spool), 1_000_000, row, report) if spool else None
        self.batcher = Batcher(
            "metrics",
            self.buffer,
            # Without a share of chance each wait is the longest: in one of 100 runs it was over
            # before its test was.
            Delivery("metrics", transport, row, report, spool=disk, spread=lambda: 1.0),
            row,
            report,
            batch_size=batch_size,
            flush_interval=flush_interval,
        )

    def counted(self) -> dict[str, int]:
        total = self.counters.total(0)
        return {name: total[name] for name in COUNTERS if total[name] and name != "bytes"}


@pytest.fixture
def gate() -> Iterator[Gate]:
    transport = Gate()
    yield transport
    transport.open.set()


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def one(transport: Transport, **options: object) -> Setup:
        made.append(Setup(transport, **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for each in made:
        each.batcher.close(0)


class Away:
    """A server that nobody reaches, until ``answers`` says otherwise."""

    confirms = True
    address = "http://away:1"
    max_bytes, burst = 1_000, 1

    def __init__(self, cause: str = "ECONNREFUSED") -> None:
        self.cause = cause
        self.is_back = False
        self.attempts = 0
        self.stored: list[bytes] = []

    def write(self, *payloads: bytes) -> int:
        self.attempts += 1
        if not self.is_back:
            raise SendError("not now", self.cause)
        self.stored += payloads
        return 0

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        """Nor is this."""


# -- with a spool ------------------------------------------------------------------------------


def test_what_is_on_disk_is_sent_without_a_new_line_when_the_server_is_back(make, tmp_path) -> None:
    away = Away()
    setup = make(away, spool=tmp_path, flush_interval=0.05)
    setup.buffer.put([b"first"])
    assert setup.batcher.flush(5) is False  # at once: it is on disk
    assert setup.counted()["spooled"] == 1
    away.is_back = True
    wait_for(lambda: setup.counted().get("sent"), 10, "it is sent")
    assert away.stored == [b"first"]
    setup.buffer.put([b"second"])
    assert setup.batcher.flush(5) is True


def test_while_it_catches_up_a_live_batch_with_bad_lines_loses_these_alone(make, tmp_path) -> None:
    away = Away()
    setup = make(away, spool=tmp_path, flush_interval=0.02, batch_size=3)
    setup.buffer.put([b"old"] * 1_500)
    assert setup.batcher.flush(5) is False

    def write(payload: bytes) -> int:
        time.sleep(0.002)
        if b"bad" in payload:
            raise SendError("bad lines", "400")
        away.stored += payload.split(b"\n")
        return 0

    away.write = write  # type: ignore[method-assign, assignment]
    wait_for(lambda: away.stored, 10, "it catches up")
    for number in range(5):
        setup.buffer.put([b"%d" % number, b"bad", b"good"])
        setup.batcher.flush(5)
    assert setup.batcher._delivery.is_behind
    wait_for(lambda: len(away.stored) == 1_510, 20, "all that is good is stored")
    live = [line for line in away.stored if line != b"old"]
    assert sorted(live) == sorted([*(b"%d" % n for n in range(5)), *[b"good"] * 5])
    assert setup.counted()["rejected"] == 5


def test_the_end_does_not_wait_for_a_disk_that_stands_still(make, gate: Gate, tmp_path) -> None:
    setup = make(gate, spool=tmp_path)
    spool = setup.batcher._delivery._spool
    assert spool
    stuck, go_on = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with spool._lock:
            stuck.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold_the_lock)
    thread.start()
    assert stuck.wait(5)
    gate.open.clear()
    setup.buffer.put([b"1", b"2"])
    setup.batcher.wake()
    begin = time.monotonic()
    assert setup.batcher.close(0.1) is False
    assert time.monotonic() - begin < 2
    go_on.set()
    thread.join(5)


def test_in_an_outage_the_buffer_is_empty_and_flush_has_an_attempt_made(make, tmp_path) -> None:
    away = Away()
    setup = make(away, spool=tmp_path, batch_size=5)
    delivery = setup.batcher._delivery
    delivery.FIRST_WAIT = 3_600.0
    delivery._spread = lambda: 1.0
    setup.buffer.put([b"%d" % number for number in range(50)])
    assert setup.batcher.flush(5) is False
    assert setup.counted()["spooled"] == 50
    assert away.attempts == 1
    away.is_back = True
    delivery.FIRST_WAIT = 0.0
    setup.buffer.put([b"now"])
    assert setup.batcher.flush(5) is True
    assert away.stored[0] == b"now"


def test_at_the_end_all_is_on_disk_and_the_next_one_sends_it(make, tmp_path, caplog) -> None:
    setup = make(Away(), spool=tmp_path, batch_size=5)
    setup.buffer.put([b"%d" % number for number in range(50)])
    assert setup.batcher.close(5) is False
    assert "50 lines could not be sent within 5.0 s at the end: 50 kept on disk" in caplog.text

    gate = Gate()
    gate.confirms = True
    back = make(gate, spool=tmp_path, flush_interval=0.05)
    wait_for(lambda: len(gate.lines) == 50, 10, "the next one has found them")
    assert gate.lines == [b"%d" % number for number in range(50)]
    assert back.batcher.close(5)
    assert back.counted() == {"sent": 50, "payloads": 10}


def test_lines_that_are_too_long_leave_no_empty_batch_on_disk_at_the_end(make, tmp_path) -> None:
    setup = make(Away(), spool=tmp_path)
    wait_for(lambda: setup.batcher._delivery.can_keep(1), 20, "the spool")
    setup.buffer.put([b"x" * 2_000])

    setup.batcher.close(0)

    assert setup.counted() == {"rejected": 1}
    assert list(tmp_path.glob("*/*.spool")) == []


def test_the_batch_of_an_attempt_that_hangs_at_the_end_is_on_disk_too(
    make, gate: Gate, tmp_path, caplog
) -> None:
    gate.confirms = True
    gate.open.clear()
    setup = make(gate, spool=tmp_path, batch_size=5)
    setup.buffer.put([b"%d" % number for number in range(12)])
    setup.batcher.wake()
    assert gate.entered.wait(5)
    assert setup.batcher.close(0.1) is False
    assert "12 kept on disk" in caplog.text
    assert setup.counted() == {"spooled": 12}


# -- while the server is away ------------------------------------------------------------------


def test_who_puts_lines_into_a_full_buffer_wakes_nobody_while_a_batch_waits_for_its_time(
    make,
) -> None:
    away = Away()
    setup = make(away, max_lines=10)
    batcher = setup.batcher
    batcher._delivery._retry_age = 3_600.0
    batcher._delivery.FIRST_WAIT = 3_600.0
    setup.buffer.put([b"first"])
    assert batcher.flush(0.2) is False
    wait_for(lambda: batcher._wanted, 5, "it waits for the next attempt")
    for number in range(1_000):
        setup.buffer.put([b"%d" % number])
        batcher.wake()
    assert not batcher._doze.acquire(blocking=False)  # nobody has released it
    assert away.attempts == 1


def test_lines_of_which_nobody_was_told_meanwhile_go_after_the_batch_that_waited(
    make, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: list[bytes]) -> None:
        raise OSError(errno.ENOSPC, "full")

    away = Away()
    setup = make(away, spool=tmp_path)
    batcher, buffer = setup.batcher, setup.buffer
    buffer.put([b"on disk"])
    assert batcher.flush(5) is False
    delivery = batcher._delivery
    monkeypatch.setattr(delivery._spool, "append", fail)
    buffer.put([b"held"])
    batcher.wake()
    wait_for(lambda: delivery.held and batcher._wanted, 5, "it waits for the next attempt")
    buffer.put([b"later"])
    batcher.wake()
    away.is_back = True
    wait_for(lambda: len(away.stored) == 3, 10, "all is sent")


def test_close_has_one_more_attempt_made_at_once(make) -> None:
    away = Away()
    setup = make(away, max_lines=10, batch_size=5)
    setup.batcher._delivery._retry_age = 3_600.0
    setup.batcher._delivery.FIRST_WAIT = 3_600.0
    setup.buffer.put([b"first"])
    assert setup.batcher.flush(0.2) is False
    setup.buffer.put([b"%d" % number for number in range(50)])

    away.is_back = True
    assert setup.batcher.close(5)

    assert b"\n".join(away.stored).split() == [b"first", *(b"%d" % n for n in range(40, 50))]


def test_lines_that_are_dropped_while_it_closes_do_not_end_it_before_its_time(make) -> None:
    busy = Away("503")
    setup = make(busy, max_lines=10, batch_size=5)
    setup.batcher._delivery._retry_age = 3_600.0
    setup.batcher._delivery._retry_tries = 1_000
    setup.buffer.put([b"first"])
    assert setup.batcher.flush(0.2) is False
    before = busy.attempts
    closing = threading.Thread(target=setup.batcher.close, args=(20,))
    closing.start()
    wait_for(lambda: busy.attempts > before, 5, "the attempt at its beginning")
    setup.buffer.put([b"%d" % number for number in range(50)])
    busy.is_back = True
    closing.join(30)

    assert busy.stored[0] == b"first"


# -- when it sends -----------------------------------------------------------------------------


def test_a_line_waits_no_longer_than_the_flush_interval(gate: Gate, make) -> None:
    setup = make(gate, flush_interval=0.05)

    for number in range(3):
        setup.buffer.put([b"line %d" % number])
        put = time.monotonic()
        wait_for(lambda count=number: len(gate.payloads) > count, 5)
        assert gate.last_sent - put < 1


def test_it_does_not_send_before_its_time_unless_it_is_woken(gate: Gate, make) -> None:
    setup = make(gate)

    setup.buffer.put([b"line"])
    assert not gate.entered.wait(0.1)
    setup.batcher.wake()

    wait_for(lambda: gate.payloads == [b"line"], 5)


def test_woken_it_sends_all_that_waits_and_not_one_batch_only(gate: Gate, make) -> None:
    setup = make(gate, batch_size=10)

    setup.buffer.put([b"%d" % number for number in range(1_005)])
    setup.batcher.wake()

    wait_for(lambda: len(gate.payloads) == 101, 5)
    assert gate.lines == [b"%d" % number for number in range(1_005)]
    assert {payload.count(b"\n") + 1 for payload in gate.payloads} == {10, 5}


def test_payloads_keep_to_the_transports_limit_as_it_is_at_the_time(gate: Gate, make) -> None:
    setup = make(gate)
    gate.limit = 20

    setup.buffer.put([b"0123456789"] * 3)
    assert setup.batcher.flush(5)
    gate.limit = 32
    setup.buffer.put([b"0123456789"] * 3)
    assert setup.batcher.flush(5)

    assert [len(payload) for payload in gate.payloads] == [10, 10, 10, 32]


# -- flush -------------------------------------------------------------------------------------


class Stalls:
    """While it is entered: the longest time for which this process did not get to run."""

    def __enter__(self) -> Stalls:
        self.longest = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._done.wait(0.001):
            now = time.monotonic()
            self.longest = max(self.longest, now - before - 0.001)
            before = now

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_as_many_payloads_as_the_transport_takes_go_at_once(gate: Gate, make) -> None:
    gate.burst = 3
    setup = make(gate, batch_size=2)
    setup.buffer.put([b"m f=%d" % number for number in range(9)])

    assert setup.batcher.flush(5) is True

    assert gate.calls == [3, 2]
    assert gate.lines == [b"m f=%d" % number for number in range(9)]
    assert setup.counted() == {"sent": 9, "payloads": 5}


@pytest.mark.alone
def test_flush_returns_within_20_ms_of_the_last_send_it_waited_for(make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        pool = UDPPool(DatabaseOptions(host="127.0.0.1", udp_port=port, datagram_bytes=1_000))
        last_sent = 0.0

        class Watched:
            """The pool, and when its last send was."""

            address, max_bytes, burst = pool.address, pool.max_bytes, pool.burst
            confirms = pool.confirms
            abandon, close = pool.abandon, pool.close

            def write(self, *payloads: bytes) -> int:
                nonlocal last_sent
                errors = pool.write(*payloads)
                last_sent = time.monotonic()
                return errors

        setup = make(Watched(), batch_size=100)
        receiver.settimeout(5)
        for _ in range(20):
            setup.buffer.put([b"m f=1"] * 1_000)
            with Stalls() as stalls:
                assert setup.batcher.flush(10)
                delay = time.monotonic() - last_sent
            lines = 0
            while lines < 1_000:
                lines += len(receiver.recv(65_536).strip(b"\n").split(b"\n"))

            # Where the machine gave this process no time to run, nobody could have returned.
            assert delay - stalls.longest < 0.020, (delay, stalls.longest)


def test_flush_with_nothing_waiting_is_true_at_once(gate: Gate, make) -> None:
    setup = make(gate)

    assert setup.batcher.flush(0) is True
    setup.buffer.put([b"line"])
    assert setup.batcher.flush(5) is True
    assert setup.batcher.flush(0) is True


def test_flush_waits_for_the_lines_in_the_attempt_under_way(gate: Gate, make) -> None:
    setup = make(gate)
    gate.open.clear()
    setup.buffer.put([b"line"])
    setup.batcher.wake()
    assert gate.entered.wait(5)
    assert len(setup.buffer) == 0

    assert setup.batcher.flush(0.05) is False
    gate.open.set()

    assert setup.batcher.flush(5) is True


@pytest.mark.alone
def test_flush_is_false_at_its_deadline_when_the_transport_hangs(gate: Gate, make) -> None:
    setup = make(gate)
    gate.open.clear()
    setup.buffer.put([b"line"])

    begin = time.monotonic()
    assert setup.batcher.flush(0.2) is False

    assert 0.2 <= time.monotonic() - begin < 0.5


@pytest.mark.alone
def test_flush_is_false_at_its_deadline_when_a_real_server_never_answers(make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        client = HTTPClient(
            DatabaseOptions(
                host="127.0.0.1",
                http_port=hole.getsockname()[1],
                transport="http",
                http_timeout=1.0,
            )
        )
        setup = make(client)
        setup.buffer.put([b"m f=1"])

        begin = time.monotonic()
        assert setup.batcher.flush(0.3) is False
        assert 0.3 <= time.monotonic() - begin < 0.6

        assert setup.batcher.flush(5) is False
        assert setup.counted() == {"lost": 1, "errors": 1, "errors_no_answer": 1}
        assert setup.batcher.flush(5) is True


def test_flush_is_false_where_a_line_it_waited_for_was_lost(gate: Gate, make) -> None:
    setup = make(gate)
    gate.failures.append(SendError("no", "ECONNREFUSED"))
    setup.buffer.put([b"line"])

    assert setup.batcher.flush(5) is False

    setup.buffer.put([b"line"])
    assert setup.batcher.flush(5) is True
    assert setup.counted() == {"sent": 1, "payloads": 1, "lost": 1, "errors": 1}


def test_flush_is_false_where_a_line_it_waited_for_was_too_long(gate: Gate, make) -> None:
    setup = make(gate)
    gate.limit = 10
    setup.buffer.put([b"short", b"much too long", b"short"])

    assert setup.batcher.flush(5) is False

    wait_for(lambda: gate.payloads == [b"short", b"short"], 5)
    assert setup.counted()["rejected"] == 1


def test_flush_is_false_where_the_buffer_dropped_what_it_waited_for(gate: Gate, make) -> None:
    setup = make(gate, max_lines=10, batch_size=1)
    gate.open.clear()
    setup.buffer.put([b"first"])
    setup.batcher.wake()
    assert gate.entered.wait(5)
    setup.buffer.put([b"a"] * 5)
    found = []
    waiting = threading.Thread(target=lambda: found.append(setup.batcher.flush(5)))
    waiting.start()
    time.sleep(0.05)  # until flush has seen what waits; where it has not, there is less to see

    assert setup.buffer.put([b"b"] * 10) == 5
    gate.open.set()
    waiting.join()

    assert found == [False]


def test_flushes_at_once_each_get_their_answer(gate: Gate, make) -> None:
    setup = make(gate, batch_size=1)
    answers = []
    start = threading.Barrier(8)

    def flush(number: int) -> None:
        start.wait()
        for i in range(20):
            setup.buffer.put([b"%d %d" % (number, i)])
            answers.append((setup.batcher.flush(10), b"%d %d" % (number, i) in gate.lines))

    threads = [threading.Thread(target=flush, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [(True, True)] * 160
    assert setup.counted() == {"sent": 160, "payloads": 160}


@pytest.mark.parametrize("who", ["the batcher", "a flush"])
def test_who_is_stopped_anywhere_keeps_no_other_thread_waiting(who: str, gate: Gate, make) -> None:
    """So may a signal's handler do that waits for others, as Celery's do."""
    stops, stuck = 0, []
    made: list[Setup] = []

    def use() -> None:
        made[0].buffer.put([b"other"])
        made[0].batcher.wake()
        made[0].batcher.flush(0)

    def stop(frame: FrameType, event: str, _: object) -> None:
        nonlocal stops
        stack = {each.f_code for each, _ in traceback.walk_stack(frame)}
        here = stack & {Batcher.flush.__code__, Batcher._run.__code__}
        if not made or stops > 300 or stuck or not here or use.__code__ in stack:
            return
        stops += 1
        other = threading.Thread(target=use, daemon=True)
        other.start()
        other.join(5)
        if other.is_alive():
            stuck.append((frame.f_code.co_name, event))

    if who == "the batcher":
        threading.setprofile(stop)
    setup = make(gate)
    made.append(setup)
    if who == "the batcher":
        setup.batcher.wake()
        wait_for(lambda: stops > 300 or stuck, 30, "the batcher comes along")
        threading.setprofile(None)
    else:
        gate.open.clear()
        setup.buffer.put([b"mine"])
        sys.setprofile(stop)
        setup.batcher.flush(0.05)
        sys.setprofile(None)

    assert stuck == []
    assert stops > 10


def test_flush_ends_at_once_where_close_drops_what_it_waits_for(gate: Gate, make) -> None:
    setup = make(gate, batch_size=1)
    gate.open.clear()
    setup.buffer.put([b"first"])
    setup.batcher.wake()
    assert gate.entered.wait(5)
    setup.buffer.put([b"second"])
    found = []

    def flush() -> None:
        found.append(setup.batcher.flush(30))
        found.append(time.monotonic())

    waiting = threading.Thread(target=flush)
    waiting.start()
    time.sleep(0.05)
    setup.batcher.close(0.1)
    closed = time.monotonic()
    waiting.join(10)  # while the transport still hangs
    gate.open.set()

    assert found[0] is False
    assert found[1] - closed < 5


# -- nothing ends the thread -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_any_exception_of_the_transport_is_counted_logged_and_survived(
    kind: type[BaseException], gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate)
    gate.failures += [kind("odd"), kind("odd")]

    for _ in range(2):
        setup.buffer.put([b"a", b"b"])
        assert setup.batcher.flush(5) is False
    setup.buffer.put([b"c"])
    assert setup.batcher.flush(5) is True

    assert setup.counted() == {"sent": 1, "payloads": 1, "lost": 4, "errors": 2}
    assert caplog.messages == ["metrics: sending failed unexpectedly"]
    assert f"{kind.__name__}: odd" in caplog.text


def test_where_the_limit_cannot_be_told_the_lines_wait_for_the_next_time(
    gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate, flush_interval=0.05)
    gate.limit_failures.append(UnicodeError("no such name"))
    setup.buffer.put([b"line"])

    assert setup.batcher.flush(5) is True

    assert gate.payloads == [b"line"]
    assert setup.counted() == {"sent": 1, "payloads": 1, "errors": 1}
    assert "UnicodeError: no such name" in caplog.text


# -- close -------------------------------------------------------------------------------------


def test_close_sends_all_that_waits_and_closes_the_transport(gate: Gate, make) -> None:
    setup = make(gate, batch_size=10)
    setup.buffer.put([b"line"] * 100)

    assert setup.batcher.close(5) is True

    assert len(gate.lines) == 100
    assert gate.closed.is_set()
    assert not setup.batcher._thread.is_alive()


def test_close_is_idempotent(gate: Gate, make) -> None:
    setup = make(gate)
    setup.buffer.put([b"line"])

    assert [setup.batcher.close(5) for _ in range(3)] == [True] * 3
    assert setup.counted() == {"sent": 1, "payloads": 1}


def test_close_without_time_ends_an_idle_batcher(
    gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate)

    assert setup.batcher.close(0) is True
    assert caplog.messages == []


@pytest.mark.alone
def test_close_at_its_deadline_drops_counts_and_logs_what_is_left(
    gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate, batch_size=1)
    gate.seconds = 0.01
    setup.buffer.put([b"line"] * 100)
    setup.batcher.wake()
    wait_for(lambda: len(gate.payloads) > 2, 5)
    gate.open.clear()  # in the middle of an attempt, or before the next one

    begin = time.monotonic()
    assert setup.batcher.close(0.2) is False

    assert time.monotonic() - begin < 0.5
    gate.open.set()
    setup.batcher._thread.join(5)  # the attempt that was under way at the deadline
    counted = setup.counted()
    assert counted["sent"] + counted["dropped"] == 100
    assert counted["sent"] >= 1
    # And the one whose attempt was going on.
    assert caplog.messages[-1].startswith(
        f"metrics: {counted['dropped'] + 1} lines could not be sent within 0.2 s at the end"
    )


def test_close_says_last_how_many_lines_failed_meanwhile(
    gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate, batch_size=2)
    gate.failures = [SendError("no"), SendError("no"), SendError("no")]
    setup.buffer.put([b"before"] * 2)
    assert setup.batcher.flush(5) is False
    gate.open.clear()
    gate.entered.clear()
    setup.buffer.put([b"meanwhile"] * 6)
    setup.batcher.wake()
    assert gate.entered.wait(5)  # in an attempt that fails only when close was called
    threading.Timer(0.1, gate.open.set).start()

    assert setup.batcher.close(5) is False

    counted = setup.counted()
    assert (counted["lost"], counted["sent"]) == (6, 2)
    assert caplog.messages[-1] == (
        "metrics: 4 lines could not be sent within 5.0 s at the end: 4 in attempts that failed"
    )


@pytest.mark.alone
def test_close_does_not_wait_for_a_transport_that_hangs(
    gate: Gate, make, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make(gate, batch_size=1)
    gate.open.clear()
    setup.buffer.put([b"line"] * 4)
    setup.batcher.wake()
    assert gate.entered.wait(5)

    begin = time.monotonic()
    assert setup.batcher.close(0.2) is False

    assert 0.2 <= time.monotonic() - begin < 0.5
    assert setup.counted() == {"dropped": 3}
    assert caplog.messages == [
        "metrics: an attempt to send did not end within 0.2 s",
        (
            "metrics: 4 lines could not be sent within 0.2 s at the end: "
            "3 dropped, 1 in an attempt that has not ended"
        ),
    ]


def test_a_thread_that_hung_at_close_ends_and_closes_the_transport_when_it_comes_back(
    gate: Gate, make
) -> None:
    setup = make(gate, batch_size=1)
    gate.open.clear()
    setup.buffer.put([b"line"])
    setup.batcher.wake()
    assert gate.entered.wait(5)
    assert setup.batcher.close(0.05) is False
    assert setup.batcher.hangs()

    setup.buffer.put([b"later"])
    gate.open.set()

    assert gate.closed.wait(5)
    setup.batcher._thread.join(5)
    assert not setup.batcher.hangs()
    assert gate.payloads == [b"line"]


def test_a_line_put_after_the_threads_last_look_is_sent_by_close(gate: Gate, make) -> None:
    setup = make(gate)
    setup.batcher.finish(time.monotonic() + 5)
    setup.batcher._thread.join(5)
    setup.buffer.put([b"late"])

    assert setup.batcher.close(5) is True
    assert gate.payloads == [b"late"]


class Opening:
    """Spools are opened as long as this says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        at_once = Spool.open

        def later(spool: Spool) -> None:
            self.began.set()
            self.may_end.wait(60)
            at_once(spool)

        monkeypatch.setattr(Spool, "open", later)


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opening]:
    found = Opening(monkeypatch)
    yield found
    found.may_end.set()


def test_told_to_finish_before_its_first_wait_the_thread_sends_what_there_is(
    gate: Gate, make, tmp_path: Path, opening: Opening
) -> None:
    gate.seconds = 0.1
    setup = make(gate, batch_size=1, spool=tmp_path)
    setup.buffer.put([b"line"] * 5)
    assert opening.began.wait(5)

    setup.batcher.finish(time.monotonic() + 10)
    opening.may_end.set()

    assert setup.batcher.close(10) is True
    assert setup.counted() == {"sent": 5, "payloads": 5}


def test_close_gives_up_in_time_where_the_thread_has_not_had_its_first_wait(
    gate: Gate, make, tmp_path: Path, opening: Opening
) -> None:
    gate.open.clear()
    setup = make(gate, spool=tmp_path)
    setup.buffer.put([b"line"])
    assert opening.began.wait(5)
    setup.batcher.finish(time.monotonic() + 0.5)
    opening.may_end.set()
    began = time.monotonic()

    assert setup.batcher.close(0.5) is False
    assert time.monotonic() - began < 10  # and not 60, as the transport would hang


def test_close_gives_up_in_time_where_the_spool_has_not_been_opened(
    gate: Gate, make, tmp_path: Path, opening: Opening
) -> None:
    setup = make(gate, spool=tmp_path)
    setup.buffer.put([b"line"])
    assert opening.began.wait(5)

    assert setup.batcher.close(0.1) is False
    assert setup.counted() == {"dropped": 1}


@pytest.mark.alone
def test_all_told_to_finish_first_share_one_deadline(make) -> None:
    gates = [Gate() for _ in range(3)]
    setups = [make(gate, batch_size=1) for gate in gates]
    for gate, setup in zip(gates, setups, strict=True):
        gate.open.clear()
        setup.buffer.put([b"line"] * 2)
        setup.batcher.wake()
        assert gate.entered.wait(5)
    gates[2].open.set()
    deadline = time.monotonic() + 0.3

    for setup in setups:
        setup.batcher.finish(deadline)
    closed = [setup.batcher.close(max(0.0, deadline - time.monotonic())) for setup in setups]

    assert closed == [False, False, True]
    assert time.monotonic() < deadline + 0.4
    for gate in gates:
        gate.open.set()


def test_a_batcher_on_a_buffer_of_an_earlier_one_flushes_as_the_first_did(gate: Gate, make) -> None:
    setup = make(gate)
    setup.buffer.put([b"a"] * 7)
    assert setup.batcher.close(5)
    report = Report(logging.getLogger("tests.batcher"))
    row = setup.counters.row(0)
    second = Batcher(
        "metrics",
        setup.buffer,
        Delivery("metrics", gate, row, report),
        row,
        report,
        batch_size=10,
        flush_interval=NEVER,
    )

    setup.buffer.put([b"b"])
    assert second.flush(5) is True

    assert gate.payloads[-1] == b"b"
    second.close(5)
