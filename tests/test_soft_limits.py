"""A soft time limit that comes in the middle of our own receivers, at each place there is.

Celery raises it from a signal's handler, which Python runs at the start of a function, after a call
and at a jump backwards. Here it is raised at all of these, and between all lines, by tracing.
"""

from __future__ import annotations

import dis
import fcntl
import json
import logging
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from billiard.process import current_process
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import SoftTimeLimitExceeded

import celery_influx
from celery_influx import signals
from celery_influx.plugin import Influx
from celery_influx.point import Point
from celery_influx.relay import Relay
from celery_influx.signals import HEADER
from celery_influx.speedups import extension
from celery_influx.transports import bounded
from tests.conftest import Receiver
from tests.servers import wait_for
from tests.test_http import serving
from tests.test_relay import exit_code, fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and Linux's pipes")

F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
OURS = str(Path(celery_influx.__file__).parent)


class Limit:
    """To be set as a tracer: raises at one place of what our receivers do, as they come."""

    def __init__(self, place: int) -> None:
        self._left = place
        self.has_come = False
        self.function = ""  # in which it has come

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        each: FrameType | None = frame
        while each and not each.f_code.co_filename.startswith(OURS):
            each = each.f_back
        if each is None:
            return None
        frame.f_trace_opcodes = True
        self._come(frame)
        return self._within

    def _within(self, frame: FrameType, event: str, arg: object) -> Any:
        code, before = frame.f_code.co_code, frame.f_lasti - 2
        while before > 0 and dis.opname[code[before]] == "CACHE":
            before -= 2
        if event in ("line", "return") or dis.opname[code[max(before, 0)]].startswith("CALL"):
            self._come(frame)
        return self._within

    def _come(self, frame: FrameType) -> None:
        self._left -= 1
        if self._left < 0 and not self.has_come:
            self.has_come = True
            self.function = frame.f_code.co_name
            raise SoftTimeLimitExceeded


class Child:
    """A worker and its one child, which runs a task whose time is up at one place after another.

    ``kind`` of its runs: ``ordinary``, or else each has another number of retries, and all is done
    ``step by step``; or ``mixed``: only their starts are.
    """

    def __init__(self, url: str, folder: Path, *, kind: str) -> None:
        self.at_once = kind == "ordinary"
        self.mixed = kind == "mixed"
        self.app = Celery("app", broker="memory://", set_as_current=False)
        self.app.conf.influx_databases = {"main": url}
        self.influx = celery_influx.install(self.app)
        self._ran: list[int] = []
        self._notes = folder / "notes"

        @self.app.task(name="t", bind=True, shared=False, ignore_result=True)
        def task(task: Any) -> None:
            self._ran.append(int(task.request.id))

        self.app.finalize()
        self.influx.start_worker("worker@host", "prefork")
        signals.guard()
        signals.shorten()
        assert self.influx._worker
        assert self.influx._worker.relay
        self.relay: Relay = self.influx._worker.relay

    def run(self, first: int = 0, most: int = 10_000) -> dict[int, bool | None]:
        """Fork it; the numbers of its runs, and whether the task's body ran.

        ``None``: it did, but Celery may take the run for a failure, since the limit came in what
        its tracer calls in the place of its signal.
        """
        self._notes.unlink(missing_ok=True)
        pid = fork(lambda: self._be_child(first, most))
        wait_for(self._notes.exists, 30, "the child's notes")
        if self.relay._reader is None:
            self.influx.start()
        assert exit_code(pid) == 0
        notes: dict[str, bool | None] = json.loads(self._notes.read_text())
        return {int(number): ran for number, ran in notes.items()}

    def _be_child(self, first: int, most: int) -> None:
        current_process().index = 0
        logging.disable()  # Celery's word on what a receiver raised
        trace = build_tracer("t", self.app.tasks["t"], app=self.app)
        found: dict[int, bool | None] = {}
        for number in range(first, first + most):
            if self.at_once:  # so that there has been one of its queue
                trace(str(number), (), {}, request_of(number, ordinary=True))
                self._ran.clear()
            limit = Limit(number)
            sys.settrace(limit)
            try:
                trace(str(number), (), {}, request_of(number, ordinary=self.at_once))
            finally:
                sys.settrace(None)
            found[number] = number in self._ran
            if found[number] and limit.function == signals._send_postrun.__name__:
                found[number] = None
            if not limit.has_come:
                break
        unfinished = self._notes.with_suffix(".new")
        unfinished.write_text(json.dumps(found))
        unfinished.rename(self._notes)
        self.influx.leave_pool()


def request_of(number: int, *, ordinary: bool) -> dict[str, Any]:
    """A message that its point shows by its queue; or by ``retries`` and a time to come."""
    stamp = time.time_ns() + (0 if ordinary else 10**12)  # the latter is counted
    return {
        "id": str(number),
        "hostname": "worker@host",
        "delivery_info": {"exchange": "", "routing_key": f"q{number}" if ordinary else "celery"},
        "retries": 0 if ordinary else number,
        HEADER: f"1;{stamp};{stamp}",
    }


@pytest.fixture(params=["step by step", "mixed"])
def child(
    request: pytest.FixtureRequest,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Child]:
    if request.param == "step by step":
        never = property(lambda _: None, lambda *_: None)
        monkeypatch.setattr(Influx, "quick", never, raising=False)
    made = Child(receiver.url, tmp_path, kind=request.param)
    yield made
    made.influx.close(5)


def ends(points: list[Point]) -> dict[int, list[tuple[str, str | None]]]:
    """What the points of each run say of its end."""
    found: dict[int, list[tuple[str, str | None]]] = {}
    for point in points:
        assert point.tags
        end = point.tags["state"], point.tags.get("exception")
        queue = point.tags["queue"].removeprefix("q")
        number = int(queue) if queue.isdigit() else point.fields["retries"]
        found.setdefault(number, []).append(end)
    return found


EXPECTED = {True: [("SUCCESS", None)], False: [("FAILURE", "SoftTimeLimitExceeded")]}


def expected(
    runs: dict[int, bool | None], found: dict[int, list[tuple[str, str | None]]]
) -> dict[int, list[tuple[str, str | None]]]:
    """One end of each run. ``found`` decides where either is right."""
    return {
        number: EXPECTED[found.get(number) == EXPECTED[True] if ran is None else ran]
        for number, ran in runs.items()
    }


def test_wherever_it_comes_the_run_has_one_point_and_the_task_its_limit(
    child: Child, receiver: Receiver
) -> None:
    runs = child.run()

    assert child.influx.close(5)
    points = receiver.points("celery_task", at_least=len(runs))
    assert ends(points) == expected(runs, ends(points))
    places = Counter(runs.values())  # before the task's body, and after it
    assert places[False] > 50
    assert places[True] > (1 if extension and child.mixed else 50)
    account = child.influx.stats()["main"]
    assert account["points"] == account["sent"] == len(runs)
    assert len(runs) - 20 < account["clamped"] <= len(runs)  # it came before some were counted


@pytest.mark.skipif(bool(extension), reason="in the extension it comes nowhere")
@pytest.mark.parametrize("child", ["ordinary"], indirect=True)
def test_wherever_it_comes_so_has_an_ordinary_run(child: Child, receiver: Receiver) -> None:
    runs = child.run()

    assert child.influx.close(5)
    points = receiver.points("celery_task", at_least=2 * len(runs))
    befores = [end for end, *_ in ends(points).values()]
    assert befores == EXPECTED[True] * len(runs)
    found = {number: found for number, (_, *found) in ends(points).items()}
    assert found == expected(runs, found)
    places = Counter(runs.values())
    assert places[False] > 30
    assert places[True] > 30
    account = child.influx.stats()["main"]
    assert account["points"] == account["sent"] == 2 * len(runs)
    assert account["clamped"] == 0


def test_so_it_is_in_the_first_run_of_a_child(child: Child, receiver: Receiver) -> None:
    runs: dict[int, bool | None] = {}
    for first in range(0, 5_000, 401):
        runs.update(child.run(first, 1))

    assert child.influx.close(5)
    points = receiver.points("celery_task", at_least=len(runs))
    assert ends(points) == expected(runs, ends(points))
    assert {True, False} <= set(runs.values())
    assert child.influx.stats()["main"]["points"] == len(runs)


def test_wherever_it_comes_while_the_pipe_is_full_the_account_is_right(
    child: Child, receiver: Receiver
) -> None:
    child.relay.PATIENCE = 0.0
    fcntl.fcntl(child.relay._write_fd, F_SETPIPE_SZ, 65_536)
    filled = 0
    for rest in (b"." * 1_000, b""):
        while child.relay.put(0, b'filler text="%s"' % rest):
            filled += 1

    runs = child.run()

    assert child.influx.close(5)
    account = child.influx.stats()["main"]
    kept = account["sent"] - filled  # by the child, until there was room again
    assert account["points"] == len(runs)
    assert account["dropped"] == len(runs) - kept > 100
    found = ends(receiver.points("celery_task", at_least=kept))
    assert found == expected({number: runs[number] for number in found}, found)
    assert len(found) == kept > 3


class Spoken:
    """What a task may send by mistake, and how it may read."""

    def __repr__(self) -> str:
        return "spoken"


class Unspoken:
    def __repr__(self) -> str:
        raise KeyError("no name")


class Line:
    """As influxdb-client's points are read."""

    def to_line_protocol(self) -> str:
        return "m f=1i 1"


class Lines:
    """Several points, from where anything may be done."""

    def __iter__(self) -> Iterator[Point]:
        return iter([Point("m", {"f": 1}), Point("m", {"f": 2})])


GIVEN = {
    "point": Point("m", {"f": 1}, {"t": "v"}),
    "mapping": {"measurement": "m", "fields": {"f": 1, "none": None}},
    "tag": Point("m", {"f": 1}, {"t": Spoken()}),
    "line": Line(),
    "several": Lines(),
    "wrong field": Point("m", {"f": Spoken()}),
    "nameless field": Point("m", {"f": Unspoken()}),
    "number too large": Point("m", {"f": 10**5000}),
    "wrong time": Point("m", {"f": 1}, None, Unspoken()),  # type: ignore[arg-type]
    "wrong tag": Point("m", {"f": 1}, {"t": Unspoken()}),
    "no point": {"nothing": 1},
    "another type": Point("m", {"f": "text"}),
}


@pytest.mark.parametrize("child", ["ordinary"], indirect=True)
@pytest.mark.parametrize("given", GIVEN)
def test_wherever_it_comes_in_send_data_the_task_has_its_limit(
    given: str, child: Child, receiver: Receiver, tmp_path: Path
) -> None:
    def send_in_child(first: int, most: int) -> None:
        current_process().index = 0
        logging.disable()  # what comes in the logging module it keeps to itself
        places = []
        for place in range(first, first + most):
            limit, passed = Limit(place), False
            sys.settrace(limit)
            try:
                child.influx.send_data(GIVEN[given])
            except SoftTimeLimitExceeded:
                passed = True
            finally:
                sys.settrace(None)
            if not limit.has_come:
                break
            places.append(passed)
            child.influx.send_data(Point("m", {"f": 1}))  # it goes on as if nothing had been
        with notes.open("a") as file:
            file.write(json.dumps(places) + "\n")
        child.influx.leave_pool()

    notes = tmp_path / "passed"
    for first, most in ((0, 10_000), *((first, 1) for first in range(0, 2_000, 401))):
        pid = fork(lambda first=first, most=most: send_in_child(first, most))
        if child.relay._reader is None:
            child.influx.start()
        assert exit_code(pid) == 0

    assert child.influx.close(5)
    later, *firsts = map(json.loads, notes.read_text().splitlines())
    assert len(later) > (1 if extension else 5)
    assert all(later)
    assert all(map(all, firsts))
    assert firsts[:2] == [[True], [True]]
    account = child.influx.stats()["main"]
    assert account["sent"] == len(receiver.points("m", account["sent"]))
    assert account["sent"] >= len(later)
    # Nobody can tell that it comes right after the write: that point is there, and "dropped".
    both = account["sent"] + account["rejected"] + account["dropped"] - account["points"]
    assert 0 <= both < 20


class LimitAtLocks(Limit):
    """Comes where a pool of connections is asked for one, or given one back, alone."""

    WHERE = (queue.__file__, threading.__file__, bounded.__file__)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename in self.WHERE:
            return super().__call__(frame, event, arg)
        return None


def test_wherever_it_comes_in_a_request_the_next_one_does_not_hang() -> None:
    with serving() as server, server.client() as client:
        assert client.ping()
        for place in range(10_000):
            limit = LimitAtLocks(place)
            sys.settrace(limit)
            try:
                client.ping()
            except SoftTimeLimitExceeded:
                pass
            finally:
                sys.settrace(None)
            assert client.ping()
            if not limit.has_come:
                break
    assert place > 10
