"""Spool: batches on disk, in order and within their limit, whatever ends the process that wrote."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_influx.batcher import Batcher
from celery_influx.buffer import make_buffer
from celery_influx.counters import COUNTERS, Counters
from celery_influx.database import Database
from celery_influx.delivery import Delivery
from celery_influx.errors import SendError
from celery_influx.listener import Listener
from celery_influx.options import DatabaseOptions
from celery_influx.point import Point
from celery_influx.report import Report
from celery_influx.spool import Spool, shared_file_system
from celery_influx.spool_records import pack, records, unpack
from tests.servers import free_port, wait_for
from tests.test_delivery import BATCH, Scene, Server, failure

pytestmark = pytest.mark.once

#: Lines as they may be: with newlines, with the bytes that a record begins with, and none.
LINES = [b"a f=1", b'b f="two\nlines"', b"\xffCI1\xffCI1", b"", b"c" * 5_000]


class One:
    """A spool, what it counts, and a clock."""

    def __init__(
        self,
        folder: Path,
        *,
        most: int = 10_000_000,
        fsync: bool = False,
        destination: str = "here",
    ) -> None:
        self.now = 0.0
        self.counters = Counters(1)
        self.spool = Spool(
            "metrics",
            destination,
            str(folder),
            most,
            self.counters.row(0),
            Report(logging.getLogger("tests.spool")),
            fsync=fsync,
            clock=lambda: self.now,
        )
        self.spool.open()

    def all(self) -> list[list[bytes]]:
        """Take all that waits."""
        found = []
        while (lines := self.spool.head()) is not None:
            found.append(lines)
            self.spool.pop()
        return found

    def counted(self) -> dict[str, int]:
        total = self.counters.total(0)
        return {name: total[name] for name in COUNTERS if total[name]}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., One]]:
    made: list[One] = []

    def one(**options: int) -> One:
        made.append(One(tmp_path / "spool", **options))
        return made[-1]

    yield one
    for each in made:
        each.spool.close()


def batch(number: int, count: int = 3) -> list[bytes]:
    return [b"m,batch=%d f=%di %d" % (number, each, number) for each in range(count)]


def files(one: One) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in one.spool.folder.iterdir())


# -- records -----------------------------------------------------------------------------------


def test_a_record_gives_back_the_lines_it_was_made_of() -> None:
    data = pack(LINES) + pack([b"x"])
    first, second = records(data)
    assert unpack(data, first[0], first[2]) == LINES
    assert unpack(data, second[0], second[2]) == [b"x"]


def test_wherever_it_is_cut_off_all_records_before_are_whole() -> None:
    whole = [pack(batch(number)) for number in range(3)]
    data = b"".join(whole)
    ends = [len(b"".join(whole[: count + 1])) for count in range(3)]
    for size in range(len(data) + 1):
        found = [unpack(data, start, count) for start, _, count in records(data[:size])]
        assert found == [batch(number) for number in range(sum(end <= size for end in ends))]


def test_garbage_costs_the_records_it_falls_on_and_no_other() -> None:
    chance = random.Random(6)
    whole = [pack(batch(number)) for number in range(20)]
    starts = [len(b"".join(whole[:number])) for number in range(21)]
    for _ in range(300):
        data = bytearray(b"".join(whole))
        place = chance.randrange(len(data))
        garbage = chance.randbytes(chance.randrange(1, 300))
        data[place : place + len(garbage)] = garbage
        hit = {
            number
            for number in range(20)
            if starts[number] < place + len(garbage) and place < starts[number + 1]
        }
        found = [unpack(data, start, count) for start, _, count in records(bytes(data))]
        assert found == [batch(number) for number in range(20) if number not in hit]


def test_no_single_bit_of_a_record_can_be_another() -> None:
    data = pack(batch(0))
    for place in range(8 * len(data)):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        assert not list(records(bytes(broken)))


# -- in order and within the limit -------------------------------------------------------------


def test_batches_come_back_in_order_over_several_segments(make) -> None:
    one = make()
    one.spool.SEGMENT = 300
    for number in range(20):
        one.spool.append(batch(number))
    assert len(files(one)) > 5
    assert one.spool.lines == 60
    assert one.spool.bytes == sum(path.stat().st_size for path in one.spool.folder.glob("*.spool"))

    assert one.all() == [batch(number) for number in range(20)]

    assert files(one) == ["lock"]
    assert one.spool.lines == one.spool.bytes == 0
    assert one.counted() == {"spooled": 60}


def test_what_comes_while_it_is_read_comes_after(make) -> None:
    one = make()
    one.spool.append(batch(0))
    assert one.spool.head() == batch(0)
    one.spool.append(batch(1))
    assert one.spool.head() == batch(0)  # until it is popped
    assert one.all() == [batch(0), batch(1)]


def test_the_oldest_goes_first_when_it_is_full_and_is_counted(make, caplog) -> None:
    one = make(most=4_000)
    for number in range(200):
        one.spool.append(batch(number))
        assert sum(path.stat().st_size for path in one.spool.folder.glob("*.spool")) <= 4_000

    kept = one.all()

    assert 15 < len(kept) < 50
    assert kept == [batch(number) for number in range(200 - len(kept), 200)]
    assert one.counted() == {"spooled": 600, "dropped": 600 - 3 * len(kept)}
    assert "is full: dropped the oldest" in caplog.text


def test_it_may_be_full_while_its_oldest_batch_is_being_sent(make) -> None:
    one = make(most=2_000)
    one.spool.append(batch(0))
    assert one.spool.head() == batch(0)
    for number in range(1, 100):
        one.spool.append(batch(number))
    kept = one.all()
    assert kept == [batch(number) for number in range(100 - len(kept), 100)]
    assert one.counted()["dropped"] + 3 * len(kept) == 300


def test_files_and_folder_are_for_nobody_else(make, tmp_path: Path) -> None:
    one = make()
    one.spool.append(batch(0))
    one.spool.hold(batch(1))
    (folder,) = (tmp_path / "spool").iterdir()
    assert (
        stat.S_IMODE(folder.parent.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    )
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("place", ["link", "file"])
def test_a_folder_that_somebody_else_has_laid_there_is_not_used(tmp_path: Path, place: str) -> None:
    One(tmp_path / "spool").spool.close()
    (spot,) = (tmp_path / "spool").iterdir()
    spot.rmdir()
    if place == "link":
        spot.symlink_to(tmp_path)
    else:
        spot.write_bytes(b"")
    with pytest.raises(PermissionError, match="no folder of this user's; expected one"):
        One(tmp_path / "spool")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "Größe", "a b%"])
def test_any_name_of_a_database_makes_one_folder(tmp_path: Path, name: str) -> None:
    counters = Counters(1)
    spool = Spool(
        name, "here", str(tmp_path), 1_000_000, counters.row(0), Report(logging.getLogger("t"))
    )
    spool.open()
    assert spool.folder.parent == tmp_path
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]
    spool.close()


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As with a full disk: of what is written, what is beyond fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_on_the_disk_leaves_no_half_batch(make) -> None:
    one = make()
    one.spool.append(batch(0))
    size = one.spool.bytes
    with no_file_longer_than(size + 50), pytest.raises(OSError, match="too large"):
        one.spool.append(batch(1))
    assert one.spool.bytes == size
    one.spool.append(batch(2))
    assert one.all() == [batch(0), batch(2)]


# -- after an end ------------------------------------------------------------------------------


def test_the_next_process_sends_what_the_last_one_left_and_not_what_it_had_sent(make) -> None:
    first = make()
    first.spool.SEGMENT = 300
    for number in range(10):
        first.spool.append(batch(number))
    for number in range(4):
        assert first.spool.head() == batch(number)
        first.spool.pop()
    first.spool.close()

    second = make()
    second.spool.append(batch(10))
    assert sorted(second.all()) == sorted(batch(number) for number in range(4, 11))
    assert second.counted() == {"spooled": 3}
    assert files(second) == ["lock"]
    second.spool.close()
    assert files(second) == []


def test_who_opens_it_again_in_the_same_process_counts_its_lines_once(make) -> None:
    first = make()
    first.spool.append(batch(0))
    first.spool.close()
    second = make()
    assert second.all() == [batch(0)]
    assert second.counted() == {}


def test_of_many_dead_only_so_many_are_adopted_at_a_time(make) -> None:
    left = [make() for _ in range(12)]
    for number, each in enumerate(left):
        each.spool.append(batch(number))
        each.spool.close()
    last = make()
    last.spool.MOST_OWNERS = 5
    assert last.spool.head() == batch(0)
    assert len(last.spool._owners) == 6
    assert last.all() == [batch(number) for number in range(12)]


def test_a_segment_that_cannot_be_read_waits_and_keeps_no_other_waiting(make, caplog) -> None:
    one = make()
    one.spool.SEGMENT = 1
    one.spool.append(batch(0))
    one.spool.append(batch(1))
    path = one.spool._segments[0].path
    data = path.read_bytes()
    path.unlink()
    path.mkdir()
    assert one.all() == []
    assert "cannot be read: [Errno 21]" in caplog.text
    assert one.all() == [batch(1)]
    path.rmdir()
    path.write_bytes(data)
    assert one.all() == [batch(0)]
    assert one.counted() == {"spooled": 6}
    assert one.spool.lines == one.spool.bytes == 0


def test_a_segment_that_cannot_be_read_keeps_nobody_from_adopting(make) -> None:
    one = make()
    one.spool.append(batch(0))
    (path,) = one.spool.folder.glob("*.spool")
    path.unlink()
    path.mkdir()
    assert one.all() == []
    left = make()
    left.spool.append(batch(1))
    left.spool.close()
    for _ in range(3):
        one.now += 31
        if one.spool.head() is not None:
            break
    assert one.spool.head() == batch(1)


def test_what_is_adopted_while_another_segment_cannot_be_read_takes_no_place(make) -> None:
    for number in range(2):
        left = make()
        left.spool.append(batch(number))
        left.spool.close()
        if not number:
            (unreadable,) = left.spool.folder.glob("*.spool")
    data = unreadable.read_bytes()
    unreadable.unlink()
    unreadable.mkdir()
    one = make()
    one.spool.append(batch(2))
    assert one.all() == [batch(2)]
    assert one.all() == [batch(1)]
    one.spool.append(batch(3))
    assert one.spool.head() is None  # the other one stands behind this now
    third = make()
    third.spool.append(batch(4))
    third.spool.close()
    one.spool._adopt()
    unreadable.rmdir()
    unreadable.write_bytes(data)
    assert sorted(one.all()) == [batch(number) for number in (0, 3, 4)]


def test_one_limit_holds_for_all_processes_and_the_oldest_goes_first(make) -> None:
    """Also of processes that have ended, while this one has segments of its own."""
    for generation in range(6):
        one = make(most=20_000)
        for number in range(200):
            one.spool.append(batch(1_000 * generation + number))
        on_disk = sum(path.stat().st_size for path in one.spool.folder.glob("*.spool"))
        assert on_disk <= 20_000 + 20_000 // 8
        one.spool.close()
    last = make(most=20_000)
    kept = last.all()
    assert kept == [batch(5_200 - len(kept) + number) for number in range(len(kept))]
    assert len(kept) > 100


def test_who_takes_over_from_many_drops_nothing_that_has_room(make) -> None:
    for number in range(8):
        one = make(most=20_000)
        one.spool.append(batch(number))
        one.spool.close()
    one = make(most=20_000)
    assert one.spool.head() == batch(0)
    one.spool.append(batch(8))
    assert one.all() == [batch(number) for number in range(9)]
    assert "dropped" not in one.counted()


def test_what_was_spooled_for_another_destination_stays(tmp_path: Path, caplog) -> None:
    shop = One(tmp_path, destination="shop")
    shop.spool.append(batch(0))
    shop.spool.close()
    pay = One(tmp_path, destination="payroll")
    assert pay.all() == []
    assert "1 files in" in caplog.text
    assert "were spooled for another server or database, and wait for it" in caplog.text
    pay.spool.close()
    again = One(tmp_path, destination="shop")
    assert again.all() == [batch(0)]
    again.spool.close()


@pytest.mark.parametrize("what", ["segment", "lock", "folder"])
def test_files_that_somebody_removes_are_made_again(make, caplog, what: str) -> None:
    one = make()
    one.spool.append(batch(0))
    for path in list(one.spool.folder.iterdir()):
        if what == "folder" or path.suffix == (".lock" if what == "lock" else ".spool"):
            path.unlink()
    if what == "folder":
        one.spool.folder.rmdir()
    one.spool.append(batch(1))
    assert one.all() == [batch(1)] if what != "lock" else [batch(0), batch(1)]
    assert one.counted().get("lost", 0) == (0 if what == "lock" else 3)
    assert "were removed while in use" in caplog.text


def test_files_that_cannot_be_made_again_at_first_are_made_as_soon_as_they_can_be(make) -> None:
    one = make()
    one.spool.append(batch(0))
    shutil.rmtree(one.spool.folder)
    one.spool.folder.write_text("in the way")
    for _ in range(2):
        with pytest.raises(PermissionError):
            one.spool.append(batch(1))

    one.spool.folder.unlink()
    one.spool.append(batch(2))

    assert one.all() == [batch(2)]
    assert one.counted() == {"spooled": 6, "lost": 3}


def test_a_batch_is_held_in_a_file_that_is_there_whatever_somebody_removes(make) -> None:
    one = make()
    one.spool.hold(batch(0))
    (hand,) = one.spool.folder.glob("*.hand.spool")
    hand.unlink()
    one.spool.release()

    one.spool.hold(batch(1))

    one.spool.close()
    assert make().all() == [batch(1)]


def test_a_segment_that_somebody_removes_is_counted_when_it_is_its_turn(make, caplog) -> None:
    one = make()
    one.spool.SEGMENT = 1
    for number in range(3):
        one.spool.append(batch(number))
    (oldest, *_) = sorted(one.spool.folder.glob("*.spool"))
    oldest.unlink()
    assert one.all() == [batch(1), batch(2)]
    assert one.spool.lines == one.spool.bytes == 0
    assert one.counted() == {"spooled": 9, "lost": 3}
    assert "were removed while in use; 3 lines lost" in caplog.text


def test_what_is_being_read_when_its_lock_is_removed_is_not_lost(make) -> None:
    one = make()
    for number in range(3):
        one.spool.append(batch(number))
    assert one.spool.head() == batch(0)
    (lock,) = one.spool.folder.glob("*.lock")
    lock.unlink()
    one.spool.append(batch(3))
    assert sorted(one.all()) == [batch(number) for number in range(4)]
    assert one.counted() == {"spooled": 12}


def test_what_is_left_of_a_batch_replaces_it(make) -> None:
    one = make()
    for number in range(3):
        one.spool.append(batch(number))
    assert one.spool.head() == batch(0)
    one.spool.replace([b"rest"])
    assert one.all() == [batch(1), batch(2), [b"rest"]]
    assert one.spool.lines == one.spool.bytes == 0
    assert one.counted() == {"spooled": 9}


def test_a_note_has_its_room_before_the_disk_is_full(make) -> None:
    one = make()
    (lock,) = one.spool.folder.glob("*.lock")
    size = lock.stat().st_size
    one.spool.append(batch(0))
    one.spool.append(batch(1))
    one.spool.head()
    one.spool.pop()
    assert lock.stat().st_size == size > 100


def test_what_others_left_comes_in_the_order_in_which_they_began(make) -> None:
    left = [make() for _ in range(5)]
    for number, each in enumerate(left):
        each.spool.append(batch(number))
    for each in reversed(left):
        each.spool.close()
    assert make().all() == [batch(number) for number in range(5)]


def test_the_living_keep_theirs(make) -> None:
    first, second = make(), make()
    first.spool.append(batch(1))
    second.spool.append(batch(2))
    assert second.all() == [batch(2)]
    assert first.all() == [batch(1)]


def test_who_dies_later_is_found_later(make) -> None:
    first, second = make(), make()
    first.spool.append(batch(1))
    assert second.all() == []
    first.spool.close()
    second.now += Spool.LOOK - 1
    assert second.all() == []
    second.now += 1
    assert second.all() == [batch(1)]


def first_of_them_sent(make, batches: int) -> tuple[Path, Path]:
    """The segment and the lock of a process that has sent the first of its batches, and is gone."""
    gone = make()
    for number in range(batches):
        gone.spool.append(batch(number))
    gone.spool.head()
    gone.spool.pop()
    gone.spool.close()
    (segment,) = gone.spool.folder.glob("*.spool")
    (lock,) = gone.spool.folder.glob("*.lock")
    return segment, lock


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "lock", "no lock"])
def test_damage_never_keeps_the_next_process_from_its_start(make, caplog, damage: str) -> None:
    segment, lock = first_of_them_sent(make, 3)
    data = segment.read_bytes()
    if damage == "cut":
        segment.write_bytes(data[:-1])
    elif damage == "garbage":
        segment.write_bytes(data[:-10] + b"\xff" * 40)
    elif damage == "empty":
        segment.write_bytes(b"")
    elif damage == "lock":
        lock.write_bytes(b"\xff\x00 garbage")
    else:
        lock.unlink()

    second = make()
    found = second.all()

    sent_again = [batch(0)] if "lock" in damage else []
    rest = {"cut": [batch(1)], "garbage": [batch(1)], "empty": []}
    assert found == rest.get(damage, [*sent_again, batch(1), batch(2)])
    assert ("passed over" in caplog.text) == (damage in ("cut", "garbage"))
    assert files(second) == ["lock"]


def test_no_damage_to_the_note_of_what_was_sent_passes_over_what_was_not(make) -> None:
    """A bit of it changed, cut off, or written without a checksum, as it was once: all comes again."""
    segment, lock = first_of_them_sent(make, 4)
    data, whole = segment.read_bytes(), lock.read_bytes()
    note = whole.rstrip()
    second = make()

    def found_with(noted: bytes) -> list[list[bytes]]:
        segment.write_bytes(data)
        lock.write_bytes(noted)
        second.now += Spool.LOOK
        return second.all()

    everything = [batch(number) for number in range(4)]
    assert found_with(whole) == found_with(note) == everything[1:]
    for place in range(len(note)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            assert found_with(bytes(changed)) == everything, (place, bit)
        assert found_with(note[:place]) == everything, place
    unchecked = f"{segment.name} {len(data) // 2:012d}\n".encode()
    assert found_with(unchecked + whole[len(unchecked) :]) == everything
    assert files(second) == ["lock"]


@pytest.mark.parametrize("content", ["other batches", "fewer"])
def test_a_note_that_fits_no_end_of_a_batch_passes_over_nothing(make, content: str) -> None:
    first = make()
    for number in range(3):
        first.spool.append(batch(number))
    for _ in range(2):
        first.spool.head()
        first.spool.pop()
    first.spool.close()
    (segment,) = first.spool.folder.glob("*.spool")
    there = [batch(7, 8), batch(8)] if content == "other batches" else [batch(9)]
    segment.write_bytes(b"".join(map(pack, there)))
    assert make().all() == there


def test_a_batch_in_hand_is_found_again_unless_it_was_let_go(make) -> None:
    first = make()
    first.spool.hold(batch(1))
    first.spool.release()
    first.spool.hold(batch(2))
    first.spool.append(batch(0))
    first.spool.close()
    second = make()
    assert second.all() == [batch(0), batch(2)]
    first = make()
    first.spool.hold(batch(3))
    first.spool.release()
    first.spool.close()
    second.now += Spool.LOOK
    assert second.all() == []
    assert files(second) == ["lock"]


CHILD = """
    import logging, os, sys, time
    from celery_influx.counters import Counters
    from celery_influx.report import Report
    from celery_influx.spool import Spool

    folder, what = sys.argv[1:]
    report = Report(logging.getLogger("child"))
    spool = Spool("metrics", "here", folder, 10_000_000, Counters(1).row(0), report)
    spool.open()
    spool.append([b"first"])
    if what == "fork" and not os.fork():
        time.sleep(60)
    print(os.getpid(), flush=True)
    number = 0
    while True:
        if what == "write":
            spool.append([b"m n=%di" % number])
            number += 1
            os.write(1, b"%d\\n" % number)
        else:
            time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []

    def start(what: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "spool"), what]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        return made[-1]

    yield start
    for each in made:
        try:
            os.killpg(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        each.wait(10)
        assert each.stdout
        each.stdout.close()


def test_what_a_process_wrote_is_there_after_kill_9_and_nothing_twice(child, make) -> None:
    process = child("write")
    out = process.stdout.fileno()
    said = b""
    while said.count(b"\n") < 200:
        assert select.select([out], [], [], 20)[0]
        said += os.read(out, 65_536)
    process.kill()
    process.wait(10)
    said += process.stdout.read()
    written = int(said.splitlines()[-1])

    one = make()
    lines = [line for lines in one.all() for line in lines]

    assert one.counted() == {"adopted": len(lines)}
    assert lines[0] == b"first"
    assert lines[1:] == [b"m n=%di" % number for number in range(len(lines) - 1)]
    assert len(lines) - 1 in (written, written + 1)


def test_a_child_that_outlives_a_killed_process_keeps_nothing_locked(child, make) -> None:
    process = child("fork")
    assert select.select([process.stdout], [], [], 20)[0]
    living = make()
    assert living.all() == []
    process.kill()
    process.wait(10)
    os.killpg(process.pid, 0)  # its child is still there

    assert make().all() == [[b"first"]]


def test_a_lock_of_ours_outlives_our_own_look_for_others(make, child) -> None:
    one = make()
    one.spool.append(batch(1))
    make().all()  # in the same process: it may not even open the other's lock
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    lock = next(one.spool.folder.glob("*.lock"))
    tried = subprocess.run(
        [sys.executable, "-c", code, str(lock)], capture_output=True, timeout=20, check=False
    )
    assert b"BlockingIOError" in tried.stderr


def test_who_begins_while_another_clears_up_after_the_dead_has_a_lock_that_is_there(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make()
    lockf = fcntl.lockf

    def look_before(lock: int, operation: int) -> None:
        """The file is made and not yet locked: as if left by somebody who is dead."""
        monkeypatch.undo()
        assert other.all() == []
        lockf(lock, operation)

    monkeypatch.setattr(fcntl, "lockf", look_before)
    make()

    assert files(other) == ["lock", "lock"]


RACER = """
    import logging, os, sys
    from celery_influx.counters import Counters
    from celery_influx.report import Report
    from celery_influx.spool import Spool

    folder, rounds = sys.argv[1:]

    def meet(*words):
        print(*words, flush=True)
        sys.stdin.readline()

    meet()
    for number in range(int(rounds)):
        counters = Counters(1)
        report = Report(logging.getLogger("racer"))
        place = f"{folder}/{number}"
        spool = Spool("metrics", "here", place, 10_000_000, counters.row(0), report)
        found = []
        spool.open()
        spool.head()
        if number % 2:
            meet()  # nobody sends before all have looked; else they look while others send
        spool.append([b"-%d" % os.getpid()])
        while lines := spool.head():
            found += map(int, lines)
            spool.pop()
        spool.close()
        meet(counters.total(0)["adopted"], *found)
"""
#: Of the test below.
RACERS, DEAD, ROUNDS = 8, 20, 10


def test_of_many_who_race_for_what_the_dead_left_one_has_each_batch(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        for first in range(0, 3 * DEAD, 3):
            dead = One(tmp_path / f"{number}")
            dead.spool.SEGMENT = 1  # so a segment for each batch
            dead.spool.append([b"%d" % first])
            dead.spool.append([b"%d" % (first + 1)])
            dead.spool.hold([b"%d" % (first + 2)])
            dead.spool.close()
    command = [sys.executable, "-c", textwrap.dedent(RACER), str(tmp_path), str(ROUNDS)]
    pipe = subprocess.PIPE
    racers = []

    def meet() -> list[list[int]]:
        """What each of them says, as soon as all have; then all go on."""
        said = []
        for racer in racers:
            assert select.select([racer.stdout], [], [], 20)[0], "one of them has not come"
            line = racer.stdout.readline()
            assert line, racer.stderr.read()
            said.append([int(word) for word in line.split()])
        for racer in racers:
            racer.stdin.write(b"\n")
        return said

    with contextlib.ExitStack() as stack:
        for _ in range(RACERS):
            racer = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
            racers.append(stack.enter_context(racer))
            stack.callback(racer.kill)
        meet()
        rounds = []
        for number in range(ROUNDS):
            if number % 2:
                meet()
            rounds.append(meet())
        ends = [(racer.communicate(timeout=20), racer.returncode) for racer in racers]

    assert ends == [((b"", b""), 0)] * RACERS
    expected = sorted([*range(3 * DEAD), *(-racer.pid for racer in racers)])
    for said in rounds:
        assert sum(adopted for adopted, *_ in said) == 3 * DEAD
        assert sorted(number for _, *taken in said for number in taken) == expected
    assert list(tmp_path.glob("*/*/*")) == []


def open_in(folder: Path) -> list[Path]:
    """The files of a folder that this process has open."""
    links = list(Path("/proc/self/fd").iterdir())
    return [link for link in links if link.is_symlink() and link.readlink().parent == folder]


def left_by_another_process(dead: One, batches: int) -> None:
    """Each in a segment of its own."""
    dead.spool.SEGMENT = 1
    for number in range(batches):
        dead.spool.append(batch(number))
    dead.spool.close()
    for path in dead.spool.folder.iterdir():
        path.rename(path.with_name(f"0-1.{path.name.partition('.')[2]}"))


def test_what_was_adopted_and_not_read_before_the_spool_was_closed_is_counted_by_who_does(
    make,
) -> None:
    left_by_another_process(make(), 2)
    one = make()
    assert one.spool.head() == batch(0)
    one.spool.close()

    two = make()
    assert two.all() == [batch(0), batch(1)]

    assert one.counted() == {"adopted": 3}
    assert two.counted() == {"adopted": 3}


def test_who_has_no_file_left_to_look_what_the_dead_left_adopts_it_later(make) -> None:
    left_by_another_process(make(), 1)
    one = make()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())  # one is left, for the lock
        assert one.spool.head() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in taken:
            os.close(each)

    one.now += 31
    assert one.all() == [batch(0)]
    assert one.counted() == {"adopted": 3}


def test_of_two_threads_that_look_at_once_one_adopts(make, monkeypatch) -> None:
    dead = make()
    dead.spool.append(batch(0))
    dead.spool.close()
    first, second = make(), make()
    locked, looked = threading.Event(), threading.Event()
    lockf = fcntl.lockf

    def lock_and_wait(*given: int) -> None:
        lockf(*given)
        if threading.current_thread() is thread:
            locked.set()
            assert looked.wait(30)

    monkeypatch.setattr(fcntl, "lockf", lock_and_wait)
    found: list[list[list[bytes]]] = []
    thread = threading.Thread(target=lambda: found.append(first.all()))
    thread.start()
    assert locked.wait(30)
    found.append(second.all())
    looked.set()
    thread.join(30)

    assert found == [[], [batch(0)]]


def test_a_forked_child_lets_go_of_the_files(make) -> None:
    one = make()
    one.spool.append(batch(0))
    reader, writer = os.pipe()
    if not os.fork():
        try:
            one.spool.abandon()
            os.write(writer, b"%d" % len(open_in(one.spool.folder)))
        finally:
            os._exit(0)
    assert select.select([reader], [], [], 20)[0]
    assert os.read(reader, 100) == b"0"
    assert len(open_in(one.spool.folder)) == 2
    os.wait()
    os.close(reader)
    os.close(writer)
    one.spool.append(batch(1))
    assert make().all() == []  # still locked
    assert one.all() == [batch(0), batch(1)]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each fsync: the name of the folder, and -1; or of the file, and its size by then."""
    calls: list[tuple[str, int]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        calls.append((name, -1 if stat.S_ISDIR(found.st_mode) else found.st_size))

    monkeypatch.setattr(os, "fsync", record)
    return calls


def test_with_fsync_each_write_and_each_new_name_outlasts_a_loss_of_power(
    tmp_path: Path, synced: list[tuple[str, int]]
) -> None:
    one = One(tmp_path / "new" / "spool", fsync=True)
    folder = one.spool.folder.name
    assert synced == [(tmp_path.name, -1), ("new", -1), ("spool", -1)]
    synced.clear()

    first, second, held = len(pack(batch(0))), len(pack(batch(1, 9))), len(pack(batch(2)))
    one.spool.append(batch(0))
    one.spool.append(batch(1, 9))
    one.spool.hold(batch(2))
    one.spool.hold(batch(2))
    one.spool.SEGMENT = 1
    one.spool.append(batch(3))

    stem = next(one.spool.folder.glob("*.lock")).stem
    assert synced == [
        (folder, -1),
        (f"{stem}.00000001.spool", first),
        (f"{stem}.00000001.spool", first + second),
        (folder, -1),
        (f"{stem}.hand.spool", held),
        (f"{stem}.hand.spool", held),
        (folder, -1),
        (f"{stem}.00000002.spool", first),
    ]
    synced.clear()
    one.spool.close()
    again = One(tmp_path / "new" / "spool", fsync=True)
    assert again.all() == [batch(0), batch(1, 9), batch(3), batch(2)]
    assert synced == []
    again.spool.close()


def test_without_fsync_nothing_waits_for_the_disk(make, synced: list[tuple[str, int]]) -> None:
    one = make()
    one.spool.append(batch(0))
    one.spool.hold(batch(1))
    one.spool.replace(batch(2))
    assert synced == []


MOUNTS = """22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 0:40 / /mnt/two\\040words rw shared:2 master:3 - nfs4 server:/export rw,vers=4.2
37 36 0:41 / /mnt/two\\040words/local rw - tmpfs tmpfs rw
38 22 0:42 / /mnt/ssh rw - fuse.sshfs user@host: rw
39 22 0:43 / /mnt/\f\r\x85\u2028\xa0 rw - 9p share rw
40 22 0:44 / /mnt/\u0434\\134040 rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/spool", ""),
        ("/mnt/two words", "nfs4"),
        ("/mnt/two words/deeper/still", "nfs4"),
        ("/mnt/two words/local/x", ""),
        ("/mnt/ssh/x", "fuse.sshfs"),
        ("/mnt/sshx", ""),
        ("/mnt/\f\r\x85\u2028\xa0/x", "9p"),
        ("/mnt/\u0434\\040", "cifs"),
    ],
)
def test_a_file_system_that_others_use_too_is_known(tmp_path: Path, folder, kind) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(MOUNTS.encode())
    assert shared_file_system(folder, str(mounts)) == kind
    assert shared_file_system(str(tmp_path)) == ""
    assert shared_file_system(folder, str(tmp_path / "none")) == ""


@pytest.mark.parametrize(
    ("kind", "is_shared"),
    [
        *((kind, True) for kind in ("nfs", "cifs", "9p", "virtiofs", "vboxsf", "beegfs")),
        *((f"fuse.{kind}", True) for kind in ("s3fs", "gcsfuse", "juicefs")),
        *((kind, False) for kind in ("xfs", "overlay", "fuse.ntfs-3g", "fuse", "nfsd")),
    ],
)
def test_which_file_systems_are_shared(tmp_path: Path, kind: str, is_shared: bool) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:40 / / rw - {kind} somewhere rw\n")
    assert shared_file_system("/var/spool", str(mounts)) == (kind if is_shared else "")


@pytest.mark.parametrize("kind", ["nfs4", ""])
def test_who_spools_to_a_shared_file_system_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, kind: str
) -> None:
    asked: list[str] = []

    def shared(folder: str) -> str:
        asked.append(folder)
        return kind

    monkeypatch.setattr("celery_influx.spool.shared_file_system", shared)
    one = One(tmp_path)
    assert asked == [str(one.spool.folder)]
    said = (
        f"metrics: 'spool_dir' {tmp_path} is on a file system of kind nfs4, where locks and writes "
        "are not safe: points may be lost or sent twice; expected a folder on a local disk"
    )
    assert caplog.messages == ([said] if kind else [])
    one.spool.close()


# -- with Delivery -----------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def one(server: Server, **options: object) -> Scene:
        made.append(Scene(server, spool=tmp_path / "spool", **options))
        return made[-1]

    yield one
    for each in made:
        each.delivery.close()


def test_what_cannot_be_sent_is_on_disk_and_the_next_is_not_even_tried(scene, caplog) -> None:
    away = scene(Server(failure("ECONNREFUSED")))
    away.delivery.deliver(BATCH)
    assert away.delivery.held == 0
    assert away.delivery.spooled == 3
    assert away.delivery.wait == 0.5

    away.delivery.deliver([b"d f=1"])

    assert len(away.server.payloads) == 1
    assert away.counted() == {"errors": 1, "errors_no_answer": 1, "spooled": 4}
    assert "3 lines are tried again, in 0.5 s; and all that follow are in the spool" in caplog.text


def test_when_the_server_is_back_the_newest_goes_first_and_the_rest_in_order(scene) -> None:
    back = scene(Server(failure("503")))
    for number in range(4):
        back.delivery.deliver(batch(number))
    back.now += 0.5
    back.delivery.deliver([b"live f=1"])
    while back.delivery.catch_up():
        pass
    assert back.server.stored == [b"live f=1", *(line for n in range(4) for line in batch(n))]
    found = back.counted()
    assert (found["sent"], found["spooled"], found["errors"]) == (13, 12, 1)


def test_what_was_stored_and_whose_answer_was_lost_comes_again(scene) -> None:
    def store_and_say_nothing(lines: list[bytes]) -> SendError:
        one.server.stored += lines
        one.server.judge = None
        return failure("timeout")

    one = scene(Server())
    one.server.judge = store_and_say_nothing
    one.delivery.deliver(BATCH)
    assert one.server.stored == BATCH
    one.now += one.delivery.wait
    assert one.delivery.catch_up()
    assert one.server.stored == [*BATCH, *BATCH]
    assert one.counted()["sent"] == 3


def test_in_an_outage_each_wait_is_longer_whoever_asks(scene) -> None:
    away = scene(Server(*[failure("timeout")] * 20))
    waits = []
    away.delivery.deliver(BATCH)
    for number in range(8):
        waits.append(away.delivery.wait)
        away.now += away.delivery.wait
        if number % 2:
            away.delivery.deliver(batch(number))
        else:
            assert away.delivery.catch_up()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert away.counted()["spooled"] == 15


def test_an_outage_of_days_loses_nothing_that_has_room(scene) -> None:
    away = scene(Server(*[failure("503")] * 50), age=60.0, tries=4)
    away.delivery.deliver(BATCH)
    for _ in range(49):
        away.now += 10_000
        away.delivery.catch_up()
    away.now += 10_000
    assert away.delivery.catch_up()
    assert away.server.stored == BATCH


@pytest.mark.parametrize("cause", ["500", "403", "timeout"])
def test_a_batch_that_alone_is_not_taken_is_lost_after_its_tries(scene, caplog, cause: str) -> None:
    """As InfluxDB 1.x answers 500 to an unknown retention policy. Others do not wait meanwhile."""
    bad = scene(Server(failure("ECONNREFUSED")), tries=3)
    bad.delivery.deliver([b"bad"])
    bad.delivery.deliver([b"good"])
    bad.server.judge = lambda lines: failure(cause) if b"bad" in lines else 0
    bad.now += bad.delivery.wait
    for number in range(4):
        bad.delivery.deliver(batch(number))
        assert bad.delivery.wait == 0
        bad.now += 31
        bad.delivery.catch_up()
    assert b"good" in bad.server.stored
    assert bad.counted()["lost"] == 1
    assert bad.counted()["sent"] == 13
    assert "1 lines lost after 3 attempts" in caplog.text


def asked_to_wait(scene, tries: int) -> Any:
    """By the answer that the oldest batch on disk has, after a live one was taken."""
    busy = scene(Server(failure("ECONNREFUSED")), tries=tries)
    busy.delivery.deliver([b"old"])
    busy.now += busy.delivery.wait
    busy.delivery.deliver([b"live"])
    busy.server.answers = [failure("503", 60.0)]
    assert busy.delivery.catch_up()
    return busy


def test_a_wish_to_wait_that_meets_the_oldest_batch_on_disk_is_one_for_all(scene) -> None:
    busy = asked_to_wait(scene, tries=3)

    assert busy.delivery.wait == 60.0
    busy.delivery.hurry(at_once=True)
    busy.delivery.deliver([b"new"])
    assert busy.server.stored == [b"live"]
    busy.now += 60
    assert busy.delivery.wait == 0
    busy.delivery.deliver([b"newer"])
    while busy.delivery.catch_up():
        pass
    assert busy.server.stored == [b"live", b"newer", b"old", b"new"]


def test_a_wish_to_wait_is_obeyed_though_the_batch_it_meets_is_lost(scene) -> None:
    busy = asked_to_wait(scene, tries=1)
    assert busy.counted()["lost"] == 1

    busy.delivery.deliver([b"new"])
    assert busy.server.stored == [b"live"]
    busy.now += 59
    assert busy.delivery.wait == 1
    busy.now += 1
    assert busy.delivery.catch_up()
    assert busy.server.stored == [b"live", b"new"]


def test_a_batch_is_not_lost_for_the_failures_of_one_that_was_dropped(scene, caplog) -> None:
    full = scene(Server(failure("ECONNREFUSED")), tries=2)
    full.delivery.deliver([b"bad"])
    full.server.judge = lambda lines: failure("503") if lines == [b"bad"] else 0
    full.now += 31
    full.delivery.deliver([b"live"])
    assert full.delivery.catch_up()
    full.server.answers = [failure("ECONNREFUSED")]
    while not full.counted().get("dropped"):
        full.delivery.deliver([b"good" * 100_000])

    full.now += 31
    full.delivery.deliver([b"live"])
    full.server.answers = [failure("503")]
    assert full.delivery.catch_up()

    assert full.delivery.is_behind
    assert "lost" not in full.counted()


def test_a_batch_is_not_lost_for_the_failures_of_others_that_were_taken_in_part(scene) -> None:
    slow = scene(Server(failure("ECONNREFUSED")), tries=2)
    for number in range(2):
        slow.delivery.deliver(batch(number, 4))
    for _ in range(2):
        slow.now += 31
        slow.delivery.deliver([b"live"])
        slow.server.answers = [failure("413"), 0, failure("timeout")]
        assert slow.delivery.catch_up()
        slow.go_on()
    slow.now += 31
    while slow.delivery.catch_up():
        slow.go_on()
    assert sorted(slow.server.stored) == sorted([b"live"] * 2 + batch(0, 4) + batch(1, 4))


def test_it_may_be_tried_as_often_as_it_likes_while_nothing_else_is_taken(scene) -> None:
    away = scene(Server(), tries=3)
    away.server.judge = lambda lines: failure("500")
    away.delivery.deliver([b"first"])
    for _ in range(20):
        away.now += away.delivery.wait
        assert away.delivery.catch_up()
    away.server.judge = None
    away.now += away.delivery.wait
    assert away.delivery.catch_up()
    assert away.server.stored == [b"first"]


def test_that_others_were_taken_before_an_outage_does_not_count_against_the_oldest(scene) -> None:
    away = scene(Server(), tries=1)
    away.delivery.deliver([b"taken"])
    away.server.answers = [failure("ECONNREFUSED")] * 2
    away.delivery.deliver([b"first"])
    away.now += away.delivery.wait
    assert away.delivery.catch_up()
    assert away.delivery.wait == 1
    away.now += away.delivery.wait
    assert away.delivery.catch_up()
    assert away.server.stored == [b"taken", b"first"]


def test_a_server_may_ask_for_an_hour_and_no_more(scene) -> None:
    away = scene(Server(failure("503", 1e9)))
    away.delivery.deliver([b"first"])
    assert away.delivery.wait == 3_600


def test_nothing_comes_from_the_disk_while_a_batch_is_held(scene) -> None:
    back = scene(Server(failure("ECONNREFUSED")))
    back.delivery.deliver([b"old"])
    back.now += back.delivery.wait
    back.server.judge = lambda given: failure("400") if b"bad" in given else 0
    back.delivery.deliver([b"a", b"bad", b"b", b"c"])
    assert back.delivery.held == 4
    assert not back.delivery.catch_up()
    assert back.delivery.held == 4
    back.go_on()
    assert back.delivery.catch_up()
    assert back.server.stored == [b"a", b"b", b"c", b"old"]


A_HUNDRED = [b"%d" % number for number in range(100)]
GOOD = [line for line in A_HUNDRED if line != b"41"]


@pytest.fixture
def searched(scene) -> Scene:
    """``A_HUNDRED`` come from the disk, and have just been refused, for the server takes no 41."""
    back = scene(Server(failure("ECONNREFUSED")))
    back.delivery.deliver(A_HUNDRED)
    back.now += back.delivery.wait
    back.server.judge = lambda given: failure("400") if b"41" in given else 0
    assert back.delivery.catch_up()
    return back


def test_bad_lines_are_found_in_what_comes_from_the_disk(searched: Scene) -> None:
    back = searched
    back.go_on()
    assert back.server.stored == GOOD
    found = back.counted()
    assert (found["sent"], found["rejected"], found["spooled"]) == (99, 1, 100)
    assert not back.delivery.catch_up()


def test_a_search_that_an_outage_ends_goes_on_afterwards(searched: Scene) -> None:
    back = searched
    back.delivery.retry()
    back.delivery.retry()
    assert 0 < len(back.server.stored) < 99
    back.server.answers = [failure("ECONNREFUSED")]
    back.delivery.retry()
    assert back.delivery.held == 0
    back.now += back.delivery.wait
    assert back.delivery.catch_up()
    back.go_on()
    assert sorted(back.server.stored) == sorted(GOOD)
    found = back.counted()
    assert (found["sent"], found["rejected"]) == (99, 1)


@pytest.mark.parametrize("cause", ["400", "413"])
@pytest.mark.parametrize("between", [2, 5, 20])
def test_outages_give_a_search_no_more_requests(scene, between: int, cause: str) -> None:
    """As of a proxy with two servers behind it, of which one is away."""
    back = scene(Server(failure("ECONNREFUSED")))
    back.delivery.deliver(A_HUNDRED)
    tries = itertools.count(1)
    back.server.judge = lambda given: failure(cause if next(tries) % between else "502")
    for _ in range(1_000):
        back.now += back.delivery.wait
        back.go_on(1)
        back.delivery.catch_up()
    found = back.counted()
    assert not back.delivery.is_behind
    assert found["rejected"] == 100
    assert found["errors_refused"] == 64


def test_a_proxy_that_says_too_long_while_no_server_is_behind_it_loses_no_good_line(scene) -> None:
    """It says so itself; all that is short enough waits for the server."""
    back = scene(Server(failure("ECONNREFUSED")))
    back.delivery.deliver(A_HUNDRED)
    back.server.judge = lambda given: failure("413" if len(given) > 50 else "502")
    waits = []
    for _ in range(1_000):
        waits.append(back.delivery.wait)
        back.now += back.delivery.wait
        back.go_on(1)
        back.delivery.catch_up()
    assert waits[-1] == 30

    back.server.judge = lambda given: failure("413") if len(given) > 50 else 0
    back.go_on()
    back.now += back.delivery.wait
    while back.delivery.catch_up():
        back.go_on()
    assert back.server.stored == A_HUNDRED
    assert "rejected" not in back.counted()


def test_of_a_batch_too_long_of_which_an_outage_left_all_no_length_is_learned(scene) -> None:
    """Each line would be a batch, and what comes in the outage as many requests after it."""
    back = scene(Server())
    back.server.answers = [failure("413"), failure("502")]
    back.delivery.deliver(A_HUNDRED)
    back.delivery.retry()
    assert back.delivery.is_behind
    assert back.delivery.most_lines >= 100

    back.now += back.delivery.wait
    back.server.judge = lambda given: failure("413") if len(given) > 30 else 0
    while back.delivery.catch_up():
        back.go_on()
    assert back.server.stored == A_HUNDRED
    assert 15 <= back.delivery.most_lines <= 30


def test_always_means_before_the_first_attempt(scene, make) -> None:
    looks: list[list[bytes]] = []

    def judge(lines: list[bytes]) -> int:
        (hand,) = first.spool.folder.glob("*.hand.spool")
        data = hand.read_bytes()
        looks.extend(unpack(data, start, count) for start, _, count in records(data))
        return 0

    first = scene(Server(), spool_first=True)
    first.server.judge = judge
    first.delivery.deliver(BATCH)
    assert looks == [BATCH]
    (hand,) = first.spool.folder.glob("*.hand.spool")
    assert hand.read_bytes() == b""
    first.server.answers = [failure("timeout")]
    first.delivery.deliver(BATCH)
    assert hand.read_bytes() == b""
    first.delivery.close()
    assert make().all() == [BATCH]


SENDER = """
    import sys, time
    from celery_influx.database import Database
    from celery_influx.options import DatabaseOptions
    from celery_influx.point import Point

    waits = {"batch_size": 50, "flush_interval": 60.0, "http_timeout": 60.0}
    database = Database(DatabaseOptions(**waits, **eval(sys.argv[1])))
    for number in range(50):
        database.send_data(Point("killed", {"n": number}))
    time.sleep(60)
"""


def test_always_saves_the_batch_whose_attempt_hangs_from_kill_9(tmp_path: Path) -> None:
    port = free_port()
    options: dict[str, Any] = {
        "name": "m", "transport": "http", "host": "127.0.0.1", "http_port": port,
        "spool_dir": str(tmp_path / "spool"), "spool_mode": "always",
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(SENDER), repr(options)]
    with socket.create_server(("127.0.0.1", port)) as silent, subprocess.Popen(command) as sender:
        try:
            silent.settimeout(20)
            client, _ = silent.accept()
            client.settimeout(20)
            with client:
                asked = b""
                while b"n=49i" not in asked:  # the last line; and no answer comes
                    asked += client.recv(65_536) or pytest.fail("the attempt was broken off")
                sender.kill()
                sender.wait(10)
        finally:
            sender.kill()

    with Listener(http_port=port, database="m") as listener:
        database = Database(DatabaseOptions(**options))
        database.send_data(Point("next", {"n": 0}))
        wait_for(lambda: listener.count("killed") == 50, 20, "the killed process's batch")
        assert database.close(10)
    assert sorted(point.fields["n"] for point in listener.points("killed")) == list(range(50))
    assert database.stats()["adopted"] == 50
    assert list(tmp_path.glob("spool/*/*")) == []


def test_a_disk_that_takes_nothing_leaves_it_as_it_is_without_a_spool(scene, caplog) -> None:
    full = scene(Server(*[failure("timeout")] * 2))
    with no_file_longer_than(10):
        full.delivery.deliver(BATCH)
        assert full.delivery.held == 3
        assert full.go_on() == [0.5, 1]
    assert full.server.stored == BATCH
    assert "metrics: the spool fails: [Errno 27]" in caplog.text


@pytest.mark.parametrize("first", [False, True])
def test_a_wish_to_wait_is_obeyed_on_a_full_disk(scene, first: bool) -> None:
    full = scene(Server(failure("503", 60.0)), spool_first=first)
    full.delivery.deliver(BATCH)
    with no_file_longer_than(10):
        full.delivery.deliver([b"next"])
        assert len(full.server.payloads) == 1
        assert full.delivery.held == 1
        assert full.go_on() == [60]
    assert full.server.stored == [b"next"]


def test_who_begins_on_a_full_disk_sends_what_fills_it(make, scene) -> None:
    for number in range(2):
        one = make()
        one.spool.append(batch(number))
        one.spool.close()

    with no_file_longer_than(0):
        full = scene(Server())
        while full.delivery.catch_up():
            pass
        stored = list(full.server.stored)

    assert stored == [*batch(0), *batch(1)]
    full.server.answers = [failure("timeout")]
    full.delivery.deliver(BATCH)
    assert full.delivery.spooled == 3


def test_who_sends_a_point_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, began = threading.Event(), threading.Event()
    mkdir = Path.mkdir

    def hang(*given: Any, **named: Any) -> None:
        began.set()
        assert answers.wait(30)
        mkdir(*given, **named)

    monkeypatch.setattr(Path, "mkdir", hang)
    options = {"host": "127.0.0.1", "http_port": free_port(), "spool_dir": str(tmp_path / "spool")}
    database = Database(DatabaseOptions(name="m", transport="http", **options))
    database.send_data(Point("m", {"n": 1}))
    assert began.wait(10)
    database.send_data(Point("m", {"n": 2}))
    answers.set()
    assert not database.close(10)
    assert database.stats()["spooled"] == 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_server_does_each_line_is_accounted_for(scene, seed: int) -> None:
    chance = random.Random(seed)
    causes = ["timeout", "503", "401", "400", "413", "405", "conflict"]
    wild = scene(Server(), tries=3, spool_first=bool(seed % 2))
    wild.server.judge = lambda lines: (
        failure(chance.choice(causes)) if chance.random() < 0.5 else chance.randrange(2)
    )
    given = 0
    for number in range(100):
        wild.now += chance.random()
        if chance.random() < 0.6 and not wild.delivery.held:
            lines = batch(number, chance.randrange(1, 9))
            given += len(lines)
            wild.delivery.deliver(lines)
        elif wild.delivery.held:
            wild.now += wild.delivery.wait
            wild.delivery.retry()
        elif not wild.delivery.wait:
            wild.delivery.catch_up()
    wild.server.judge = lambda lines: 0
    wild.go_on()
    wild.now += 100
    while wild.delivery.catch_up():
        wild.go_on()
        wild.now += 100
    found = wild.counted()
    settled = sum(found.get(name, 0) for name in ("sent", "dropped", "lost", "rejected"))
    assert settled == given


# -- a long outage -----------------------------------------------------------------------------


class Town:
    """A server that is away for ``outage`` seconds, lines that come meanwhile, and their clock.

    The batcher is the real one, in its own thread, but it is this clock that it looks at, and its
    sleep that lets the clock go on.
    """

    confirms = True
    address = "http://town:1"
    max_bytes, burst = 1_048_576, 1
    #: Seconds for a request that is answered.
    ANSWER = 0.05

    def __init__(self, folder: Path, outage: float, rate: int) -> None:
        self.now = 0.0
        self.outage = outage
        self.until = 3 * outage + 30
        self.rate = rate
        self.made = 0
        self.stored: list[int] = []
        self.back = 0.0  # when it took something again
        self.latest = 0.0  # of the lines made since: how long one was under way
        self.most_waiting = self.most_on_disk = 0
        self.memory: list[int] = []
        self.over = threading.Event()
        counters = self.counters = Counters(1)
        report = Report(logging.getLogger("tests.spool"), clock=lambda: self.now)
        row = counters.row(0)
        self.buffer = make_buffer(100_000, 33_554_432)
        self.spool = Spool(
            "metrics", "here", str(folder), 16_000_000, row, report, clock=lambda: self.now
        )
        delivery = Delivery(
            "metrics",
            self,
            row,
            report,
            retry_age=3_600,
            retry_tries=10,
            spool=self.spool,
            clock=lambda: self.now,
        )
        self.batcher = Batcher(
            "metrics",
            self.buffer,
            delivery,
            row,
            report,
            batch_size=5_000,
            flush_interval=1.0,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, sleeper: threading.Lock, timeout: float) -> None:
        if self.over.is_set():
            sleeper.acquire(timeout=0.05)
        elif self.now >= self.until and not len(self.buffer):
            self.over.set()
        else:
            self.pass_by(timeout)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        if self.now < self.until:
            due = int(self.now * self.rate)
            self.buffer.put([b"m n=%di" % number for number in range(self.made, due)])
            self.made = due
        self.most_waiting = max(self.most_waiting, self.buffer.bytes)
        self.most_on_disk = max(self.most_on_disk, self.spool.bytes)
        if self.now < self.outage:
            self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4_096)

    def write(self, *payloads: bytes) -> int:
        self.pass_by(self.ANSWER)
        if self.now < self.outage:
            raise SendError("nobody there", "ECONNREFUSED")
        numbers = [int(line[4:-1]) for line in payloads[0].split(b"\n")]
        self.back = self.back or self.now
        if numbers[0] >= self.back * self.rate:
            self.latest = max(self.latest, self.now - numbers[0] / self.rate)
        self.stored += numbers
        return 0

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        """Nor is this."""


@pytest.mark.parametrize(
    "outage", [30, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_an_outage_at_2000_lines_a_second(tmp_path: Path, outage: int) -> None:
    """Memory is flat, the disk is within its limit, all that had room arrives, the newest first."""
    town = Town(tmp_path, outage, 2_000)
    assert town.over.wait(300)
    assert town.batcher.close(10)

    total = town.counters.total(0)
    assert total["sent"] == len(town.stored)
    assert total["sent"] + total["dropped"] == town.made
    assert total["lost"] == total["rejected"] == 0
    assert (total["dropped"] > 0) == (outage > 300)  # there is room for half of it then
    assert town.most_on_disk <= 16_000_000
    assert town.most_waiting < 200_000
    late = [number for number in town.stored if number < (town.back - 2) * 2_000]
    assert len(late) > 2_000 * 20
    assert late == sorted(late)
    assert sorted(town.stored) == list(range(town.made - len(town.stored), town.made))
    assert town.latest <= 2.0
    grown = town.memory[-1] - town.memory[len(town.memory) // 4]
    print(
        f"{outage} s at 2,000 lines/s: {total['spooled']:,} lines on disk, {total['dropped']:,} "
        f"dropped, {len(town.stored):,} stored, live ones at most {town.latest:.2f} s late; memory "
        f"grew by {grown:,} bytes in three quarters of the outage"
    )
    assert grown < 8_000_000
