"""Relay between real forked processes: whole lines whoever dies, and nobody ever held up."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import resource
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_influx.counters import Counters
from celery_influx.database import Database
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.relay import END, LINE, SYNC, Relay
from celery_influx.runs import Runs, verdict_frame
from celery_influx.speedups import extension
from celery_influx.stamps import make_stamps
from celery_influx.task_points import Facts
from tests.no_memory import without_memory
from tests.python_only import python_only
from tests.servers import wait_for

F_GETPIPE_SZ = getattr(fcntl, "F_GETPIPE_SZ", 1032)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and Linux's pipes")


FACTS: Facts = (("t", "q", "w"), 0, None, None, None)


class Sink:
    """What the relay delivered, and of what it said that it was lost."""

    def __init__(self) -> None:
        self.lines: dict[int, list[bytes]] = {}
        self.lost: list[int] = []
        self.killed: list[tuple[object, ...]] = []
        self.failures: list[Exception] = []
        self.open = threading.Event()
        self.open.set()

    def deliver(self, database: int, lines: list[bytes]) -> None:
        self.open.wait(60)
        self.lines.setdefault(database, []).extend(lines)
        if self.failures:
            raise self.failures.pop()

    def lose(self, database: int) -> None:
        self.lost.append(database)

    def write(self, *run: object) -> None:
        self.killed.append(run)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def relay(sink: Sink) -> Iterator[Relay]:
    made = Relay(sink.deliver, sink.lose, Runs(sink.write))
    yield made
    sink.open.set()
    made.close(5)
    made.leave()


def start(relay: Relay, run_id: str) -> int:
    """Write that a run starts; when, by which it is known."""
    began = time.time_ns()
    relay.put_start(run_id, began, FACTS, False)
    return began


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child; the exit code is 0 if it did not raise."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # sys.stderr, if pytest's, ends unread
    finally:
        os._exit(code)


def exit_code(pid: int, timeout: float = 30) -> int:
    """What the child ended with; negative: the signal that killed it."""
    status: list[int] = []

    def ended() -> bool:
        found, value = os.waitpid(pid, os.WNOHANG)
        if found:
            status.append(value)
        return bool(found)

    try:
        wait_for(ended, timeout, "the child's end")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status[0])


LONGEST = 60_000


def line_of(writer: int, number: int) -> bytes:
    """A line of 1 to ``LONGEST`` bytes that tells whether it is whole; newlines in it."""
    rng = random.Random(writer * 1_000_003 + number)
    if number % 10 == 0:
        return bytes([rng.randrange(256)])
    size = rng.choice((10, 100, 4_000, 4_087, 4_088, 4_089, 8_172, 20_000, LONGEST))
    head = b"%d %d\n" % (writer, number)
    body = head + rng.randbytes(min(size, LONGEST - 33 - len(head))) + b"\n"
    return hashlib.sha256(body).digest() + body


def is_whole(line: bytes) -> bool:
    return len(line) == 1 or hashlib.sha256(line[32:]).digest() == line[:32]


def open_files() -> int:
    """How many file numbers this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


# -- whole lines -------------------------------------------------------------------------------


def test_every_line_of_four_children_writing_at_once_arrives_whole_and_once(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 30  # this is not about giving up
    relay.start()

    def write(writer: int) -> None:
        relay.after_fork()
        for number in range(250):
            assert relay.put(writer % 2, line_of(writer, number))

    children = [fork(lambda writer=writer: write(writer)) for writer in range(4)]
    assert [exit_code(pid) for pid in children] == [0] * 4
    assert relay.sync(10)

    for database in (0, 1):
        expected = [
            line_of(writer, number) for writer in (database, database + 2) for number in range(250)
        ]
        assert sorted(sink.lines[database]) == sorted(expected)
        sizes = [len(line) for line in expected]
        assert min(sizes) == 1
        assert max(sizes) == LONGEST
        assert sizes.count(LONGEST) > 20
    assert sink.lost == []


def test_a_long_line_of_a_child_that_has_ended_is_read_to_its_end(relay: Relay, sink: Sink) -> None:
    """Its first part, then another child's line, then its rest; it is dead when they are read."""
    begun, go_on = os.pipe(), os.pipe()
    write = relay._write

    def write_and_wait(frame: bytes, patience: float) -> bool:
        taken = write(frame, patience)
        if relay._write == write_and_wait:
            relay._write = write  # type: ignore[method-assign]
            os.write(begun[1], b".")
            os.read(go_on[0], 1)
        return taken

    def be_interrupted() -> None:
        relay.after_fork()
        relay._write = write_and_wait  # type: ignore[method-assign]
        assert relay.put(0, b"a" * 10_000)

    interrupted = fork(be_interrupted)
    os.read(begun[0], 1)
    other = fork(lambda: relay.after_fork() or relay.put(0, b"b" * 10_000))
    assert exit_code(other) == 0
    os.write(go_on[1], b".")
    assert exit_code(interrupted) == 0
    for fd in (*begun, *go_on):
        os.close(fd)
    relay.start()
    assert relay.sync(10)

    assert sorted(sink.lines[0]) == [b"a" * 10_000, b"b" * 10_000]
    assert sink.lost == []


def test_starts_and_ends_that_find_the_pipe_full_are_written_before_the_next_ones(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 0.001
    filled = fill(relay)
    began = start(relay, "00")
    size = len(relay._owed)
    # So long, with its number in two digits, that ten runs leave room for a start and not for its end.
    line = b"end %02d".ljust((4_096 - size - 6) // 10 - size - 14, b".")
    kept = [relay.put_end(1, began, line % 0)]
    kept += [relay.put_end(1, start(relay, f"{n:02}"), line % n) for n in range(1, 99)]
    assert kept == [True] * 10 + [False] * 89

    relay.start()
    wait_for(lambda: sink.lines.get(0) == filled, 10)
    assert 1 not in sink.lines
    assert relay.put_end(1, start(relay, "next"), b"the next end")
    assert relay.sync(10)
    relay.close(5)

    assert sink.lines[1] == [*(line % number for number in range(10)), b"the next end"]
    assert sink.killed == []


@pytest.mark.parametrize("size", [4_050, 6_000])
def test_an_end_whose_line_finds_no_room_is_said_without_it(
    relay: Relay, sink: Sink, size: int
) -> None:
    relay.PATIENCE = 0.001
    fill(relay)
    began = start(relay, "a")
    assert not relay.put_end(1, began, b"." * size)
    relay.start()
    assert relay.put_owed(5)
    assert relay.sync(10)
    relay.close(5)

    assert 1 not in sink.lines
    assert sink.killed == []


def test_an_end_of_whose_line_only_the_beginning_finds_room_is_said_without_it(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 0.001
    began = start(relay, "a")
    fill(relay)
    relay._rest = os.read(relay._read_fd, 20_000)  # as a reader that goes no further as yet
    assert relay.put_end(1, began, b"." * 200_000)
    relay.start()
    assert relay.put_owed(5)
    start(relay, "b")  # the child goes on
    assert relay.sync(10)
    relay.close(5)

    assert 1 not in sink.lines
    assert sink.lost == [1]
    assert [(facts, state) for facts, state, *_ in sink.killed] == [(FACTS, "FAILURE")]  # "b"


def test_the_end_that_is_owed_is_written_when_a_child_ends_in_peace(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 0.001
    fill(relay)
    assert relay.put_end(1, start(relay, "a"), b"the end")
    relay.start()

    assert relay.put_owed(5)
    assert relay.sync(10)
    relay.close(5)

    assert sink.lines[1] == [b"the end"]
    assert sink.killed == []


def test_threads_of_one_child_may_write_long_lines_at_once(relay: Relay, sink: Sink) -> None:
    relay.PATIENCE = 30
    relay.start()

    def write() -> None:
        relay.after_fork()
        answers: list[bool] = []
        threads = [
            threading.Thread(
                target=lambda writer=writer: answers.extend(
                    relay.put(0, line_of(writer, number)) for number in range(60)
                )
            )
            for writer in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [True] * 360

    assert exit_code(fork(write)) == 0
    assert relay.sync(10)

    expected = [line_of(writer, number) for writer in range(6) for number in range(60)]
    assert sorted(sink.lines[0]) == sorted(expected)
    assert sink.lost == []


@pytest.mark.parametrize(
    "size", [0, 1, 4_091, 4_092, 4_093, 8_160, 8_161, 65_535, 262_144, 300_000]
)
def test_a_line_of_any_length_arrives(relay: Relay, sink: Sink, size: int) -> None:
    relay.PATIENCE = 10
    relay.start()
    line = random.Random(size).randbytes(size)

    assert relay.put(3, line)
    assert relay.sync(10)

    assert sink.lines == {3: [line]}


def test_children_killed_at_random_leave_nothing_half_written(relay: Relay, sink: Sink) -> None:
    relay.PATIENCE = 30
    relay.start()

    def write_for_ever(writer: int) -> None:
        relay.after_fork()
        for number in range(1_000_000):
            relay.put(0, line_of(writer, number))

    def arrived() -> int:
        return len(sink.lines.get(0, ()))

    for round_ in range(15):
        before = arrived()
        children = [fork(lambda w=round_ * 2 + i: write_for_ever(w)) for i in range(2)]
        wait_for(lambda: arrived() > before, 10, "a child writes")  # noqa: B023
        time.sleep(random.uniform(0.0, 0.02))
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        assert [exit_code(pid) for pid in children] == [-signal.SIGKILL] * 2
    assert relay.put(1, b"x" * 10_000)
    assert relay.sync(10)

    assert sink.lines[1] == [b"x" * 10_000]
    assert len(sink.lines[0]) > 50
    assert all(map(is_whole, sink.lines[0]))
    assert len(sink.lost) <= 30  # at most one line of each child was under way
    wait_for(lambda: relay._parts == {}, 10)


@pytest.mark.parametrize("then", ["another long line", "close"])
def test_the_line_that_a_killed_child_was_in_the_middle_of_is_counted_once(
    relay: Relay, sink: Sink, then: str
) -> None:
    relay.PATIENCE = 30
    relay.start()

    def die_in_the_middle() -> None:
        relay.after_fork()
        write, parts = relay._write, iter(range(3))

        def write_some(frame: bytes, patience: float) -> bool:
            if next(parts, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(frame, patience)

        relay._write = write_some  # type: ignore[method-assign]
        relay.put(5, b"x" * 60_000)

    assert exit_code(fork(die_in_the_middle)) == -signal.SIGKILL
    assert relay.sync(10)
    assert sink.lines == {}

    for _ in range(3):
        if then == "close":
            assert relay.close(10)
        else:
            assert relay.put(1, b"y" * 60_000)
            assert relay.sync(10)

    assert sink.lost == [5]
    assert sink.lines == ({} if then == "close" else {1: [b"y" * 60_000] * 3})


# -- dead children -----------------------------------------------------------------------------


@pytest.fixture
def hasty(relay: Relay, sink: Sink) -> Relay:
    """A relay that looks for dead children before each read, and judges at the next look."""
    runs = Runs(sink.write, patience=0.0)
    runs.INTERVAL = 0.0
    relay._runs = runs
    return relay


def write_run(relay: Relay, lines: int, *, ends: bool) -> None:
    """In a child: a run that starts, writes so many lines of 1,000 bytes, and perhaps ends."""
    relay.after_fork()
    began = start(relay, "a")
    for number in range(lines):
        assert relay.put(0, b"%4d" % number + b"." * 996)
    if ends:
        assert relay.put_end(1, began, b"the end")
        assert not relay._owed


# Of 700 lines START is in the first read of 262,144 bytes, END in the third.
@pytest.mark.parametrize("lines", [0, 300, 700])
@pytest.mark.parametrize("ends", [True, False], ids=["it ended", "it was killed"])
def test_all_that_a_dead_child_wrote_is_read_before_its_run_is_judged(
    hasty: Relay, sink: Sink, lines: int, ends: bool
) -> None:
    if fcntl.fcntl(hasty._write_fd, F_GETPIPE_SZ) < 1_048_576:
        pytest.skip("this user's pipes have used up what Linux gives them")
    read_before: list[int] = []

    def write(*run: object) -> None:
        read_before.append(len(sink.lines.get(0, [])))
        sink.write(*run)

    hasty._runs._write = write
    assert exit_code(fork(lambda: write_run(hasty, lines, ends=ends))) == 0

    hasty.start()
    if not ends:
        wait_for(lambda: sink.killed, 10, "the killed run's point")
    assert hasty.sync(10)
    assert hasty.close(5)

    assert len(sink.lines.get(0, [])) == lines
    assert sink.lines.get(1, []) == [b"the end"] * ends
    assert read_before == [lines] * (not ends)
    assert [run[:3] for run in sink.killed] == (
        [] if ends else [(FACTS, "FAILURE", "WorkerLostError")]
    )


def test_what_a_child_writes_just_before_it_is_found_dead_is_read_before_it_is_judged(
    hasty: Relay, sink: Sink
) -> None:
    go_on = os.pipe()

    def be_slow() -> None:
        hasty.after_fork()
        began = start(hasty, "a")
        os.read(go_on[0], 1)
        assert hasty.put_end(1, began, b"the end")

    def gone(pid: int) -> bool:
        """It ends right after the reader has read all there was, and has begun to look again."""
        if not codes:
            os.write(go_on[1], b".")
            codes.append(exit_code(pid))
        return True

    codes: list[int] = []
    hasty._runs._gone = gone
    fork(be_slow)
    hasty.start()
    wait_for(lambda: codes, 10, "a look at the children")
    assert hasty.sync(10)
    assert hasty.close(5)
    for fd in go_on:
        os.close(fd)

    assert codes == [0]
    assert sink.lines == {1: [b"the end"]}
    assert sink.killed == []


# -- a full pipe -------------------------------------------------------------------------------


def fill(relay: Relay) -> list[bytes]:
    """Write until the pipe has no room, for the shortest line even; the lines written."""
    written: list[bytes] = []
    for rest in (b"." * 1_000, b""):
        while relay.put(0, line := b"%d" % len(written) + rest):
            written.append(line)
    return written


@pytest.mark.alone
def test_a_full_pipe_is_waited_for_once_and_then_lines_are_dropped_at_once(relay: Relay) -> None:
    fill(relay)
    relay._impatient = False

    begin = time.perf_counter()
    assert relay.put(0, b"." * 1_000) is False
    first = time.perf_counter() - begin
    rest = []
    for _ in range(200):
        begin = time.perf_counter()
        assert relay.put(0, b"." * 1_000) is False
        rest.append(time.perf_counter() - begin)

    assert Relay.PATIENCE <= first < 0.1
    assert sorted(rest)[100] < 0.001


def test_a_burst_gets_through_while_the_workers_main_thread_is_busy(
    relay: Relay, sink: Sink
) -> None:
    relay.start()

    def burst() -> None:
        relay.after_fork()
        assert all(relay.put(0, b"%d " % number + b"." * 20_000) for number in range(40))

    child = fork(burst)
    found = status = 0
    while not found:
        # A busy thread gives the interpreter away every 5 ms only: the reader must wait for it.
        sum(range(2_000))
        found, status = os.waitpid(child, os.WNOHANG)

    assert status == 0
    assert relay.sync(10)
    assert len(sink.lines[0]) == 40


def test_when_reading_resumes_lines_get_through_and_patience_is_back(
    relay: Relay, sink: Sink
) -> None:
    written = fill(relay)
    assert relay.put(0, b"dropped" * 200) is False

    relay.start()
    wait_for(lambda: relay.put(0, b"again"), 10)
    assert relay._impatient is False
    assert relay.sync(10)

    assert sink.lines[0] == [*written, b"again"]
    assert sink.lost == []


@pytest.mark.alone
def test_a_long_line_given_up_in_the_middle_is_counted_once_by_the_reader(
    relay: Relay, sink: Sink
) -> None:
    answers = []
    while not relay._impatient:
        begin = time.perf_counter()
        answers.append(relay.put(2, b"x" * 60_000))
        took = time.perf_counter() - begin

    assert answers == [True] * len(answers)  # of the last one the reader counts
    assert took < 0.1
    assert relay.put(2, b"x" * 60_000) is False  # of this one nobody else does

    relay.start()
    assert relay.sync(10)
    assert relay.close(10)
    assert sink.lines[2] == [b"x" * 60_000] * (len(answers) - 1)
    assert sink.lost == [2]


def opened(relay: Relay, *, with_extension: bool) -> Database:
    """A pool child's database."""
    counters = Counters(1)
    database = Database(DatabaseOptions(name="m"), settle=lambda: None)
    with contextlib.nullcontext() if with_extension else python_only():
        database.begin(
            counters.row(0),
            lambda: counters.total(0),
            make_stamps(1),
            {"host": "h"},
            relay.end_for(3),
        )
    return database


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_database_writes_its_points_and_drops_counts_and_waits_as_the_relay_says(
    with_extension: bool, relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    database = opened(relay, with_extension=with_extension)
    clock = iter(range(10**6))

    def send() -> float:
        number = next(clock)
        # Each sixth is one that the extension leaves to Python.
        value = number if number % 6 else Decimal(number)
        began = time.perf_counter()
        database.send_data(Point("m", {"f": value, "text": "x" * 400}, {"t": "v"}, number))
        return time.perf_counter() - began

    fill(relay)
    assert send() < relay.PATIENCE / 2  # something was dropped just before
    os.read(relay._read_fd, 20_000)
    assert send() < relay.PATIENCE / 2
    while not database.stats()["dropped"] > 1:
        slowest = send()  # and the last one waits
    assert relay.PATIENCE * 0.9 < slowest < relay.PATIENCE * 4
    assert send() < relay.PATIENCE / 2

    account = database.stats()
    assert account["points"] == next(clock)
    assert account["dropped"] == 3
    assert account["queued"] == account["points"] - 3 > 20
    assert caplog.messages == ["m: dropped a line: the worker did not take it in time"]


@pytest.mark.parametrize("with_extension", [True, False])
def test_points_whose_lines_are_as_long_as_a_frame_and_longer_arrive_and_count_once(
    with_extension: bool, relay: Relay, sink: Sink
) -> None:
    database = opened(relay, with_extension=with_extension)
    head = len(database.encode(Point("m", {"text": ""}, None, 1)))
    points = [
        Point("m", {"text": "x" * (length - head)}, None, 1)
        for length in (*range(4_088, 4_098), 66_000, 50)
    ]

    for point in points:
        database.send_data(point)

    relay.start()
    assert relay.sync(10)
    assert sink.lines[3] == [database.encode(point) for point in points]
    account = database.stats()
    assert (account["points"], account["dropped"]) == (len(points), 0)


@pytest.mark.parametrize("limit", [SoftTimeLimitExceeded, TimeoutError])
@pytest.mark.parametrize("with_extension", [True, False])
def test_of_a_limit_right_after_the_write_a_point_is_counted_once(
    with_extension: bool, limit: type[Exception], relay: Relay
) -> None:
    def raise_limit(*_: object) -> None:
        raise limit

    def send() -> None:
        database = opened(relay, with_extension=with_extension)
        signal.signal(signal.SIGIO, raise_limit)  # which who writes into the pipe brings about
        fcntl.fcntl(relay._read_fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(relay._read_fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)

        for number in range(1, 4):
            with pytest.raises(limit):
                database.send_data(Point("m", {"f": 1.5}))

            assert b"m,host=h f=1.5 " in os.read(relay._read_fd, 1_000)
            assert database.stats()["points"] == number

    assert exit_code(fork(send)) == 0


def raise_limit(*_: object) -> None:
    """A signal's handler, as Celery's is."""
    raise SoftTimeLimitExceeded


@pytest.mark.parametrize("place", ["right after the write", "while it waits for room"])
@pytest.mark.parametrize("with_extension", [True, False])
def test_flush_is_false_after_a_limit_that_has_dropped_a_point(
    with_extension: bool, place: str, relay: Relay
) -> None:
    def send() -> None:
        database = opened(relay, with_extension=with_extension)
        database.flush()
        signal.signal(signal.SIGIO, raise_limit)
        signal.signal(signal.SIGALRM, raise_limit)
        if place == "right after the write":
            fcntl.fcntl(relay._read_fd, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(relay._read_fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        else:
            fill(relay)
            relay.PATIENCE, relay._impatient = 20, False
            signal.setitimer(signal.ITIMER_REAL, 0.05)

        with pytest.raises(SoftTimeLimitExceeded):
            database.send_data(Point("m", {"f": 1.5}))

        dropped = database.stats()["dropped"]
        assert dropped or (with_extension and place == "right after the write")
        assert database.flush() is not bool(dropped)
        assert database.flush()

    assert exit_code(fork(send)) == 0


@pytest.mark.parametrize("with_extension", [True, False])
def test_a_long_line_in_the_middle_of_which_a_limit_comes_is_counted_once(
    with_extension: bool, relay: Relay, sink: Sink
) -> None:
    def send() -> None:
        database = opened(relay, with_extension=with_extension)
        signal.signal(signal.SIGALRM, raise_limit)
        assert fill(relay)[9] == b"9" + b"." * 1_000
        os.read(relay._read_fd, 10 * 1_005)  # these ten: room for its beginning
        relay.PATIENCE, relay._impatient = 20, False
        signal.setitimer(signal.ITIMER_REAL, 0.1)

        with pytest.raises(SoftTimeLimitExceeded):
            database.send_data(Point("m", {"text": "x" * 60_000}))

        account = database.stats()
        assert (account["points"], account["dropped"]) == (1, 0)

    assert exit_code(fork(send)) == 0
    relay.start()
    assert relay.close(10)
    assert sink.lost == [3]


@pytest.mark.parametrize("with_extension", [True, False])
def test_frames_of_all_kinds_cut_anywhere_come_out_whole_and_in_order(
    with_extension: bool, relay: Relay, sink: Sink
) -> None:
    if with_extension and not extension:
        pytest.skip("the extension is not built")
    chance = random.Random(5)
    expected: dict[int, list[bytes]] = {}
    stream = b""
    for number in range(3_000):
        kind = chance.choice([LINE, LINE, LINE, LINE, END, SYNC])
        database = chance.choice([0, 0, 0, 1, 255])
        line = b"%d\n" % number + b"y" * chance.choice([0, 1, 100, 4_000])
        body = {LINE: line, END: struct.pack("<IQ", 1, number) + line, SYNC: struct.pack("<I", 7)}[
            kind
        ]
        if kind != SYNC:
            expected.setdefault(database, []).append(line)
        stream += struct.pack("<HBB", len(body), kind, database) + body

    with contextlib.nullcontext() if with_extension else python_only():
        rest = b""
        while stream:
            cut = chance.choice([1, 3, 4, 5, 1_000, 100_000])
            rest, stream = rest + stream[:cut], stream[cut:]
            rest = relay._take_apart(rest)

    assert rest == b""
    assert sink.lines == expected


def test_a_long_line_waits_no_longer_than_a_short_one(relay: Relay) -> None:
    relay.PATIENCE = 0.05
    waits: list[float] = []

    def write(frame: bytes, patience: float) -> bool:
        waits.append(patience)
        time.sleep(min(patience, 0.02))
        return True

    relay._write = write  # type: ignore[method-assign]
    assert relay.put(0, b"x" * 60_000)

    assert waits == sorted(waits, reverse=True)
    assert waits[-1] == 0


# -- a dead worker -----------------------------------------------------------------------------


@pytest.mark.alone
def test_when_the_worker_is_killed_its_children_are_neither_held_up_nor_killed() -> None:
    read, write = os.pipe()  # for what the grandchildren tell

    def tell(text: str) -> None:
        os.write(write, text.encode() + b"\n")

    def be_worker() -> None:
        sink = Sink()
        relay = Relay(sink.deliver, sink.lose, Runs(sink.write))
        relay.start()

        def be_of_no_pool() -> None:
            relay.after_fork()
            relay.leave()
            tell(f"other {os.getpid()}")
            time.sleep(20)

        def be_pool_child() -> None:
            relay.after_fork()
            worker = os.getppid()
            assert relay.put(0, b"before")
            tell(f"child {os.getpid()}")
            wait_for(lambda: os.getppid() != worker and not relay.put(0, b"x"), 20)
            slowest = 0.0
            for number in range(2_000):
                begin = time.perf_counter()
                taken = relay.put(0, b"x" * (number * 30))
                slowest = max(slowest, time.perf_counter() - begin)
                if taken:
                    tell("taken")
            tell(f"slowest {slowest}")

        fork(be_of_no_pool)
        fork(be_pool_child)
        time.sleep(20)

    worker = fork(be_worker)
    lines = _lines_of(read)
    pids = dict(next(lines).split() for _ in range(2))
    os.kill(worker, signal.SIGKILL)
    assert exit_code(worker) == -signal.SIGKILL
    word, slowest = next(lines).split()
    os.kill(int(pids["other"]), 0)  # it lived all the time
    os.kill(int(pids["other"]), signal.SIGKILL)
    os.close(read)
    os.close(write)

    assert word == "slowest"
    assert float(slowest) < 0.1


def _lines_of(fd: int) -> Iterator[str]:
    rest = b""
    while True:
        assert select.select([fd], [], [], 20)[0], "nobody wrote"
        rest += os.read(fd, 65_536)
        while b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            yield line.decode()


def test_a_child_that_wants_to_die_of_sigpipe_does_not_die_of_ours() -> None:
    read, tell = os.pipe()

    def write() -> None:
        sink = Sink()
        relay = Relay(sink.deliver, sink.lose, Runs(sink.write))
        relay.after_fork()  # and so nobody reads
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        assert not relay.put(0, b"x")
        assert not relay.put(0, b"x" * 10_000)
        assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.write(tell, b"alive")
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")  # this is its own affair

    assert exit_code(fork(write)) == -signal.SIGPIPE
    os.close(tell)
    assert os.read(read, 10) == b"alive"
    os.close(read)


@pytest.mark.parametrize("with_extension", [True, False])
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_points_of_a_child_whose_worker_is_gone_are_dropped_whatever_it_makes_of_sigpipe(
    handler: signal.Handlers, with_extension: bool
) -> None:
    def send() -> None:
        sink = Sink()
        relay = Relay(sink.deliver, sink.lose, Runs(sink.write))
        relay.after_fork()  # and so nobody reads
        database = opened(relay, with_extension=with_extension)
        signal.signal(signal.SIGPIPE, handler)
        for length in (10, 10_000, 10):
            database.send_data(Point("m", {"text": "x" * length}))
        account = database.stats()
        assert (account["points"], account["dropped"]) == (3, 3)
        assert not database.flush()

    assert exit_code(fork(send)) == 0


# -- numbers that are somebody else's by now ---------------------------------------------------


@pytest.mark.parametrize("first", ["after_fork", "leave"])
def test_files_that_got_the_pipes_numbers_are_neither_written_to_nor_closed(
    relay: Relay, tmp_path: Path, first: str
) -> None:
    path = tmp_path / "other"
    numbers = {relay._read_fd, relay._write_fd}

    def be_beat() -> None:
        os.closerange(3, 1_024)
        opened: set[int] = set()
        while not numbers <= opened:
            opened.add(os.open(path, os.O_CREAT | os.O_RDWR))
        getattr(relay, first)()
        relay.leave()
        assert relay.put(0, b"never") is False
        assert relay.put(0, b"never" * 10_000) is False
        for number in opened:
            assert os.fstat(number).st_ino == path.stat().st_ino

    assert exit_code(fork(be_beat)) == 0
    assert path.read_bytes() == b""


def test_another_pipe_that_got_the_numbers_is_not_closed(relay: Relay) -> None:
    numbers = {relay._read_fd, relay._write_fd}

    def be_beat() -> None:
        os.closerange(3, 1_024)
        opened: set[int] = set()
        while not numbers <= opened:
            opened.update(os.pipe())
        relay.after_fork()
        relay.leave()
        for number in opened:
            os.fstat(number)

    assert exit_code(fork(be_beat)) == 0


def test_a_file_of_another_device_with_the_pipes_inode_number_is_not_closed(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat(relay._write_fd)
    values = list(real)
    values[2] = real.st_dev + 1
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result(values))

    relay._close(relay._write_fd)

    monkeypatch.undo()
    os.fstat(relay._write_fd)


def test_after_leaving_the_process_has_no_end_of_the_pipe_open(relay: Relay) -> None:
    def leave() -> None:
        read, write = relay._read_fd, relay._write_fd
        relay.after_fork()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read)
        os.fstat(write)
        relay.leave()
        relay.leave()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(write)

    assert exit_code(fork(leave)) == 0
    assert relay.put(0, b"the worker's own ends are untouched")


# -- sync and close ----------------------------------------------------------------------------


def test_sync_waits_for_all_that_was_written_before(relay: Relay, sink: Sink) -> None:
    relay.start()

    for number in range(50):
        relay.put(0, b"%d" % number)
        assert relay.sync(5)
        assert len(sink.lines[0]) == number + 1


@pytest.mark.alone
def test_sync_is_false_at_its_deadline_where_the_reader_is_held_up(
    relay: Relay, sink: Sink
) -> None:
    sink.open.clear()
    relay.start()
    relay.put(0, b"line")

    begin = time.monotonic()
    assert relay.sync(0.2) is False

    assert 0.2 <= time.monotonic() - begin < 0.5
    sink.open.set()
    assert relay.sync(5)


@pytest.mark.alone
def test_sync_is_false_where_the_pipe_is_full_and_nobody_reads(relay: Relay, sink: Sink) -> None:
    sink.open.clear()
    relay.start()
    relay.put(0, b"line")
    wait_for(lambda: not select.select([relay._read_fd], [], [], 0)[0], 5)
    fill(relay)

    begin = time.monotonic()
    assert relay.sync(0.2) is False

    assert time.monotonic() - begin < 0.5


def test_without_a_reader_sync_is_false_at_once(relay: Relay) -> None:
    begin = time.monotonic()

    assert relay.sync(5) is False

    assert time.monotonic() - begin < 1


def test_syncs_at_once_all_come_back(relay: Relay) -> None:
    relay.start()
    answers: list[bool] = []

    def sync() -> None:
        answers.extend(relay.sync(10) for _ in range(100))

    threads = [threading.Thread(target=sync) for _ in range(8)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [True] * 800
    assert time.monotonic() - begin < 9


def test_marks_that_arrive_in_another_order_than_they_were_drawn_satisfy_both(relay: Relay) -> None:
    relay._take_apart(b"\x04\x00\x04\x00\x06\x00\x00\x00" + b"\x04\x00\x04\x00\x05\x00\x00\x00")
    assert relay._synced == 6

    relay._take_apart(b"\x04\x00\x04\x00\x04\x00\x00\x00")
    assert relay._synced == 6


def test_close_delivers_what_is_in_the_pipe_and_gives_everything_back(
    relay: Relay, sink: Sink
) -> None:
    before = open_files()
    for number in range(100):
        relay.put(0, b"%d" % number)
    relay.start()

    assert relay.close(5) is True

    assert len(sink.lines[0]) == 100
    assert open_files() == before - 2
    assert not [t for t in threading.enumerate() if t.name == "celery_influx relay"]
    assert relay.close(5) is True
    assert relay.put(0, b"late") is False
    assert relay.sync(5) is False


def test_close_with_a_reader_held_up_ends_near_its_deadline_and_says_what_is_left(
    relay: Relay, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    sink.open.clear()
    relay.start()
    relay.put(0, b"line")
    wait_for(lambda: not select.select([relay._read_fd], [], [], 0)[0], 5)
    relay.put(0, b"x" * 996)

    begin = time.monotonic()
    assert relay.close(0.3) is False

    assert time.monotonic() - begin < 0.8
    marks = 2 * 8  # of the close itself
    assert f"the relay's reader hangs: {1_000 + marks} bytes of children's points" in caplog.text


def test_what_the_reader_does_not_come_to_before_the_deadline_is_delivered_all_the_same(
    relay: Relay, sink: Sink
) -> None:
    def be_slow(database: int, lines: list[bytes]) -> None:
        wait_for(lambda: relay._reader is None, 10, "the deadline is over")
        sink.deliver(database, lines)

    relay._deliver = be_slow
    relay.start()
    relay.put(0, b"first")
    wait_for(lambda: not select.select([relay._read_fd], [], [], 0)[0], 5)
    start(relay, "a")
    rest = [b"%d" % number + b"." * 1_000 for number in range(500)]
    for line in rest:
        assert relay.put(0, line)

    assert relay.close(0.2) is False

    assert sink.lines[0] == [b"first", *rest]
    assert [run[:3] for run in sink.killed] == [(FACTS, "FAILURE", "WorkerLostError")]


def test_what_celery_made_of_a_run_is_heard_where_the_pipe_is_full(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 0.001
    filled = fill(relay)
    relay.put_verdict(verdict_frame(1, "a", "REVOKED", None, FACTS))
    relay.start()
    wait_for(lambda: sink.killed, 10, "its point")
    assert sink.lines[0] == filled  # all that was said before it was heard before
    assert relay.close(5)

    assert sink.killed == [(FACTS, "REVOKED", None, None)]


def test_what_celery_made_of_a_run_is_heard_though_the_reader_does_not_come_to_it(
    relay: Relay, sink: Sink
) -> None:
    relay.PATIENCE = 0.001
    relay._deliver = lambda *_: wait_for(lambda: relay._reader is None, 10, "the deadline is over")
    relay.start()
    relay.put(0, b"first")
    wait_for(lambda: not select.select([relay._read_fd], [], [], 0)[0], 5)
    fill(relay)
    relay.put_verdict(verdict_frame(1, "a", "REVOKED", None, FACTS))
    assert relay.close(0.2) is False

    assert sink.killed == [(FACTS, "REVOKED", None, None)]


def test_a_reader_that_waits_is_woken_for_what_found_no_room_a_moment_ago(
    relay: Relay, sink: Sink
) -> None:
    relay.start()
    assert relay.sync(5)
    relay.put = lambda *_: False  # type: ignore[method-assign]
    time.sleep(2 * relay.NAP)
    relay.put_verdict(verdict_frame(1, "a", "REVOKED", None, FACTS))

    wait_for(lambda: sink.killed, 5, "its point")


# -- nothing ends the reader -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, MemoryError])
def test_whatever_delivering_raises_the_reader_reads_on_at_the_right_place(
    kind: type[Exception], relay: Relay, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    relay.PATIENCE = 30
    caplog.set_level(logging.ERROR)
    sink.failures = [kind("odd") for _ in range(20)]
    relay.start()

    def write() -> None:
        relay.after_fork()
        for number in range(300):
            assert relay.put(number % 3, line_of(0, number))

    assert exit_code(fork(write)) == 0
    assert relay.sync(10)

    found = [line for lines in sink.lines.values() for line in lines]
    assert sorted(found) == sorted(line_of(0, number) for number in range(300))
    assert sink.failures == [] or len(sink.failures) < 20
    assert "the relay's reader goes on after an error" in caplog.text


FOREIGN = {
    "a part without a head": b"\x03\x00\x01\x07abc",
    "an end without a head": b"\x03\x00\x03\x07abc",
    "a mark that is too long": b"\x05\x00\x04\x00abcde",
    "a start that is none": b"\x03\x00\x02\x00abc",
    "a verdict that is none": b"\x03\x00\x05\x00abc",
    "of no kind": b"\x03\x00\x63\x00abc",
    "a start of another shape": b"\x05\x00\x02\x00i\x01\x00\x00\x00",
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_after_a_frame_that_cannot_be_read_the_reader_reads_on(
    relay: Relay, sink: Sink, foreign: str
) -> None:
    relay.start()
    assert relay.put(0, b"before")
    os.write(relay._write_fd, FOREIGN[foreign])
    assert relay.put(0, b"after")
    assert relay.sync(5)

    assert sink.lines == {0: [b"before", b"after"]}
    assert sink.lost == ([7] if "head" in foreign else [])


def test_a_line_for_which_there_is_no_memory_is_counted_and_the_reader_reads_on() -> None:
    size = 64 << 20  # more than what malloc ever takes from memory that it has kept

    def be_worker() -> None:
        sink = Sink()
        relay = Relay(sink.deliver, sink.lose, Runs(sink.write))
        relay.PATIENCE = 60

        def write() -> None:
            relay.after_fork()
            assert relay.put(3, b"x" * size)
            assert relay.put(0, b"after")

        child = fork(write)
        # Enough for some of its parts, or for all, and not for the whole.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + size // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        relay.start()
        assert exit_code(child) == 0
        assert relay.sync(20)
        assert {k: [v[:9] for v in vs] for k, vs in sink.lines.items()} == {0: [b"after"]}
        assert sink.lost == [3]
        assert relay._parts == {}

    assert exit_code(fork(be_worker), 60) == 0


@pytest.mark.parametrize("with_extension", [True, False])
def test_for_want_of_memory_each_line_that_was_read_is_delivered_or_counted(
    with_extension: bool, sink: Sink
) -> None:
    if with_extension and not extension:
        pytest.skip("the extension is not built")
    there_is_some_again = pytest.importorskip("_testcapi").remove_mem_hooks
    frames = b"".join(b"%c\0\0\1line %d" % (6 + (number > 9), number) for number in range(20))
    before_or_after = told = 0
    for number in range(1, 60):
        delivered: deque[list[bytes]] = deque()  # which has memory for some
        lost: deque[int] = deque()

        def deliver(_: int, lines: list[bytes], to: deque[list[bytes]] = delivered) -> None:
            there_is_some_again()  # where a lambda finds none, Python 3.12 crashes
            to.append(lines)

        relay = Relay(deliver, lost.append, Runs(sink.write))
        with contextlib.nullcontext() if with_extension else python_only():
            rest = without_memory(number, partial(relay._take_apart, frames))
        relay.leave()
        if isinstance(rest, MemoryError):
            before_or_after += 1
            continue
        lines = [line for some in delivered for line in some]
        assert sorted(set(lines)) == sorted(lines)
        assert (len(lines) + len(lost), rest) == (20, b"")
        told += len(lost)
    assert before_or_after < 10
    assert told or with_extension


def test_where_there_is_no_memory_to_read_with_the_reader_waits(relay: Relay) -> None:
    answers = [MemoryError(), MemoryError(), b"data"]

    def take() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, MemoryError):
            raise answer
        return answer

    assert relay._patiently(take) == b"data"


def test_a_frame_cut_by_the_end_of_a_read_is_put_together(relay: Relay, sink: Sink) -> None:
    frames = b"".join(b"\x05\x00\x00\x01line%d" % number for number in range(10))

    for cut in range(len(frames)):
        sink.lines.clear()
        rest = relay._take_apart(frames[:cut])
        assert relay._take_apart(rest + frames[cut:]) == b""
        assert sink.lines == {1: [b"line%d" % number for number in range(10)]}


def test_lines_of_writers_that_never_finish_them_do_not_pile_up(relay: Relay) -> None:
    for serial in range(1_000):
        body = relay_part(os.getpid(), serial)
        relay._take_apart(len(body).to_bytes(2, "little") + b"\x01\x00" + body)

    assert len(relay._parts) == 64


def relay_part(pid: int, serial: int) -> bytes:
    """The first of two parts of a long line."""
    return (
        pid.to_bytes(4, "little")
        + serial.to_bytes(4, "little")
        + (0).to_bytes(2, "little")
        + (2).to_bytes(2, "little")
        + b"x"
    )
