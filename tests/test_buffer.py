"""Buffer against a plain list as model; then many threads, and puts from inside of puts."""

from __future__ import annotations

import inspect
import random
import signal
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from celery_influx.buffer import Buffer as PythonBuffer
from celery_influx.buffer import joined
from celery_influx.speedups import extension

BUFFERS = [PythonBuffer, *([extension.Buffer] if extension else [])]
both = pytest.mark.parametrize("Buffer", BUFFERS, ids=lambda kind: kind.__module__)

MAX_LINES, MAX_BYTES = 7, 40


def size(lines: list[bytes]) -> int:
    return sum(len(line) + 1 for line in lines)


class BufferAgainstModel(RuleBasedStateMachine):
    """What a list would do, said as plainly as can be."""

    Buffer = PythonBuffer

    def __init__(self) -> None:
        super().__init__()
        self.buffer = self.Buffer(MAX_LINES, MAX_BYTES)
        self.model: list[bytes] = []
        self.put = self.dropped = self.taken = 0

    @rule(lines=st.lists(st.binary(max_size=50), max_size=9))
    def put_lines(self, lines: list[bytes]) -> None:
        self.put += len(lines)
        self.model += lines
        dropped = 0
        while len(self.model) > MAX_LINES or size(self.model) > MAX_BYTES:
            self.model.pop(0)
            dropped += 1
        self.dropped += dropped

        assert self.buffer.put(lines) == dropped

    @rule(max_lines=st.integers(1, 10), max_bytes=st.integers(0, 60))
    def take(self, max_lines: int, max_bytes: int) -> None:
        expected: list[bytes] = []
        too_long = 0
        while self.model and len(expected) < max_lines:
            if len(self.model[0]) > max_bytes:
                self.model.pop(0)
                too_long += 1
            elif len(b"\n".join([*expected, self.model[0]])) <= max_bytes:
                expected.append(self.model.pop(0))
            else:
                break
        self.taken += len(expected) + too_long

        assert self.buffer.take(max_lines, max_bytes) == (expected, too_long)

    @rule()
    def clear(self) -> None:
        self.dropped += len(self.model)

        assert self.buffer.clear() == len(self.model)
        self.model = []

    @invariant()
    def counts_are_exact(self) -> None:
        assert len(self.buffer) == len(self.model) <= MAX_LINES
        assert self.buffer.bytes == size(self.model) <= MAX_BYTES
        assert self.buffer.put_lines == self.put
        assert self.buffer.taken == self.taken
        assert self.buffer.dropped == self.dropped


class QuickBufferAgainstModel(BufferAgainstModel):
    """The one that is in use."""

    Buffer = BUFFERS[-1]


BufferAgainstModel.TestCase.settings = settings(max_examples=150, deadline=None)
QuickBufferAgainstModel.TestCase.settings = settings(max_examples=150, deadline=None)
TestBufferAgainstModel = BufferAgainstModel.TestCase
TestQuickBufferAgainstModel = QuickBufferAgainstModel.TestCase


@both
def test_full_buffer_drops_the_oldest_line(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(2, 1_000)

    dropped = buffer.put([b"a", b"b", b"c"])

    assert dropped == buffer.dropped == 1
    assert buffer.take(10, 100) == ([b"b", b"c"], 0)


@both
def test_bytes_are_a_limit_of_their_own_with_a_newline_for_each_line(
    Buffer: type[PythonBuffer],
) -> None:
    buffer = Buffer(100, 10)

    assert buffer.put([b"1234", b"5678"]) == 0
    assert buffer.bytes == 10
    assert buffer.put([b""]) == 1
    assert buffer.take(10, 100) == ([b"5678", b""], 0)


@both
def test_repr_tells_how_full_it_is(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(3, 50)

    buffer.put([b"abc"])

    assert repr(buffer) == "<Buffer lines=1/3 bytes=4/50>"


@both
@settings(deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30), max_size=40),
    max_lines=st.integers(1, 10),
    max_bytes=st.integers(1, 100),
)
def test_taking_all_gives_whole_lines_in_order_and_never_too_many(
    Buffer: type[PythonBuffer], lines: list[bytes], max_lines: int, max_bytes: int
) -> None:
    buffer = Buffer(1_000, 100_000)
    buffer.put(lines)
    payloads, too_long = [], 0

    while len(buffer):
        taken, refused = buffer.take(max_lines, max_bytes)
        assert taken or refused
        payloads.append(taken)
        too_long += refused

    assert all(len(payload) <= max_lines for payload in payloads)
    assert all(len(b"\n".join(payload)) <= max_bytes for payload in payloads)
    fitting = [line for line in lines if len(line) <= max_bytes]
    assert [line for payload in payloads for line in payload] == fitting
    assert too_long == len(lines) - len(fitting)
    assert buffer.bytes == 0


@both
def test_a_line_longer_than_a_payload_is_refused_and_its_neighbours_are_not(
    Buffer: type[PythonBuffer],
) -> None:
    buffer = Buffer(1_000, 100_000)
    buffer.put([b"ab", b"0123456789", b"cd", b"ef"])

    assert buffer.take(10, 5) == ([b"ab", b"cd"], 1)
    assert buffer.take(10, 5) == ([b"ef"], 0)


@pytest.mark.parametrize("max_lines", [1_000_000, 50])
@both
def test_with_many_writers_and_a_reader_nothing_is_lost_doubled_or_miscounted(
    Buffer: type[PythonBuffer], max_lines: int
) -> None:
    buffer = Buffer(max_lines, 10_000_000)
    writers, rounds = 6, 3_000
    dropped = [0] * writers
    taken: list[bytes] = []
    done = threading.Event()

    def write(number: int) -> None:
        for i in range(rounds):
            dropped[number] += buffer.put(
                [b"%d %d" % (number, 2 * i), b"%d %d" % (number, 2 * i + 1)]
            )

    def read() -> None:
        while not done.is_set() or len(buffer):
            taken.extend(buffer.take(random.randint(1, 100), 1_000)[0])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    reader = threading.Thread(target=read)
    for thread in [reader, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()

    assert buffer.put_lines == writers * rounds * 2
    assert buffer.dropped == sum(dropped)
    assert len(taken) == buffer.taken == buffer.put_lines - buffer.dropped
    assert len(set(taken)) == len(taken)
    assert buffer.bytes == len(buffer) == 0
    if max_lines == 1_000_000:
        assert buffer.dropped == 0
    for number in range(writers):
        mine = [int(line.split()[1]) for line in taken if line.startswith(b"%d " % number)]
        assert mine == sorted(mine)


class Nested(bytes):
    """A line that puts another one whenever its length is asked for: at the worst moment."""

    buffer: PythonBuffer
    puts = 0
    dropped = 0

    def __len__(self) -> int:
        Nested.puts += 1
        dropped = Nested.buffer.put([b"x" * 9])
        Nested.dropped += dropped
        return super().__len__()


@pytest.mark.parametrize(("max_lines", "max_bytes"), [(1_000, 100_000), (4, 1_000), (1_000, 60)])
def test_a_put_from_inside_a_put_or_a_take_neither_blocks_nor_spoils_the_count(
    max_lines: int, max_bytes: int
) -> None:
    buffer = Nested.buffer = PythonBuffer(max_lines, max_bytes)
    Nested.puts = Nested.dropped = 0
    put = dropped = taken = 0

    for i in range(200):
        lines = [Nested(b"a" * (i % 70)) for _ in range(i % 4)]
        dropped += buffer.put(lines)
        put += len(lines)
        if i % 5 == 0:
            found, too_long = buffer.take(3, 30)
            taken += len(found) + too_long
        if i % 50 == 49:
            dropped += buffer.clear()

    assert Nested.puts > 100
    assert buffer.put_lines == put + Nested.puts
    assert buffer.dropped == dropped + Nested.dropped
    assert buffer.taken == taken
    assert buffer.put_lines == buffer.dropped + buffer.taken + len(buffer)
    assert len(buffer) <= max_lines
    left = list(buffer._lines)
    assert buffer.bytes == sum(bytes.__len__(line) + 1 for line in left)


class Waiting(bytes):
    """A line that, whenever its length is asked for, waits for another thread to put one."""

    buffer: PythonBuffer

    def __len__(self) -> int:
        other = threading.Thread(target=Waiting.buffer.put, args=([b"other"],), daemon=True)
        other.start()
        other.join(5)
        assert not other.is_alive(), "it waits for this thread"
        return super().__len__()


def test_who_is_stopped_in_the_middle_of_a_put_or_a_take_keeps_no_other_thread_waiting() -> None:
    buffer = Waiting.buffer = PythonBuffer(3, 1_000)

    for line in (b"a", b"b", b"c"):
        buffer.put([Waiting(line)])
    taken, _ = buffer.take(2, 100)
    buffer.clear()

    assert buffer.put_lines == buffer.dropped + len(taken) + len(buffer) > 6
    assert len(buffer) <= 3


@both
def test_a_signal_handler_may_put_at_any_moment(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(50, 2_000)
    handled = 0

    def handler(*_: object) -> None:
        nonlocal handled
        handled += 1
        buffer.put([b"signal"] * 3)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0002)
    try:
        puts = taken = 0
        while handled < 1_000:
            buffer.put([b"abc", b"d" * (puts % 90)])
            puts += 1
            if puts % 7 == 0:
                lines, too_long = buffer.take(5, 100)
                taken += len(lines) + too_long
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert buffer.put_lines == puts * 2 + handled * 3
    assert buffer.put_lines == buffer.dropped + taken + len(buffer)
    left = buffer.take(1_000, 1_000_000)[0]
    assert buffer.bytes == 0
    assert len(left) <= 50
    assert size(left) <= 2_000


@pytest.mark.skipif(extension is None, reason="the extension is not built: pip install -e .")
def test_what_is_no_line_is_refused_and_what_came_before_it_stays() -> None:
    buffer = BUFFERS[-1](10, 1_000)

    with pytest.raises(TypeError):
        buffer.put([b"a", 5])  # type: ignore[list-item]
    assert buffer.take(10, 100) == ([b"a"], 0)
    assert len(buffer) == 0


@both
def test_a_large_buffer_that_was_emptied_works_on(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(1_000_000, 10_000_000)
    for first in range(0, 100_000, 1_000):
        buffer.put([b"%d" % number for number in range(first, first + 1_000)])

    taken: list[bytes] = []
    while len(buffer):
        taken += buffer.take(999, 100_000)[0]
    assert taken == [b"%d" % number for number in range(100_000)]
    for number in range(1_000):
        buffer.put([b"%d" % number])
        assert buffer.take(1, 10) == ([b"%d" % number], 0)


@both
def test_a_waiting_line_costs_at_most_150_bytes_beyond_its_own(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(100_000, 100_000_000)

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(50_000):
        buffer.put([b"%0130d" % number])
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    assert 130 < grown / 50_000 < 130 + 150


@both
def test_what_is_taken_is_joined_and_parts_again_where_it_was_joined(
    Buffer: type[PythonBuffer],
) -> None:
    buffer = Buffer(10, 1_000)
    put = [b"a", b"", b"b\nc", b"longer than all the others", b"\n", b""]

    buffer.put(put)
    lines, too_long = buffer.take(10, 25)

    fitting = [line for line in put if len(line) <= 25]
    assert (list(lines), too_long) == (fitting, 1)
    assert joined(lines) == joined(list(lines)) == b"\n".join(fitting)
    assert [lines[number] for number in range(5)] == fitting
    with pytest.raises(IndexError):
        lines[5]


@both
def test_lines_of_any_length_come_out_as_they_went_in(Buffer: type[PythonBuffer]) -> None:
    rng = random.Random(1)
    lengths = [0, 1, 65_000, 65_503, 65_504, 65_505, 65_506, 65_512, 65_513, 65_536, 300_000]
    buffer, model = Buffer(1_000, 10_000_000), list[bytes]()

    for _ in range(400):
        line = bytes([rng.randrange(256)]) * rng.choice([*lengths, *[130] * 30])
        buffer.put([line])
        model.append(line)
        if rng.random() < 0.3:
            taken, _ = buffer.take(rng.choice([1, 2, 7, 1_000]), 10_000_000)
            assert list(taken) == model[: len(taken)]
            del model[: len(taken)]
    assert buffer.bytes == size(model)
    assert buffer.take(1_000, 10_000_000) == (model, 0)


@both
def test_of_many_lines_those_that_find_room_are_the_last_ones(Buffer: type[PythonBuffer]) -> None:
    buffer = Buffer(3_000, 300_000)

    for number in range(20_000):
        buffer.put([b"%0129d" % number])

    left, _ = buffer.take(20_000, 10_000_000)
    assert [int(line) for line in left] == list(range(20_000 - 300_000 // 130, 20_000))
    assert buffer.dropped == 20_000 - len(left)


@pytest.mark.parametrize("length", [130, 10_000_000])
@both
def test_an_emptied_buffer_gives_back_what_a_burst_took(
    Buffer: type[PythonBuffer], length: int
) -> None:
    buffer = Buffer(100_000, 100_000_000)

    tracemalloc.start()
    for _ in range(2):
        for _ in range(30_000_000 // length // 3):
            buffer.put([bytes(length)])
        while buffer.take(1_000, 20_000_000)[0]:
            pass
        assert traced() < 150_000
    buffer.put([bytes(130) for _ in range(1_000)])
    del buffer
    left = traced()
    tracemalloc.stop()

    assert left < 10_000


def traced() -> int:
    """Bytes taken from here or from the buffer's module, and by no other thread of the process."""
    files = [tracemalloc.Filter(True, name) for name in (__file__, inspect.getfile(PythonBuffer))]
    snapshot = tracemalloc.take_snapshot().filter_traces(files)
    return sum(trace.size for trace in snapshot.traces)


def test_who_sends_calls_for_a_batch_once_and_again_after_it_was_taken() -> None:
    buffer = PythonBuffer(5, 10_000)
    called: list[int] = []
    failures: list[Exception] = []

    def call(dropped: int) -> None:
        called.append(dropped)
        if failures:
            raise failures.pop()

    cells = memoryview(bytearray(8)).cast("Q")
    send = buffer.sender(bytes, cells, 3, 10_000, failures.append, call)

    def put(count: int) -> None:
        for _ in range(count):
            send(b"line")

    put(4)
    assert called == [0]
    put(3)
    assert called == [0, 1, 1]  # each that was dropped is told
    for take in (lambda: buffer.take(10, 10_000), buffer.clear):
        take()
        called.clear()
        put(2)
        assert called == []
        failures.append(KeyError("one"))
        with pytest.raises(KeyError):
            put(1)
        put(2)
        assert called == [0, 0]  # what failed is called again, and then no more
    assert cells[0] == 17
