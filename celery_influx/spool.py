"""Batches on disk, for a server that is away: in order, bounded, and still there after a crash.

One folder per database. Each process that spools there is an *owner*, and named by when it began:

- ``OWNER.lock`` is locked for as long as the process lives, by a lock that no child inherits. In it
  stands, as a record, how far one of the owner's segments has been sent.
- ``OWNER.00000001.spool``, ...: its segments, only ever appended to, oldest first.
- ``OWNER.hand.spool``: the batch that is being sent, where that is asked for.

Who finds the lock of another owner free adopts its segments. A segment is a row of records
(``spool_records``), each a batch; what is no record is passed over. A crash may send a record
twice, but loses only the one that was being written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast
from urllib.parse import quote

from celery_influx.counters import ADOPTED, DROPPED, LOST, SPOOLED
from celery_influx.report import Report
from celery_influx.spool_records import pack, records, unpack

_LOCK, _SEGMENT, _HAND = ".lock", ".spool", "hand"
#: File systems whose locks or writes other machines, or other programs, answer for.
_SHARED = re.compile(
    r"nfs4?|cifs|smb3|smbfs|9p|afs|ceph|glusterfs|lustre|beegfs|gfs2|ocfs2|virtiofs|vboxsf"
    r"|fuse\.(sshfs|s3fs|glusterfs|rclone|gcsfuse|juicefs)"
)
#: The locks that this process has: it may not open these files again, since closing any of its
#: descriptors of a file ends its lock of it. A forked child has none of its parent's.
#: By whom they were claimed, before they are tried: two of its threads would both get a lock.
_ours: dict[tuple[int, Path], object] = {}
#: The segments that it left and had counted: it may be who adopts them.
_left: set[tuple[int, Path]] = set()


@dataclass
class _Owner:
    """A process that spooled here, and the lock of its that we have."""

    path: Path  # of its lock
    lock: int

    def sent_of(self, segment: Path, ends: Iterable[int]) -> int:
        """How many bytes of a segment, whose records have these ``ends``, have been sent.

        0 if there is any doubt: what is sent again is no loss, and what is passed over is one.
        """
        data = os.pread(self.lock, 300, 0)
        notes = [unpack(data, start, count) for start, _, count in records(data)]
        return next((end for end in ends if _note(segment, end) in notes), 0)

    def note(self, segment: Path, place: int) -> None:
        """Have it stand in the lock how much of which segment has been sent."""
        os.pwrite(self.lock, pack(_note(segment, place)), 0)

    def release(self, *, is_done: bool) -> None:
        """Let others have it; or, if all of it was sent, remove it."""
        if is_done:
            _remove(self.path)
        os.close(self.lock)
        _ours.pop((os.getpid(), self.path), None)  # not before: this would end another's lock


def _note(segment: Path, place: int) -> list[bytes]:
    return [segment.name.encode(), b"%d" % place]


@dataclass
class _Segment:
    path: Path
    owner: _Owner
    size: int
    lines: int | None = None  # not known before it is read


class Spool:
    """The batches of one database that are on disk, as soon as it is opened.

    Args:
        name: The database's name, for the log and the folder's name.
        destination: Where its lines go, and all that they are read by there. What was spooled for
            another one stays where it is.
        folder: Where all databases' folders are. Made, private, if it is not there.
        most_bytes: Of all segments, of all processes; the oldest is deleted first, those of the
            processes that live left alone.
        counters: The writer's row for this database.
        report: Where it is said what is lost or cannot be read.
        fsync: Wait until what is written would outlast a loss of power.
        clock: Seconds, monotonic.

    Attributes:
        folder: This database's own.
        bytes: Of the segments that are this process's.
        lines: That wait in them, of which it is known.

    Raises:
        OSError: By ``open``, ``append`` and ``hold``: it cannot be written there.
    """

    #: Bytes after which a segment is followed by the next.
    SEGMENT = 4_194_304
    #: Seconds between two looks for owners that have died.
    LOOK = 30.0
    #: Of whom so many are adopted at a time: each costs an open file.
    MOST_OWNERS = 50

    def __init__(
        self,
        name: str,
        destination: str,
        folder: str,
        most_bytes: int,
        counters: memoryview,
        report: Report,
        *,
        fsync: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._most_bytes = most_bytes
        self._counters = counters
        self._report = report
        self._fsync = fsync
        self._clock = clock
        self._stem = quote(name, safe="").replace(".", "%2E")
        place = blake2b(destination.encode(), digest_size=4).hexdigest()
        self.folder = Path(folder) / f"{self._stem}-{place}"
        self.bytes = self.lines = 0
        self._others = 0  # bytes of the segments of other processes, at the last look
        self._lock = threading.RLock()
        self._owners: list[_Owner] = []
        self._segments: deque[_Segment] = deque()
        self._out: int | None = None  # the last of them, if it may be appended to
        self._hand: int | None = None
        self._read: tuple[_Segment, bytes, deque[tuple[int, int, int]]] | None = None
        self._number = 0
        self._next_look = self._clock()
        self._own: _Owner

    def open(self) -> None:
        """Begin; idempotent. A disk may take its time: so not where somebody waits for a point."""
        with self._lock:
            if self._owners:
                return
            self._say_who_shares_it()
            self._own = self._begin()
            self._owners.append(self._own)
            self._say_what_is_not_sent()

    def _say_who_shares_it(self) -> None:
        kind = shared_file_system(str(self.folder))
        if kind:
            self._report.warn(
                "spool shared",
                "%s: 'spool_dir' %s is on a file system of kind %s, where locks and writes are "
                "not safe: points may be lost or sent twice; expected a folder on a local disk",
                self._name,
                self.folder.parent,
                kind,
            )

    def _say_what_is_not_sent(self) -> None:
        """What was spooled for other destinations of a database of this name."""
        ours = re.compile(rf"{re.escape(self._stem)}-[0-9a-f]{{8}}")
        files = [
            path
            for path in self.folder.parent.glob(f"*/*{_SEGMENT}")
            if ours.fullmatch(path.parent.name) and path.parent != self.folder and _size(path)
        ]
        if files:
            self._report.warn(
                "spool elsewhere",
                "%s: %d files in %s were spooled for another server or database, and wait for it",
                self._name,
                len(files),
                ", ".join(sorted({str(path.parent) for path in files})),
            )

    def _begin(self) -> _Owner:
        new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        _make_private(self.folder)
        for path in reversed(new):
            self._sync_folder(path.parent)
        while True:
            path = self.folder / f"{time.time_ns():016x}-{os.getpid()}{_LOCK}"
            lock = _locked(path)
            if lock is not None:
                # Room for notes, be the disk full by then. If it is so now, what fills it may be
                # what is here to be sent.
                with contextlib.suppress(OSError):
                    os.pwrite(lock, b" " * 300 + b"\n", 0)
                return _Owner(path, lock)

    def _begin_anew_if_removed(self) -> None:
        """Somebody has removed our files: what is gone is lost, and what is there, another's."""
        files = (self._own.lock, self._out, self._hand)
        if all(os.fstat(file).st_nlink for file in files if file is not None):
            return
        own = self._begin()  # before all else: where that fails it is tried again, the next time
        self._close_segment()
        hand, self._hand = self._hand, None
        if hand is not None:
            os.close(hand)
        gone = sum(segment.lines or 0 for segment in self._segments if not segment.path.exists())
        if self._read and not self._read[0].path.exists():
            gone += sum(count for *_, count in self._read[2])
        self._count_removed(gone)
        self._note_what_is_counted()
        for owner in self._owners:
            owner.release(is_done=False)
        self._owners = [own]
        self._segments.clear()
        self._read = None
        self.bytes = self.lines = 0
        self._own = own

    def _unsent(self) -> list[_Segment]:
        """The segments of which something is left."""
        return [*self._segments, *([self._read[0]] if self._read else [])]

    def _note_what_is_counted(self) -> None:
        """Of what is left for the next who comes."""
        counted = [segment.path for segment in self._unsent() if segment.lines is not None]
        for path in (*counted, self._path(_HAND)):
            if path.exists():
                _left.add((os.getpid(), path))

    def _count_removed(self, gone: int) -> None:
        self._counters[LOST] += gone
        self._report.warn(
            "spool removed",
            "%s: files of the spool %s were removed while in use; %d lines lost",
            self._name,
            self.folder,
            gone,
        )

    # -- writing ---------------------------------------------------------------------------------

    def append(self, lines: list[bytes]) -> None:
        """Write a batch after all others."""
        record = pack(lines)
        with self._lock:
            self._begin_anew_if_removed()
            if self._out is None or self._segments[-1].size >= self._longest_segment:
                self._open_segment()
            self._make_room(len(record))
            segment, out = self._segments[-1], cast("int", self._out)
            try:
                self._write(out, record)
            except OSError:
                os.ftruncate(out, segment.size)
                raise
            segment.size += len(record)
            segment.lines = (segment.lines or 0) + len(lines)
            self.bytes += len(record)
            self.lines += len(lines)
            self._counters[SPOOLED] += len(lines)

    @property
    def _longest_segment(self) -> int:
        return min(self.SEGMENT, self._most_bytes // 8)

    def _open_segment(self) -> None:
        self._close_segment()
        self._look_around()
        self._number += 1
        path = self._path(f"{self._number:08d}")
        self._out = _open_to_append(path)
        self._segments.append(_Segment(path, self._own, 0, 0))
        self._sync_folder(self.folder)

    def _close_segment(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            os.close(out)

    def _write(self, file: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        if self._fsync:
            os.fsync(file)

    def _sync_folder(self, folder: Path) -> None:
        """If it is asked for: what was made in it has its name there after a loss of power, too.

        Not asked for a lock: segments without one are adopted all the same.
        """
        if self._fsync:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self._own.path.stem}.{part}{_SEGMENT}"

    def hold(self, lines: list[bytes]) -> None:
        """Write the batch that is about to be sent where it is found if we end before it is."""
        with self._lock:
            self._begin_anew_if_removed()
            if self._hand is None:
                self._hand = _open_to_append(self._path(_HAND))
                self._sync_folder(self.folder)
            os.ftruncate(self._hand, 0)
            self._write(self._hand, pack(lines))

    def release(self) -> None:
        """It has been sent, or appended."""
        with self._lock:
            if self._hand is not None:
                os.ftruncate(self._hand, 0)

    def replace(self, lines: list[bytes]) -> None:
        """Write what is left of the batch that ``head`` gave after all others, and pop that."""
        with self._lock:
            if not self._read or not self._read[2]:
                self.append(lines)
                return
            waiting = self._read[2]
            start, end, count = waiting[0]
            waiting[0] = start, end, 0  # should it be in the oldest segment, and this be full
            self.lines -= count
            try:
                self.append(lines)
            except OSError:
                waiting[0] = start, end, count
                self.lines += count
                raise
            self._counters[SPOOLED] -= len(lines)  # they were before
            self.pop()

    def _look_around(self) -> None:
        """Learn what other processes have here; adopt what the dead have, if all is too much."""
        ours = {segment.path for segment in self._segments}
        if self._read:
            ours.add(self._read[0].path)
        found = (path for path in self.folder.glob(f"*{_SEGMENT}") if path not in ours)
        self._others = sum(map(_size, found))
        if self._others and self.bytes + self._others + self._longest_segment > self._most_bytes:
            self._adopt()

    def _make_room(self, size: int) -> None:
        """Delete the oldest segments until ``size`` bytes more are within the limit."""
        dropped = 0
        while self.bytes + self._others + size > self._most_bytes and (
            self._read or len(self._segments) > 1
        ):
            if self._read:
                dropped += sum(count for *_, count in self._read[2])
                self._finish_reading()
            else:
                segment = self._segments.popleft()
                if segment.lines is None:
                    with contextlib.suppress(OSError):
                        self._load(segment)
                dropped += segment.lines or 0
                self._delete(segment)
        if dropped:
            self.lines -= dropped
            self._counters[DROPPED] += dropped
            self._report.warn(
                "spool full",
                "%s: the spool %s is full: dropped the oldest %d lines",
                self._name,
                self.folder,
                dropped,
            )

    # -- reading ---------------------------------------------------------------------------------

    def head(self) -> list[bytes] | None:
        """The oldest batch; None where none waits."""
        with self._lock:
            while True:
                if self._read:
                    _, data, waiting = self._read
                    if waiting:
                        start, _, count = waiting[0]
                        return unpack(data, start, count)
                    self._finish_reading()
                elif self._segments:
                    if not self._read_next():
                        if self._is_time_to_look():
                            self._adopt()  # for the next time: it may stay unreadable
                        return None
                elif not self._is_time_to_look() or not self._adopt():
                    return None

    def pop(self) -> None:
        """The batch that ``head`` gave is done with."""
        with self._lock:
            if self._read and self._read[2]:
                segment, _, waiting = self._read
                _, end, count = waiting.popleft()
                self.lines -= count
                if waiting:
                    try:
                        segment.owner.note(segment.path, end)
                    except OSError as error:
                        self._warn_of(error)
                else:
                    self._finish_reading()

    def _read_next(self) -> bool:
        segment = self._segments.popleft()
        if not self._segments:
            self._close_segment()
        try:
            self._read = segment, *self._load(segment)
        except FileNotFoundError:
            gone = segment.lines or 0
            self.lines -= gone
            self._delete(segment)
            self._count_removed(gone)
        except OSError as error:  # it may be better by and by
            self._warn_of(error)
            self._close_segment()
            self._segments.append(segment)
            return False
        return True

    def _load(self, segment: _Segment) -> tuple[bytes, deque[tuple[int, int, int]]]:
        """Read a segment, and count its lines if they are not yet counted."""
        data = segment.path.read_bytes()
        found = deque(records(data))
        sent = segment.owner.sent_of(segment.path, [end for _, end, _ in found])
        while found and found[0][0] < sent:
            found.popleft()
        whole = sum(end - start for start, end, _ in found)
        if whole < len(data) - sent:
            self._report.warn(
                "spool damaged",
                "%s: passed over %d bytes of %s that are no whole batch: they were being written "
                "when a process or the machine ended",
                self._name,
                len(data) - sent - whole,
                segment.path,
            )
        lines = sum(count for *_, count in found)
        if segment.lines is None:
            if (os.getpid(), segment.path) not in _left:
                self._counters[ADOPTED] += lines
            self.lines += lines
        else:
            self._counters[LOST] += segment.lines - lines
            self.lines -= segment.lines - lines
        segment.lines = lines
        return data, found

    def _finish_reading(self) -> None:
        read, self._read = self._read, None
        if read:
            self._delete(read[0])

    def _delete(self, segment: _Segment) -> None:
        self.bytes -= segment.size
        _remove(segment.path)
        owner = segment.owner
        if owner is not self._own and all(each.owner is not owner for each in self._segments):
            self._owners.remove(owner)
            owner.release(is_done=True)

    def _is_time_to_look(self) -> bool:
        if self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + self.LOOK
        return True

    def _adopt(self) -> bool:
        """Take over the segments of owners that have died; whether there are any."""
        try:
            files = list(self.folder.iterdir())
        except OSError as error:
            self._warn_of(error)
            return False
        owners = {path.name.partition(".")[0] for path in files if path.suffix in (_LOCK, _SEGMENT)}
        for owner in sorted(owners):
            if len(self._owners) > self.MOST_OWNERS:
                self._next_look = self._clock()  # for the rest
                break
            self._adopt_from(self.folder / f"{owner}{_LOCK}")
        return bool(self._segments)

    def _adopt_from(self, path: Path) -> None:
        try:
            lock = _locked(path)
        except OSError as error:
            self._warn_of(error)
            return
        if lock is None:
            return
        owner = _Owner(path, lock)
        try:
            # Only now: until it was ours, another may have removed some. By what raises where the
            # folder cannot be read, unlike `glob`: that would be no segments.
            files = [
                each
                for each in self.folder.iterdir()
                if each.name.startswith(f"{path.stem}.") and each.suffix == _SEGMENT
            ]
        except OSError as error:
            owner.release(is_done=False)  # for the next look
            self._warn_of(error)
            return
        found = [_Segment(file, owner, _size(file)) for file in sorted(files)]
        if found:
            self._owners.append(owner)
            # Before our own, which are younger; after those that were adopted before.
            own = [segment for segment in self._segments if segment.owner is self._own]
            adopted = [segment for segment in self._segments if segment.owner is not self._own]
            self._segments = deque([*adopted, *found, *own])
            size = sum(segment.size for segment in found)
            self.bytes += size
            self._others = max(0, self._others - size)
        else:
            owner.release(is_done=True)

    def _warn_of(self, error: OSError) -> None:
        self._report.warn(
            "spool", "%s: the spool %s cannot be read: %s", self._name, self.folder, error
        )

    # -- the end ---------------------------------------------------------------------------------

    def is_free(self, timeout: float) -> bool:
        """Whether no other thread is at the disk for longer than ``timeout`` seconds."""
        if not self._lock.acquire(timeout=timeout):
            return False
        self._lock.release()
        return True

    def close(self) -> None:
        """Give back files and locks; what waits is for the next who comes."""
        with self._lock:
            self._close_segment()
            hand, self._hand = self._hand, None
            if hand is not None:
                is_empty = not os.fstat(hand).st_size
                os.close(hand)
                if is_empty:
                    _remove(self._path(_HAND))
            if self._owners:
                self._note_what_is_counted()
            waiting = self._unsent()
            for owner in self._owners:
                is_own = owner is self._own and not self._path(_HAND).exists()
                owner.release(
                    is_done=is_own and all(segment.owner is not owner for segment in waiting)
                )
            self._owners.clear()
            self._segments.clear()
            self._read = None

    def abandon(self) -> None:
        """In a forked child: close its copies. The locks are the parent's alone."""
        for descriptor in (self._out, self._hand, *(owner.lock for owner in self._owners)):
            if descriptor is not None:
                with contextlib.suppress(OSError):  # the fork came in the middle of `close`
                    os.close(descriptor)
        self._out = self._hand = None
        self._owners.clear()


def _locked(path: Path) -> int | None:
    """The file, made if it is not there, and locked; None if somebody else has it."""
    ours, claim = (os.getpid(), path), object()
    if _ours.setdefault(ours, claim) is not claim:
        return None
    lock = None
    try:
        lock = _locked_file(path)
    finally:
        if lock is None:
            del _ours[ours]
    return lock


def _locked_file(path: Path) -> int | None:
    """The same, where no other thread of this process tries it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have removed it in between: then it is locked, and another is not.
        if os.path.samestat(path.stat(), os.fstat(lock)):
            return lock
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass  # another's, or gone
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone meanwhile
        return 0


def _make_private(folder: Path) -> None:
    """Make the folder, for nobody but us."""
    folder.parent.mkdir(0o700, parents=True, exist_ok=True)
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(
                f"{folder} is no folder of this user's; expected one, or a 'spool_dir' in which it "
                "can be made"
            ) from None
        folder.chmod(0o700)


def _open_to_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone already; or it is found again, and sent twice
        path.unlink()


def shared_file_system(folder: str, mounts: str = "/proc/self/mountinfo") -> str:
    """The kind of the file system of ``folder``, if other machines may use it, too; else ""."""
    kinds = {}
    with contextlib.suppress(OSError):
        # As bytes: the kernel escapes spaces and newlines, but not all at which text is parted.
        for line in filter(None, Path(mounts).read_bytes().split(b"\n")):
            before, _, after = line.partition(b" - ")
            place = before.split(b" ")[4].decode("unicode_escape").encode("latin-1")
            kinds[Path(os.fsdecode(place))] = os.fsdecode(after.split(b" ")[0])
    path = Path(folder).resolve()
    kind = next((kinds[place] for place in (path, *path.parents) if place in kinds), "")
    return kind if _SHARED.fullmatch(kind) else ""
