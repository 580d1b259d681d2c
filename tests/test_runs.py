"""The worker's table of runs: one point for each that was killed, whatever is heard in what order."""

from __future__ import annotations

import os
import time

import pytest

from celery_influx.runs import LOST, Runs, has_ended, start_frame, verdict_frame
from celery_influx.task_points import Facts
from tests.servers import wait_for


def facts_of(run_id: str, retries: int = 0) -> Facts:
    """What is known of it; for the tests its name is its queue's, too."""
    return ("t", run_id, "w"), retries, None, None, None


class Scene:
    """A table, the children that have died, and the points that were written."""

    def __init__(self) -> None:
        self.dead: set[int] = set()
        self.points: list[tuple[str, str | None, str]] = []
        self.runtimes: list[float | None] = []
        self.failures: list[Exception] = []
        self.runs = Runs(self.write, gone=lambda pid: pid in self.dead)
        self.runs.INTERVAL = 0.0

    def write(self, facts: Facts, state: str, exception: str | None, runtime: int | None) -> None:
        if self.failures:
            raise self.failures.pop()
        run_id = facts[0][1]
        assert facts == facts_of(run_id, facts[1])
        self.points.append((state, exception, run_id))
        self.runtimes.append(None if runtime is None else runtime / 1e9)

    def start(
        self,
        pid: int,
        run_id: str,
        ago: float = 0.0,
        *,
        goes_back: bool = False,
        retries: int = 0,
    ) -> None:
        began = time.time_ns() - int(ago * 1e9)
        frame = start_frame(pid, run_id, began, facts_of(run_id, retries), goes_back)
        for _ in range(2):  # it may come twice
            self.runs.started(frame)

    def judge(
        self, pid: int, run_id: str, state: str, exception: str | None = LOST, retries: int = 0
    ) -> None:
        facts = facts_of(run_id, retries)
        self.runs.judged(verdict_frame(pid, run_id, state, exception, facts))

    def end(self, pid: int, *, again: bool = False) -> None:
        """It writes that its run has ended, and with that the run's point."""
        assert self.runs.ended(pid, self.runs._living[pid].began) is not again

    def die(self, pid: int) -> None:
        """It dies, and all that it wrote is read."""
        self.dead.add(pid)
        self.runs.look()
        self.runs.bury()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_run_that_ends_by_itself_is_none_of_the_tables_business(scene: Scene) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.die(1)
    scene.judge(1, "a", "FAILURE")
    scene.runs.close()

    assert scene.points == []


@pytest.mark.parametrize("first", ["death", "verdict"])
def test_a_killed_run_is_written_when_its_child_is_dead_and_celery_has_spoken(
    scene: Scene, first: str
) -> None:
    scene.start(1, "a", ago=2)
    steps = [lambda: scene.die(1), lambda: scene.judge(1, "a", "FAILURE")]
    for step in steps if first == "death" else reversed(steps):
        assert scene.points == []
        step()
    scene.runs.close()

    assert scene.points == [("FAILURE", LOST, "a")]
    assert scene.runtimes == [pytest.approx(2, abs=0.2)]


def test_a_child_that_was_not_looked_at_for_long_died_in_the_middle_of_that(scene: Scene) -> None:
    began = time.time_ns()
    scene.start(1, "a")
    time.sleep(scene.runs.INTERVAL)  # before it is over there is no look
    scene.runs.look()
    seen = time.time_ns()
    time.sleep(0.6)  # the worker is busy
    scene.die(1)
    found = time.time_ns()
    scene.judge(1, "a", "FAILURE")

    middle = (seen + found) / 2
    assert scene.runtimes == [pytest.approx((middle - began) / 1e9, abs=0.1)]


def test_an_end_that_comes_after_the_verdict_counts_and_the_verdict_does_not(scene: Scene) -> None:
    scene.start(1, "a")
    scene.judge(1, "a", "FAILURE", "TimeLimitExceeded")
    scene.end(1)
    scene.die(1)

    assert scene.points == []


def test_what_a_child_wrote_before_its_death_is_read_before_it_is_buried(scene: Scene) -> None:
    scene.start(1, "a")
    scene.judge(1, "a", "FAILURE")
    scene.dead.add(1)
    scene.runs.look()
    scene.end(1)
    scene.runs.bury()

    assert scene.points == []


def test_a_verdict_on_the_run_before_does_not_touch_the_one_under_way(scene: Scene) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.start(1, "b")
    scene.judge(1, "a", "FAILURE", "TimeLimitExceeded")
    scene.die(1)
    assert scene.points == []

    scene.judge(1, "b", "FAILURE")

    assert scene.points == [("FAILURE", LOST, "b")]


def test_an_end_that_comes_twice_brings_one_point(scene: Scene) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.end(1, again=True)
    scene.start(1, "a")
    scene.end(1)

    assert scene.points == []


def test_the_end_of_a_run_whose_start_did_not_come_touches_no_other(scene: Scene) -> None:
    scene.start(1, "a", ago=2)
    assert scene.runs.ended(1, time.time_ns())
    assert scene.runs.ended(2, time.time_ns())
    scene.judge(1, "a", "FAILURE")
    scene.die(1)

    assert scene.points == [("FAILURE", LOST, "a")]


@pytest.mark.parametrize("death", [True, False])
def test_a_late_verdict_on_a_run_that_ended_some_runs_ago_is_no_second_point(
    scene: Scene, death: bool
) -> None:
    for run_id in "abc":
        scene.start(1, run_id)
        scene.end(1)
    if death:
        scene.die(1)
    scene.judge(1, "a", "FAILURE", "TimeLimitExceeded")
    scene.judge(1, "b", "FAILURE")

    assert scene.points == []


def test_a_try_that_never_started_has_its_point_though_the_one_before_ran_there(
    scene: Scene,
) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.judge(1, "a", "FAILURE", retries=1)
    scene.die(1)

    assert scene.points == [("FAILURE", LOST, "a")]
    assert scene.runtimes == [None]


@pytest.mark.parametrize("pid", [0, 2])
def test_the_try_before_which_ended_elsewhere_takes_no_point_from_one_that_never_started(
    scene: Scene, pid: int
) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.die(1)
    scene.dead.add(2)
    scene.judge(pid, "a", "FAILURE", retries=1)
    scene.die(2)

    assert scene.points == [("FAILURE", LOST, "a")]


def test_a_run_that_ended_in_another_child_takes_no_point_from_one_that_never_started(
    scene: Scene,
) -> None:
    """As where a message is given out again that was not acknowledged."""
    scene.start(1, "a")
    scene.end(1)
    scene.die(1)
    scene.judge(2, "a", "FAILURE")
    scene.die(2)

    assert scene.points == [("FAILURE", LOST, "a")]


def test_a_killed_run_is_no_retry_because_its_message_was_given_out_again_before(
    scene: Scene,
) -> None:
    """As by Redis, after its visibility timeout: both run, and then one is killed."""
    scene.start(1, "a")
    scene.start(2, "a")
    scene.die(1)
    assert scene.points == []

    scene.judge(1, "a", "FAILURE")
    scene.end(2)
    scene.die(2)

    assert scene.points == [("FAILURE", LOST, "a")]


@pytest.mark.parametrize("seen", [True, False], ids=["seen dead", "not seen dead yet"])
def test_a_task_that_starts_again_in_another_child_was_retried(scene: Scene, seen: bool) -> None:
    scene.start(1, "a")
    if seen:
        scene.die(1)
    else:
        scene.dead.add(1)
    scene.start(2, "a")
    scene.runs.look()
    scene.runs.bury()
    assert scene.points == [("RETRY", LOST, "a")]

    scene.judge(2, "a", "FAILURE")
    scene.die(2)

    assert scene.points == [("RETRY", LOST, "a"), ("FAILURE", LOST, "a")]


def test_where_the_next_child_dies_as_fast_the_verdict_is_on_the_run_in_that_one(
    scene: Scene,
) -> None:
    """The pool saw neither of them take the task, nor have we seen that they are dead."""
    scene.start(1, "a")
    scene.dead.add(1)
    scene.start(2, "a")
    scene.dead.add(2)
    scene.judge(0, "a", "FAILURE")
    scene.runs.look()
    scene.runs.bury()

    assert scene.points == [("RETRY", LOST, "a"), ("FAILURE", LOST, "a")]


def test_a_verdict_is_not_overruled_by_the_task_that_starts_again(scene: Scene) -> None:
    scene.start(1, "a")
    scene.judge(1, "a", "RETRY", "TimeLimitExceeded")
    scene.start(2, "a")  # the broker is quicker than the child is dead
    scene.die(1)

    assert scene.points == [("RETRY", "TimeLimitExceeded", "a")]


def test_two_runs_of_one_task_at_once_each_have_their_own_end(scene: Scene) -> None:
    """Redis gives a message out again that is not acknowledged in time."""
    scene.start(1, "a")
    scene.start(2, "a")
    scene.end(1)
    scene.judge(2, "a", "FAILURE")
    scene.die(1)
    scene.die(2)

    assert scene.points == [("FAILURE", LOST, "a")]


@pytest.mark.parametrize("seen", [True, False], ids=["seen dead", "not seen dead yet"])
def test_a_run_whose_child_the_pool_did_not_know_is_found_by_its_task(
    scene: Scene, seen: bool
) -> None:
    scene.start(1, "a")
    scene.dead.add(1)
    if seen:
        scene.die(1)
    scene.judge(0, "a", "REVOKED", None)
    scene.die(1)

    assert scene.points == [("REVOKED", None, "a")]


def test_a_run_whose_child_the_pool_did_not_know_and_that_had_ended_has_no_second_point(
    scene: Scene,
) -> None:
    scene.start(1, "a")
    scene.end(1)
    scene.die(1)
    scene.judge(0, "a", "FAILURE")

    assert scene.points == []


def test_a_verdict_on_a_task_that_never_started_is_its_only_point(scene: Scene) -> None:
    scene.judge(1, "a", "REVOKED", None)
    scene.die(1)
    scene.runs.close()

    assert scene.points == [("REVOKED", None, "a")]
    assert scene.runtimes == [None]


def test_a_verdict_on_a_task_that_never_started_in_a_child_that_has_gone_on_is_its_only_point(
    scene: Scene,
) -> None:
    scene.start(1, "b")
    for _ in range(2):
        scene.judge(1, "a", "FAILURE", "NotRegistered")
    assert scene.points == [("FAILURE", "NotRegistered", "a")]
    scene.end(1)
    scene.die(1)
    scene.runs.close()

    assert scene.points == [("FAILURE", "NotRegistered", "a")]


def test_a_verdict_that_is_given_twice_on_a_task_that_never_started_is_one_point(
    scene: Scene,
) -> None:
    for _ in range(2):
        scene.judge(1, "a", "REVOKED", None)
        scene.die(1)
    scene.judge(1, "a", "REVOKED", None)
    scene.runs.close()

    assert scene.points == [("REVOKED", None, "a")]


def test_a_task_that_no_child_was_seen_to_take_may_be_lost_more_than_once(scene: Scene) -> None:
    """As where its message goes back each time."""
    for _ in range(2):
        scene.judge(0, "a", "RETRY")

    assert scene.points == [("RETRY", LOST, "a")] * 2


def test_a_task_that_starts_after_its_verdict_has_one_point(scene: Scene) -> None:
    scene.judge(1, "a", "REVOKED", None)
    scene.start(1, "a")
    assert scene.points == []
    scene.die(1)
    scene.judge(1, "a", "FAILURE")
    scene.runs.close()

    assert scene.points == [("REVOKED", None, "a")]
    assert scene.runtimes == [pytest.approx(0, abs=0.2)]


def test_a_task_that_starts_after_its_verdict_and_ends_by_itself_has_its_own_point(
    scene: Scene,
) -> None:
    """As where it is revoked by a signal that does nothing to it."""
    scene.judge(1, "a", "REVOKED", None)
    scene.start(1, "a")
    scene.end(1)
    scene.start(1, "b")
    scene.end(1)
    scene.die(1)
    scene.runs.close()

    assert scene.points == []


@pytest.mark.parametrize("pid", [0, 1])
def test_a_verdict_on_a_task_that_no_child_starts_is_written_at_once_or_by_the_next_start(
    scene: Scene, pid: int
) -> None:
    scene.judge(pid, "a", "REVOKED", None)
    assert (scene.runs.wait is None) is (pid == 0)
    if pid:
        assert scene.points == []
        scene.start(pid, "b")

    assert scene.points == [("REVOKED", None, "a")]


@pytest.mark.parametrize("end", ["patience", "close"])
def test_a_verdict_on_a_task_that_never_starts_waits_no_longer_than_that(
    scene: Scene, end: str
) -> None:
    scene.judge(1, "a", "REVOKED", None)
    if end == "patience":
        scene.runs._patience = 0.05
        wait_for(lambda: scene.runs.look() or scene.points, 5)
        assert scene.runs.wait is None
    else:
        scene.runs.close()

    assert scene.points == [("REVOKED", None, "a")]
    assert scene.runtimes == [None]


def test_a_run_whose_end_never_came_is_written_when_its_child_starts_the_next(scene: Scene) -> None:
    scene.start(1, "a")
    scene.start(1, "b")
    scene.end(1)
    scene.runs.close()

    assert scene.points == [("FAILURE", LOST, "a")]


def test_a_point_that_cannot_be_written_harms_no_other(scene: Scene) -> None:
    scene.failures.append(ValueError("influx_strict"))
    for pid, run_id in enumerate("abc", 1):
        scene.start(pid, run_id)
        scene.judge(pid, run_id, "FAILURE")
        scene.dead.add(pid)
    scene.runs.look()
    scene.runs.bury()

    assert scene.points == [("FAILURE", LOST, "b"), ("FAILURE", LOST, "c")]
    assert scene.runs.wait is None


def test_a_run_of_which_celery_says_nothing_is_lost_after_a_while(scene: Scene) -> None:
    scene.runs._patience = 0.05
    scene.start(1, "a")
    scene.die(1)
    assert scene.points == []

    wait_for(lambda: scene.runs.look() or scene.points, 5)

    assert scene.points == [("FAILURE", LOST, "a")]
    assert scene.runs.wait is None


@pytest.mark.parametrize(("goes_back", "state"), [(True, "RETRY"), (False, "FAILURE")])
def test_at_the_workers_end_what_is_dead_without_a_verdict_may_go_back_as_well(
    scene: Scene, goes_back: bool, state: str
) -> None:
    scene.start(1, "a", goes_back=goes_back)
    scene.die(1)
    assert scene.points == []

    scene.runs.close()

    assert scene.points == [(state, LOST, "a")]


def test_at_the_workers_end_what_still_runs_is_lost_or_goes_back_to_its_queue(scene: Scene) -> None:
    scene.start(1, "a")
    scene.start(2, "b", goes_back=True)
    scene.start(3, "c")
    scene.judge(3, "c", "REVOKED", None)

    scene.runs.close()

    assert sorted(scene.points) == [
        ("FAILURE", LOST, "a"),
        ("RETRY", LOST, "b"),
        ("REVOKED", None, "c"),
    ]


def test_the_reader_is_asked_to_look_only_while_something_may_die(scene: Scene) -> None:
    assert scene.runs.wait is None
    scene.start(1, "a")
    assert scene.runs.wait is not None
    scene.end(1)
    assert scene.runs.wait is None
    scene.start(1, "b")
    scene.die(1)
    assert scene.runs.wait is not None  # Celery has not spoken
    scene.judge(1, "b", "FAILURE")
    assert scene.runs.wait is None


def test_the_table_does_not_grow_with_the_children_that_come_and_go(scene: Scene) -> None:
    scene.runs.MOST_DEAD = 10
    for pid in range(1, 1_000):
        scene.start(pid, f"task {pid}")
        if pid % 2:
            scene.end(pid)
        scene.die(pid)

    assert len(scene.runs._living) == 0
    assert len(scene.runs._dead) <= 10

    for number in range(scene.runs.MOST_OVER + 100):
        scene.start(1, f"one more {number}")
    assert len(scene.runs._over) == scene.runs.MOST_OVER
    assert len(scene.points) >= 490


def test_names_that_are_no_plain_strings_are_taken_as_what_they_say(scene: Scene) -> None:
    class Name(str):
        __slots__ = ()

    scene.runs.started(start_frame(os.getpid(), Name("a"), 1, facts_of(Name("a")), False))
    scene.runs.close()

    assert scene.points == [("FAILURE", LOST, "a")]


def test_a_child_has_ended_whether_or_not_its_pool_has_waited_for_it() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os._exit(3)
    os.close(reader)
    assert not has_ended(pid)

    os.close(writer)
    wait_for(lambda: has_ended(pid), 10)
    # It was left to be waited for.
    assert os.waitpid(pid, 0) == (pid, 3 << 8)

    assert has_ended(pid)
