"""The pipe from pool children to their worker: a line written by a child outlives the child.

Frames, each written whole by one ``write`` of at most ``PIPE_BUF`` bytes, which POSIX makes
atomic: any number of children share the pipe without a lock, and one that is killed leaves
nothing half-written. Lengths part the frames, not newlines: a string field may hold a newline.

.. code-block:: text

    frame     length:u16 kind:u8 database:u8 body[length]
    LINE      body is the line
    FRAGMENT  body is pid:u32 serial:u32 index:u16 count:u16 kind:u8, then a part of a long body
    START     a task's run starts in a child; body is `runs.start_frame`
    END       it has ended; body is pid:u32 began:u64, then the line of its point, if there is one
    SYNC      body is serial:u32; written by the worker to itself, to know how far it has read
    VERDICT   what Celery made of a run that was killed; by the worker, too: `runs.verdict_frame`
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import select
import signal
import struct
import sys
import termios
import threading
import time

# What `signal.getsignal` asks, in a twentieth of its time: it is asked before each write.
from _signal import getsignal as handler_of  # type: ignore[import-not-found]
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from celery_influx.counters import DROPPED, POINTS
from celery_influx.runs import Runs, start_frame
from celery_influx.speedups import extension
from celery_influx.task_points import Facts

logger = logging.getLogger(__name__)

_PIPE_BUF = 4096  # Linux's; POSIX promises 512, and macOS has that
_HEADER = struct.Struct("<HBB")
_PART = struct.Struct("<IIHHB")
_SERIAL = struct.Struct("<I")
_END = struct.Struct("<IQ")
LINE, FRAGMENT, START, END, SYNC, VERDICT = range(6)
_END_HEADER = struct.Struct("<HBBIQ")  # both in one
_WAKE = _HEADER.pack(_SERIAL.size, SYNC, 0) + _SERIAL.pack(0)
_LONGEST = _PIPE_BUF - _HEADER.size
_LONGEST_PART = _LONGEST - _PART.size
_SHORT = _LONGEST - _END.size - _HEADER.size  # an end finds room behind it
#: A line of more parts than this has no transport either.
_MOST_PARTS = 65_535

#: The most that Linux gives users other than root, who have 64 MiB of pipes in all; and what is
#: asked for where they have used that up. A burst of a child's must find room in it, while the
#: reader waits for a busy main thread to give it the interpreter.
_CAPACITIES = (1_048_576, 262_144)
_READ = 262_144
_SIGPIPE, _DEFAULT = int(signal.SIGPIPE), int(signal.SIG_DFL)
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)

T = TypeVar("T")


class RelayEnd(NamedTuple):
    """What a pool child's database needs of the relay.

    Attributes:
        put: As ``Relay.put``, of a line; with ``begun``.
        pipe: Number of the file to write frames to.
        database: The number that goes into them.
    """

    put: Callable[..., bool]
    pipe: int
    database: int

    def sender(
        self,
        encode: Callable[[Any], bytes],
        cells: memoryview,
        reject: Callable[[Exception], None],
        put: Callable[[bytes], bool],
    ) -> Callable[[Any], None]:
        """The quickest way in for a point: a closure, since that is where Python is quickest.

        Args:
            encode: Gives a point's line.
            cells: That count it.
            reject: Called with what ``encode`` raises.
            put: Called with a line that the pipe does not take at once: counts it, and says
                whether it took it then.
        """
        _, pipe, database = self
        pack, write = _HEADER.pack, os.write
        refused = False  # the last one, by ``put``, too: it knows when one gets through again

        def send(point: Any) -> None:
            nonlocal refused
            try:
                line = encode(point)
            except Exception as error:  # noqa: BLE001 - a user's object may raise anything
                reject(error)
                return
            size = len(line)
            if refused or size > _LONGEST or handler_of(_SIGPIPE) == _DEFAULT:
                refused = not put(line)
                return
            try:
                write(pipe, pack(size, LINE, database) + line)
            except BaseException as error:
                if _is_systems(error):
                    refused = not put(line)
                    return
                # A soft time limit: nobody can tell whether it came before the write or after it.
                cells[POINTS], cells[DROPPED] = cells[POINTS] + 1, cells[DROPPED] + 1
                raise
            else:
                cells[POINTS] += 1  # up to here from the write there is no call: see `Buffer`

        return send


class Relay:
    """One pipe, made by a worker before its pool forks.

    The worker reads it in a thread that does nothing else, and never touches the network; its
    children write. Any other process calls ``leave`` and has nothing to do with it.

    Args:
        deliver: Called in the reader's thread with a database's number and lines for it.
        lost: Called in the reader's thread with a database's number for a long line of which a
            part is missing, its writer having given up or died.
        runs: Told in the reader's thread which runs start, end and are killed.
    """

    #: Longest that a child waits for room in the pipe.
    PATIENCE = 0.025
    #: Seconds in which lines gather, after the reader has found few.
    NAP = 0.01

    def __init__(
        self,
        deliver: Callable[[int, list[bytes]], None],
        lost: Callable[[int], None],
        runs: Runs,
    ) -> None:
        self._deliver = deliver
        self._lost = lost
        self._runs = runs
        self.pid = os.getpid()
        self._read_fd, self._write_fd = os.pipe()
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._pipe = self._identity(self._write_fd)
        for capacity in _CAPACITIES:
            try:
                fcntl.fcntl(self._write_fd, _F_SETPIPE_SZ, capacity)
                break
            except OSError:
                logger.debug("the relay's pipe cannot have %d bytes", capacity)
        self._serials = itertools.count(1)
        self._impatient = False
        self._owed = b""  # frames of runs' starts and ends
        self._held: deque[bytes] = deque()  # verdicts that found no room
        self._rest = b""  # the beginning of a frame
        self._parts: dict[tuple[int, int], tuple[int, list[bytes]]] = {}
        self._synced = 0
        self._read_all = threading.Condition()
        self._reader: threading.Thread | None = None
        self._was_started = False

    # -- in the worker ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the reader's thread."""
        self._was_started = True
        self._reader = threading.Thread(target=self._read, name="celery_influx relay", daemon=True)
        self._reader.start()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is in it: before there is any child, or since ``close`` delivered all."""
        return self._read_fd < 0 or not (self._was_started or self._waiting())

    def sync(self, timeout: float) -> bool:
        """Wait until all that was written before this call is delivered; whether it came to that.

        The pipe is first in, first out: so the worker writes a mark, and waits for it to arrive.
        """
        if self._reader is None:
            return False
        serial = next(self._serials)
        deadline = time.monotonic() + timeout
        mark = _HEADER.pack(_SERIAL.size, SYNC, 0) + _SERIAL.pack(serial)
        while not self._write(mark, max(0.0, deadline - time.monotonic())):
            # Closed meanwhile, or children filled what room there was.
            if self._write_fd < 0 or time.monotonic() >= deadline:
                return False
        with self._read_all:
            return self._read_all.wait_for(
                lambda: self._synced >= serial, max(0.0, deadline - time.monotonic())
            )

    def close(self, timeout: float) -> bool:
        """Deliver what is in the pipe, end the reader, close both ends. Idempotent.

        To be called when no child is left; one that is gets EPIPE from then on.
        """
        if self._reader is None:
            if not self._was_started:  # a step before ours failed: the worker never ran
                self.leave()
            return True
        deadline = time.monotonic() + timeout
        done = self.sync(timeout)
        reader, self._reader = self._reader, None
        # The reader sees that it is not wanted at the next frame.
        self._write(_WAKE, 0.1)
        reader.join(max(0.1, deadline - time.monotonic()))
        if reader.is_alive():  # it still reads: its numbers must stay its own
            logger.error(
                "the relay's reader hangs: %d bytes of children's points stay in its pipe, and "
                "runs under way have none",
                self._waiting(),
            )
            return False
        self._read_rest()
        for database, _ in self._parts.values():
            self._guarded(self._lost, database)
        self._parts.clear()
        self._take_held(len(self._held))
        self._guarded(self._runs.close)
        self.leave()
        return done

    def put_verdict(self, body: bytes) -> None:
        """In the worker: tell the reader what Celery made of a run; a ``runs.verdict_frame``."""
        if not self.put(0, body, VERDICT):
            self._held.append(body)
            # Only now, lest the reader waits; and if there still is no room, it does not.
            self._write(_WAKE, 0.0)

    # -- in a forked process ---------------------------------------------------------------------

    def after_fork(self) -> None:
        """In any forked process, at once: close the end to read from.

        While anyone has it open, a child whose worker is dead would fill the pipe unheard.
        """
        self._reader = None
        self.pid = os.getpid()
        self._read_fd = self._close(self._read_fd)

    def leave(self) -> None:
        """Close what is open of the pipe: this process does not write to it."""
        self._read_fd = self._close(self._read_fd)
        self._write_fd = self._close(self._write_fd)

    def end_for(self, database: int) -> RelayEnd:
        """One database's way into the pipe."""
        return RelayEnd(partial(self.put, database), self._write_fd, database)

    def put(
        self, database: int, body: bytes, kind: int = LINE, begun: list[bool] | None = None
    ) -> bool:
        """Write one line for ``database``, or another ``kind`` of frame; whether it was written.

        If it was not, nobody else counts it. Waits at most ``PATIENCE`` seconds where the pipe is
        full, and not at all after something was dropped, until one gets through again. Never
        raises, whatever became of the worker; but a signal's handler may: if ``begun`` is not
        empty then, the reader counts the line.
        """
        if len(body) > _LONGEST:
            return self._put_parts(database, body, kind, begun)
        patience = 0.0 if self._impatient else self.PATIENCE
        return self._write(_HEADER.pack(len(body), kind, database) + body, patience)

    def put_start(self, run_id: str | None, began: int, facts: Facts, goes_back: bool) -> None:
        """Write that a run starts in this process: a ``runs.start_frame``."""
        body = start_frame(self.pid, run_id, began, facts, goes_back)
        if len(body) > _SHORT or not self._put_at_once(_HEADER.pack(len(body), START, 0) + body):
            self._put_run(0, body, START)

    def put_end(self, database: int, began: int, line: bytes) -> bool:
        """Write that it has ended, and with it the line of its point; whether that is kept.

        Without it the worker would take a run that ended for one that was killed.
        """
        size = _END.size + len(line)
        if size <= _SHORT and self._put_at_once(
            _END_HEADER.pack(size, END, database, self.pid, began) + line
        ):
            return True
        body = _END.pack(self.pid, began)
        self._impatient = False  # once for each run it is worth to wait
        if self._put_run(database, body + line, END):
            return True
        if line:
            self._put_run(database, body, END)
        return False

    def _put_at_once(self, frame: bytes) -> bool:
        """Write such a frame where nothing stands in its way, as nearly always; whether it was."""
        if self._owed or self._impatient or handler_of(_SIGPIPE) == _DEFAULT:
            return False
        try:
            os.write(self._write_fd, frame)
        except OSError as error:
            if not _is_systems(error):
                raise
            return False
        return True

    def _put_run(self, database: int, body: bytes, kind: int) -> bool:
        """Write such a frame, or keep it to be written before the next one.

        An exception from a signal's handler may come anywhere in here, and then all is done
        again: so a frame is forgotten only after it was written, and may be written twice.
        """
        patience = 0.0 if self._impatient else self.PATIENCE
        # Where a start finds room, its end does, too, if not with its line.
        room = _PIPE_BUF - (_HEADER.size + _END.size if kind == START else 0)
        if len(self._owed) + _HEADER.size + len(body) > room:
            if not self.put_owed(patience):
                return False
            if len(body) > _LONGEST:
                return self._put_parts(database, body, kind)
        self._owed += _HEADER.pack(len(body), kind, database) + body
        self.put_owed(patience)
        return True

    def put_owed(self, patience: float) -> bool:
        """Write the starts and ends that could not be written before; whether none is left.

        Only the thread that runs tasks may do so.
        """
        if self._owed and not self._write(self._owed, patience):
            return False
        self._owed = b""
        return True

    def forget_owed(self) -> int:
        """Write these no more; how many lines of points go with them."""
        owed, self._owed = self._owed, b""
        lines = 0
        while owed:
            length, kind, _ = _HEADER.unpack_from(owed)
            lines += kind == END and length > _END.size
            owed = owed[_HEADER.size + length :]
        return lines

    def _put_parts(
        self, database: int, body: bytes, kind: int, begun: list[bool] | None = None
    ) -> bool:
        parts = [body[i : i + _LONGEST_PART] for i in range(0, len(body), _LONGEST_PART)]
        if len(parts) > _MOST_PARTS:
            return False
        serial = next(self._serials) % 2**32
        pid = self.pid
        until = time.monotonic() + self.PATIENCE
        for index, part in enumerate(parts):
            head = _HEADER.pack(_PART.size + len(part), FRAGMENT, database)
            frame = head + _PART.pack(pid, serial, index, len(parts), kind) + part
            patience = 0.0 if self._impatient else max(0.0, until - time.monotonic())
            if not self._write(frame, patience):
                if index and kind == END:
                    self._put_run(database, body[: _END.size], END)
                # The reader counts a line that began and did not end.
                return index > 0
            if begun is not None:
                begun.append(True)
        return True

    def _write(self, frame: bytes, patience: float) -> bool:
        until = None
        while True:
            try:
                if handler_of(_SIGPIPE) == _DEFAULT:
                    self._write_unharmed(frame)
                else:
                    os.write(self._write_fd, frame)
            except BlockingIOError:
                until = until or time.monotonic() + patience
                if self._wait_for_room(until - time.monotonic()):
                    continue  # but another writer may be quicker to use it
            except OSError as error:
                # EPIPE: the worker is gone. EBADF: this process has closed all its files.
                if not _is_systems(error):
                    raise
            else:
                self._impatient = False
                return True
            self._impatient = True
            return False

    def _write_unharmed(self, frame: bytes) -> None:
        """In a process that wants to die of SIGPIPE, which is not for our pipe to decide."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            os.write(self._write_fd, frame)
        except BrokenPipeError:
            if signal.SIGPIPE not in before:
                signal.sigtimedwait({signal.SIGPIPE}, 0)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _wait_for_room(self, patience: float) -> bool:
        if patience <= 0:
            return False
        poll = select.poll()  # select() cannot take numbers over 1,023
        poll.register(self._write_fd, select.POLLOUT)
        try:
            return bool(poll.poll(patience * 1000))
        except OSError:
            return False

    def _close(self, fd: int) -> int:
        """Close ``fd`` if it still is this pipe: beat closes all, and others get the numbers."""
        try:
            if fd >= 0 and self._identity(fd) == self._pipe:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
        return -1

    @staticmethod
    def _identity(fd: int) -> tuple[int, int]:
        found = os.fstat(fd)
        return found.st_dev, found.st_ino

    # -- the reader's thread ---------------------------------------------------------------------

    def _read(self) -> None:
        me = threading.current_thread()
        runs = self._runs
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        # os.read() would take so much memory for each read and give back most of it, which leaves
        # the heap in pieces: 12 MiB more, measured.
        room = memoryview(bytearray(_READ))
        while self._reader is me:
            self._guarded(runs.look)
            broken = [key for key in self._parts if not _alive(key[0])]
            held = len(self._held)
            try:
                count = self._read_once(room)
            except OSError:
                return  # closed under us: the worker is ending
            if count is None:
                return
            if count < _READ:
                # That was all there was: nothing more comes from who was dead before.
                self._take_held(held)
                self._guarded(runs.bury)
                self._guarded(self._forget, broken)
            if not count:
                # Not before each read: a busy main thread would take the interpreter twice.
                wait = runs.INTERVAL if self._parts else runs.wait
                poll.poll(None if wait is None else wait * 1_000)
            elif count < _READ // 4:
                # Else each line would wake this thread, which costs the worker more than all the
                # rest: 5 % of a no-op task, measured. A child waits longer than this for room.
                time.sleep(self.NAP)

    def _read_once(self, room: memoryview) -> int | None:
        """Deliver what there is, ``room`` at the most; how many bytes. None: nobody writes."""
        try:
            count = os.readv(self._read_fd, [room])
        except BlockingIOError:
            return 0
        if not count:
            return None
        part = room[:count]
        data = self._patiently(lambda: self._rest + part if self._rest else bytes(part))
        self._rest = self._take_apart(data)
        return count

    def _patiently(self, take: Callable[[], bytes]) -> bytes:
        """Where there is no memory, wait for it: without this no one knows where a frame begins."""
        while True:
            try:
                return take()
            except MemoryError:
                time.sleep(self.NAP)

    def _read_rest(self) -> None:
        """In the worker, in the reader's place: what was not read in time."""
        room = memoryview(bytearray(_READ))
        # Bounded: a child that is left may still write.
        for _ in range(2 * max(_CAPACITIES) // _READ):
            if not self._read_once(room):
                return

    def _waiting(self) -> int:
        """Bytes in the pipe."""
        found = fcntl.ioctl(self._read_fd, termios.FIONREAD, bytes(4))
        return int.from_bytes(found, sys.byteorder)

    def _take_held(self, count: int) -> None:
        for _ in range(count):
            self._guarded(self._runs.judged, self._held.popleft())

    def _take_apart(self, data: bytes) -> bytes:  # noqa: PLR0915 - the hot loop, in one place
        """Deliver the whole frames in ``data``; the beginning of one that is not whole yet."""
        lines: dict[int, list[bytes]] = {}
        runs = self._runs
        synced = 0
        position, end = 0, len(data)
        while True:
            try:
                while True:
                    kind = None  # of the frame that is taken: here there is none
                    if end - position < 4:  # the header's size, written out: this is the hot loop
                        break
                    if extension and data[position + 2] == LINE:
                        try:
                            after, database, found = extension.take_lines(data, position)
                        except MemoryError:
                            found = ()  # on with one line
                        if found:
                            lines.setdefault(database, []).extend(found)
                            position = after
                            continue
                    length, given, database = _HEADER.unpack_from(data, position)
                    start = position + 4
                    if start + length > end:
                        break
                    position, kind = start + length, given
                    body = data[start:position]
                    if kind == FRAGMENT:
                        whole = self._join(database, body)
                        if whole is None:
                            continue
                        kind, body = whole
                    if kind == END:
                        if not runs.ended(*_END.unpack_from(body)):
                            continue  # it was written twice
                        body = body[_END.size :]
                    if kind == LINE or (kind == END and body):
                        try:
                            lines[database].append(body)
                        except KeyError:
                            lines[database] = [body]
                    elif kind == START:
                        runs.started(body)
                    elif kind == VERDICT:
                        runs.judged(body)
                    elif kind == SYNC:
                        synced = max(synced, *_SERIAL.unpack(body))
                break
            except Exception:
                # No memory for it, no frame of ours, or a mistake of ours: on with the next one.
                logger.exception("the relay's reader goes on after a frame that it cannot read")
                if kind in (LINE, FRAGMENT, END):
                    self._guarded(self._lost, database)
        for database, bodies in lines.items():
            self._guarded(self._deliver, database, bodies)
        if synced:
            with self._read_all:
                self._synced = max(self._synced, synced)
                self._read_all.notify_all()
        return self._patiently(lambda: data[position:])

    @staticmethod
    def _guarded(call: Callable[..., T], *args: object) -> T | None:
        """Call it; a reader that died of an exception would leave every child with a full pipe."""
        try:
            return call(*args)
        except Exception:
            logger.exception("the relay's reader goes on after an error")
            return None

    def _join(self, database: int, part: bytes) -> tuple[int, bytes] | None:
        """Keep one part of a long body; its kind and all of it, if this was the last part."""
        pid, serial, index, count, kind = _PART.unpack_from(part)
        part = part[_PART.size :]
        if index == 0:
            mine = [key for key in self._parts if key[0] == pid]
            self._forget(mine[: max(0, len(mine) - self._MOST_OPEN + 1)])
            self._parts[pid, serial] = (database, [part])
            return None
        found = self._parts.pop((pid, serial), None)
        if found is None:
            return None
        if len(found[1]) == index:
            found[1].append(part)
            if index + 1 == count:
                return kind, b"".join(found[1])
        self._parts[pid, serial] = found
        return None

    #: A process's threads may each be in the middle of a long line.
    _MOST_OPEN = 64

    def _forget(self, broken: list[tuple[int, int]]) -> None:
        """Count and drop long lines that will not be finished."""
        for key in broken:
            found = self._parts.pop(key, None)
            if found:
                self._guarded(self._lost, found[0])


def _is_systems(error: BaseException) -> bool:
    """Whether a system call failed; a task's own alarm may raise a TimeoutError in here, too."""
    return isinstance(error, OSError) and error.errno is not None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
