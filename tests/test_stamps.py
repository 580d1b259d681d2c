"""Stamps: unique within a process, told apart between processes, and close to the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_influx.speedups import extension
from celery_influx.stamps import SLOTS, python_stamps

pytestmark = pytest.mark.parametrize(
    "Stamps",
    [python_stamps, *([extension.Stamps] if extension else [])],
    ids=lambda kind: kind.__module__,
)


class Clock:
    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def test_stamps_of_eight_threads_are_all_different(Stamps: Callable[..., Any]) -> None:
    stamps = Stamps(7)
    found: list[list[int]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def take(into: list[int]) -> None:
        start.wait()
        into.extend(stamps() for _ in range(20_000))

    threads = [threading.Thread(target=take, args=(into,)) for into in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    every = [stamp for each in found for stamp in each]
    assert len(set(every)) == 160_000
    for each in found:
        assert each == sorted(each)


@pytest.mark.parametrize("slot", [0, 1, 7, 999])
def test_the_last_three_digits_are_the_slot(Stamps: Callable[..., Any], slot: int) -> None:
    stamps = Stamps(slot)

    assert {stamps() % SLOTS for _ in range(1_000)} == {slot}


def test_a_slot_beyond_the_digits_is_taken_modulo(Stamps: Callable[..., Any]) -> None:
    assert Stamps(123_456)() % 1_000 == 456


def test_two_slots_never_give_the_same_stamp_for_the_same_moment(
    Stamps: Callable[..., Any],
) -> None:
    clock = Clock(1_700_000_000_000_000_123)
    one, other = Stamps(5, clock), Stamps(6, clock)

    assert not {one() for _ in range(500)} & {other() for _ in range(500)}


@pytest.mark.parametrize("step", [1_000, 1_001, 5_000, 1_000_000])
def test_called_at_most_once_a_microsecond_it_is_within_a_microsecond_of_the_clock(
    Stamps: Callable[..., Any],
    step: int,
) -> None:
    clock = Clock(1_700_000_000_000_000_000)
    stamps = Stamps(500, clock)

    for _ in range(1_000):
        clock.now += step
        assert -1_000 < stamps() - clock.now < 1_000


def test_called_faster_it_runs_ahead_a_microsecond_a_call_and_the_clock_catches_up(
    Stamps: Callable[..., Any],
) -> None:
    clock = Clock(1_700_000_000_000_000_000)
    stamps = Stamps(0, clock)

    found = [stamps() for _ in range(100)]

    assert found == [clock.now + i * 1_000 for i in range(100)]
    clock.now += 1_000_000
    assert stamps() == clock.now


def test_a_clock_that_goes_back_a_little_gives_no_stamp_twice(Stamps: Callable[..., Any]) -> None:
    clock = Clock(1_700_000_000_000_000_000)
    stamps = Stamps(3, clock)
    found = []

    for back in (0, 1, 1_000, 500_000, 999_000_000):
        found.append(stamps())
        clock.now -= back
    found.append(stamps())

    assert found == [found[0] + i * 1_000 for i in range(6)]


def test_a_clock_that_was_put_back_is_followed(Stamps: Callable[..., Any]) -> None:
    clock = Clock(1_700_000_000_000_000_000)
    stamps = Stamps(3, clock)
    stamps()

    clock.now -= 3_600_000_000_000

    assert stamps() == clock.now + 3
    assert stamps() == clock.now + 1_003


def test_the_real_clock_is_kept_to(Stamps: Callable[..., Any]) -> None:
    stamps = Stamps(999)

    for _ in range(1_000):
        before = time.time_ns()
        stamp = stamps()
        assert before - 1_000 < stamp
        assert stamp < time.time_ns() + 1_000_000


def test_a_stamp_from_inside_of_a_stamp_does_not_block_and_is_different(
    Stamps: Callable[..., Any],
) -> None:
    inner: list[int] = []
    calls = iter(range(1_000))

    class Nested(int):
        def __le__(self, other: object) -> bool:
            if next(calls) < 5:
                inner.append(stamps())
            return int(self) <= other  # type: ignore[operator]

        def __add__(self, other: int) -> Nested:
            return Nested(int(self) + other)

    def clock() -> int:
        if Stamps is python_stamps:
            return Nested(1_700_000_000_000_000_000)
        if next(calls) < 5:  # in C nothing else of it is anybody's but its own
            inner.append(stamps())
        return 1_700_000_000_000_000_000

    stamps = Stamps(1, clock)

    outer = [stamps() for _ in range(3)]

    assert len(inner) == 5
    assert {stamp % 1_000 for stamp in [*inner, *outer]} == {1}
