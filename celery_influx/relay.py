"""The pipe from pool children to their worker: a line written by a child outlives the child.

Frames, each written whole by one ``write`` of at most ``PIPE_BUF`` bytes, which POSIX makes
atomic: any number of children share the pipe without a lock, and one that is killed leaves
nothing half-written. Lengths part the frames, not newlines: a string field may hold a newline.

.. code-block:: text

    frame     length:u16 kind:u8 database:u8 body[length]
    LINE      body is the line
    FRAGMENT  body is pid:u32 serial:u32 index:u16 count:u16 kind:u8, then a part of a long body
    START     a task's run starts in a child; body is `runs.start_frame`
    END       it has ended; body is pid:u32, then the line of its point, if there is one
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
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from celery_influx.runs import Runs
from celery_influx.speedups import extension

logger = logging.getLogger(__name__)

_PIPE_BUF = 4096  # Linux's; POSIX promises 512, and macOS has that
_HEADER = struct.Struct("<HBB")
_PART = struct.Struct("<IIHHB")
_SERIAL = _PID = struct.Struct("<I")
LINE, FRAGMENT, START, END, SYNC, VERDICT = range(6)
_LONGEST = _PIPE_BUF - _HEADER.size
_LONGEST_PART = _LONGEST - _PART.size
#: A line of more parts than this has no transport either.
_MOST_PARTS = 65_535

#: The most that Linux gives users other than root, who have 64 MiB of pipes in all; and what is
#: asked for where they have used that up. A burst of a child's must find room in it, while the
#: reader waits for a busy main thread to give it the interpreter.
_CAPACITIES = (1_048_576, 262_144)
_READ = 262_144
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)


class RelayEnd(NamedTuple):
    """What a pool child's database needs of the relay.

    Attributes:
        put: As ``Relay.put``, of a line.
        put_end: As ``Relay.put_end``.
        pipe: Number of the file to write frames to.
        database: The number that goes into them.
    """

    put: Callable[[bytes], bool]
    put_end: Callable[[bytes], bool]
    pipe: int
    database: int


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
        self.owner = os.getpid()
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
        self._owed = b""  # the frame of a run's end
        self._parts: dict[tuple[int, int], tuple[int, list[bytes]]] = {}
        self._synced = 0
        self._read_all = threading.Condition()
        self._reader: threading.Thread | None = None

    # -- in the worker ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the reader's thread."""
        self._reader = threading.Thread(target=self._read, name="celery_influx relay", daemon=True)
        self._reader.start()

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
            return True
        deadline = time.monotonic() + timeout
        done = self.sync(timeout)
        reader, self._reader = self._reader, None
        # The reader sees that it is not wanted at the next frame.
        self._write(_HEADER.pack(_SERIAL.size, SYNC, 0) + _SERIAL.pack(next(self._serials)), 0.1)
        reader.join(max(0.1, deadline - time.monotonic()))
        if reader.is_alive():
            return False  # it still reads: its numbers must stay its own
        for database, _ in self._parts.values():
            self._guarded(self._lost, database)
        self._parts.clear()
        self._guarded(self._runs.close)
        self.leave()
        return done

    # -- in a forked process ---------------------------------------------------------------------

    def after_fork(self) -> None:
        """In any forked process, at once: close the end to read from.

        While anyone has it open, a child whose worker is dead would fill the pipe unheard.
        """
        self._reader = None
        self._read_fd = self._close(self._read_fd)

    def leave(self) -> None:
        """Close what is open of the pipe: this process does not write to it."""
        self._read_fd = self._close(self._read_fd)
        self._write_fd = self._close(self._write_fd)

    def end_for(self, database: int) -> RelayEnd:
        """One database's way into the pipe."""
        put, put_end = partial(self.put, database), partial(self.put_end, database)
        return RelayEnd(put, put_end, self._write_fd, database)

    def put(self, database: int, body: bytes, kind: int = LINE) -> bool:
        """Write one line for ``database``, or another ``kind`` of frame; whether it was written.

        If it was not, nobody else counts it. Waits at most ``PATIENCE`` seconds where the pipe is
        full, and not at all after something was dropped, until one gets through again. Never
        raises, whatever became of the worker.
        """
        patience = 0.0 if self._impatient else self.PATIENCE
        if self._owed and kind in (START, END):
            # The worker must hear of a run's end before it hears of the next one.
            until = time.monotonic() + patience
            if not self.put_owed(patience):
                return False
            patience = max(0.0, until - time.monotonic())
        if len(body) <= _LONGEST:
            return self._write(_HEADER.pack(len(body), kind, database) + body, patience)
        return self._put_parts(database, body, kind)

    def put_end(self, database: int, line: bytes) -> bool:
        """Write that the run in this process has ended, and with it the line of its point.

        Where the pipe is full this one frame is kept, and written before the next run starts:
        without it the worker would take a run that ended for one that was killed.
        """
        self._impatient = False  # once for each run it is worth to wait
        body = _PID.pack(os.getpid()) + line
        if self.put(database, body, END):
            return True
        if self._owed or len(body) > _LONGEST:
            return False
        self._owed = _HEADER.pack(len(body), END, database) + body
        return True

    def put_owed(self, patience: float) -> bool:
        """Write the end that could not be written before, if there is one; whether it was."""
        owed, self._owed = self._owed, b""  # at once: another thread must not write it, too
        if owed and not self._write(owed, patience):
            self._owed = owed
            return False
        return True

    def _put_parts(self, database: int, body: bytes, kind: int) -> bool:
        parts = [body[i : i + _LONGEST_PART] for i in range(0, len(body), _LONGEST_PART)]
        if len(parts) > _MOST_PARTS:
            return False
        serial = next(self._serials) % 2**32
        pid = os.getpid()
        until = time.monotonic() + self.PATIENCE
        for index, part in enumerate(parts):
            head = _HEADER.pack(_PART.size + len(part), FRAGMENT, database)
            frame = head + _PART.pack(pid, serial, index, len(parts), kind) + part
            patience = 0.0 if self._impatient else max(0.0, until - time.monotonic())
            if not self._write(frame, patience):
                # The reader counts a line that began and did not end.
                return index > 0
        return True

    def _write(self, frame: bytes, patience: float) -> bool:
        until = None
        while True:
            try:
                os.write(self._write_fd, frame)
            except BlockingIOError:
                until = until or time.monotonic() + patience
                if self._wait_for_room(until - time.monotonic()):
                    continue  # but another writer may be quicker to use it
            except OSError:
                pass  # EPIPE: the worker is gone. EBADF: this process has closed all its files.
            else:
                self._impatient = False
                return True
            self._impatient = True
            return False

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
        rest = b""
        while self._reader is me:
            self._guarded(runs.look)
            broken = [key for key in self._parts if not _alive(key[0])]
            count = 0
            try:
                count = os.readv(self._read_fd, [room])
            except BlockingIOError:
                pass
            except OSError:
                return  # closed under us: the worker is ending
            else:
                if not count:
                    return
                rest = self._take_apart(rest + room[:count] if rest else bytes(room[:count]))
            if count < _READ:
                # That was all there was: nothing more comes from who was dead before.
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

    def _take_apart(self, data: bytes) -> bytes:
        """Deliver the whole frames in ``data``; the beginning of one that is not whole yet."""
        lines: dict[int, list[bytes]] = {}
        synced = 0
        position, end = 0, len(data)
        while end - position >= 4:  # the header's size, written out: this loop is the hot one
            if extension:
                position, database, found = extension.take_lines(data, position)
                if found:
                    lines.setdefault(database, []).extend(found)
                    continue
            length, kind, database = _HEADER.unpack_from(data, position)
            start = position + 4
            if start + length > end:
                break
            position = start + length
            body = data[start:position]
            if kind == FRAGMENT:
                whole = self._join(database, body)
                if whole is None:
                    continue
                kind, body = whole
            if kind == END:
                self._guarded(self._runs.ended, *_PID.unpack_from(body))
                body = body[_PID.size :]
            if kind == LINE or (kind == END and body):
                try:
                    lines[database].append(body)
                except KeyError:
                    lines[database] = [body]
            elif kind == START:
                self._guarded(self._runs.started, body)
            elif kind == VERDICT:
                self._guarded(self._runs.judged, body)
            elif kind == SYNC:
                synced = max(synced, *_SERIAL.unpack(body))
        for database, bodies in lines.items():
            self._guarded(self._deliver, database, bodies)
        if synced:
            with self._read_all:
                self._synced = max(self._synced, synced)
                self._read_all.notify_all()
        return data[position:]

    @staticmethod
    def _guarded(call: Callable[..., object], *args: object) -> None:
        """Call it; a reader that died of an exception would leave every child with a full pipe."""
        try:
            call(*args)
        except Exception:
            logger.exception("the relay's reader goes on after an error")

    def _join(self, database: int, part: bytes) -> tuple[int, bytes] | None:
        """Keep one part of a long body; its kind and all of it, if this was the last part."""
        pid, serial, index, count, kind = _PART.unpack_from(part)
        part = part[_PART.size :]
        if index == 0:
            mine = [key for key in self._parts if key[0] == pid]
            self._forget(mine[: max(0, len(mine) - self._MOST_OPEN + 1)])
            self._parts[pid, serial] = (database, [part])
            return None
        found = self._parts.get((pid, serial))
        if found is None or len(found[1]) != index:
            return None
        found[1].append(part)
        if index + 1 < count:
            return None
        del self._parts[pid, serial]
        return kind, b"".join(found[1])

    #: A process's threads may each be in the middle of a long line.
    _MOST_OPEN = 64

    def _forget(self, broken: list[tuple[int, int]]) -> None:
        """Count and drop long lines that will not be finished."""
        for key in broken:
            found = self._parts.pop(key, None)
            if found:
                self._guarded(self._lost, found[0])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
