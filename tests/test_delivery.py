"""Delivery: what an attempt comes to, what is tried again and when, and the account of it."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celery_influx.counters import COUNTERS, Counters
from celery_influx.delivery import Delivery, Fate, fate_of
from celery_influx.errors import SendError
from celery_influx.report import Report
from celery_influx.spool import Spool


class Recorder:
    """A transport that keeps what it was given, and answers with ``answer``."""

    confirms = False

    def __init__(self, answer: int | Exception = 0, address: str = "udp://here:1") -> None:
        self.answer = answer
        self.address = address
        self.max_bytes, self.burst = 100, 1
        self.payloads: list[bytes] = []
        self.closed = 0

    def write(self, *payloads: bytes) -> int:
        self.payloads += payloads
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        self.closed += 1


def delivery(transport: Recorder) -> tuple[Delivery, Counters]:
    counters = Counters(1)
    report = Report(logging.getLogger("tests.delivery"))
    return Delivery("metrics", transport, counters.row(0), report), counters


def counted(counters: Counters) -> dict[str, int]:
    total = counters.total(0)
    return {name: total[name] for name in COUNTERS if total[name]}


def test_lines_go_out_as_one_payload_and_are_counted_as_sent() -> None:
    transport = Recorder()
    sender, counters = delivery(transport)

    sender.deliver([b"a f=1", b"b f=1"])

    assert transport.payloads == [b"a f=1\nb f=1"]
    assert counted(counters) == {"sent": 2, "payloads": 1, "bytes": 11}


def test_several_payloads_at_once_are_counted_each() -> None:
    transport = Recorder()
    sender, counters = delivery(transport)

    sender.deliver([b"a f=1", b"b f=1"], [b"c f=1"])
    transport.answer = SendError("udp://here:1 refused it; mend it so", "ECONNREFUSED")
    sender.deliver([b"a f=1"], [b"c f=1"])

    assert transport.payloads[:2] == [b"a f=1\nb f=1", b"c f=1"]
    assert counted(counters) == {"sent": 3, "payloads": 2, "bytes": 16, "lost": 2, "errors": 1}


def test_a_failed_attempt_is_counted_as_lost_and_said_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport = Recorder(SendError("udp://here:1 refused it; mend it so", "ECONNREFUSED"))
    sender, counters = delivery(transport)

    sender.deliver([b"a", b"b", b"c"])

    assert sender.failed == 3
    assert counted(counters) == {"lost": 3, "errors": 1}
    assert caplog.messages == ["metrics: udp://here:1 refused it; mend it so; 3 lines lost"]


def test_each_cause_of_failure_is_said_on_its_own(caplog: pytest.LogCaptureFixture) -> None:
    transport = Recorder()
    sender, _ = delivery(transport)

    for cause in ("dns", "EMSGSIZE", "dns", "EMSGSIZE"):
        transport.answer = SendError(cause, cause)
        sender.deliver([b"a"])

    assert caplog.messages == ["metrics: dns; 1 lines lost", "metrics: EMSGSIZE; 1 lines lost"]


def test_what_the_server_rejected_is_counted_so_and_the_rest_as_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport = Recorder(2)
    transport.rejection = "points beyond retention policy"
    sender, counters = delivery(transport)

    sender.deliver([b"a", b"b", b"c"])

    assert sender.failed == 2
    assert counted(counters) == {"sent": 1, "rejected": 2, "payloads": 1, "bytes": 5}
    assert caplog.messages == [
        "metrics: the server rejected 2 of 3 lines: points beyond retention policy"
    ]


def test_a_server_cannot_reject_more_than_it_was_sent() -> None:
    sender, counters = delivery(Recorder(1_000))

    sender.deliver([b"a", b"b"])

    assert counted(counters) == {"rejected": 2, "payloads": 1, "bytes": 3}


@pytest.mark.parametrize(
    ("address", "mend"),
    [
        ("udp://here:1", "use the transport http"),
        ("http://here:1/db", "set 'batch_bytes' higher"),
    ],
)
def test_lines_longer_than_a_payload_are_counted_as_rejected_with_the_mend(
    address: str, mend: str, caplog: pytest.LogCaptureFixture
) -> None:
    sender, counters = delivery(Recorder(address=address))

    sender.reject(3)

    assert counted(counters) == {"rejected": 3}
    assert caplog.messages == [
        (
            f"metrics: 3 lines are longer than the 100 bytes of one payload to {address}, and were "
            f"rejected; send shorter string fields and tags, or {mend}"
        )
    ]


def test_lines_given_up_are_counted_as_lost() -> None:
    sender, counters = delivery(Recorder())

    sender.give_up([[b"a", b"b"], [b"c", b"d"]])

    assert sender.failed == 4
    assert counted(counters) == {"lost": 4, "errors": 1}


def test_the_limit_is_the_transports_and_closing_closes_it() -> None:
    transport = Recorder()
    sender, _ = delivery(transport)

    transport.max_bytes = 77
    sender.close()

    assert sender.max_bytes == 77
    assert transport.closed == 1


# -- what is tried again -----------------------------------------------------------------------


class Server:
    """A transport that confirms. It answers what ``answers`` say, one after another, then 0.

    Or ``judge`` says what of each payload's lines.
    """

    confirms = True
    address = "http://here:1/db"
    max_bytes, burst = 10_000, 1
    rejection = "its words"

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.judge: Callable[[list[bytes]], int | Exception] | None = None
        self.payloads: list[bytes] = []
        self.stored: list[bytes] = []

    def write(self, *payloads: bytes) -> int:
        (payload,) = payloads
        self.payloads.append(payload)
        lines = payload.split(b"\n")
        answer = self.answers.pop(0) if self.answers else 0
        if self.judge and not answer:
            answer = self.judge(lines)
        if isinstance(answer, Exception):
            raise answer
        self.stored += lines[answer:]
        return answer

    def abandon(self) -> None:
        """Not used here."""

    def close(self) -> None:
        """Nor is this."""


class Scene:
    """A delivery to a ``Server``, and a clock that goes on by hand."""

    def __init__(
        self,
        server: Server,
        *,
        age: float = 600.0,
        tries: int = 4,
        spool: Path | None = None,
        spool_first: bool = False,
    ) -> None:
        self.server = server
        self.counters = Counters(1)
        self.now = 1_000.0
        self.share = 1.0
        row = self.counters.row(0)
        report = Report(logging.getLogger("tests.delivery"), clock=lambda: self.now)
        if spool:
            self.spool = Spool("metrics", "here", str(spool), 10_000_000, row, report)
        self.delivery = Delivery(
            "metrics",
            server,
            row,
            report,
            retry_age=age,
            retry_tries=tries,
            spool=self.spool if spool else None,
            spool_first=spool_first,
            clock=lambda: self.now,
            spread=lambda: self.share,
        )
        self.delivery.open()

    def go_on(self, most: int = 1_000) -> list[float]:
        """Try as often as there is something to try; the waits before, those that there were."""
        waits = []
        while self.delivery.held and len(waits) < most:
            if self.delivery.wait:
                waits.append(round(self.delivery.wait, 3))
            self.now += self.delivery.wait
            assert self.delivery.wait == 0
            self.delivery.retry()
        return waits

    def counted(self) -> dict[str, int]:
        found = counted(self.counters)
        found.pop("bytes", None)
        return found


def failure(cause: str, retry_after: float | None = None) -> SendError:
    return SendError(f"it said {cause}; mend it so", cause, retry_after)


BATCH = [b"a f=1", b"b f=1", b"c f=1"]


@pytest.mark.parametrize(
    ("causes", "fate"),
    [
        (["timeout", "dns", "connection", "ECONNREFUSED", "EPIPE", "ENETUNREACH"], Fate.NO_ANSWER),
        (["408", "425", "429", "500", "502", "503", "504", "507"], Fate.BUSY),
        (["401", "403", "404", "tls", "secret"], Fate.ACCESS),
        (["301", "302", "303", "307", "308"], Fate.ACCESS),
        (["conflict"], Fate.AGAIN),
        (["400", "413", "422"], Fate.SPLIT),
        (["405", "300", "304", "402", "410", "418", "200"], Fate.FINAL),
    ],
)
def test_each_cause_has_its_fate(causes: list[str], fate: Fate) -> None:
    assert [fate_of(cause) for cause in causes] == [fate] * len(causes)


@pytest.mark.parametrize(
    ("cause", "counter"),
    [
        ("ECONNREFUSED", "errors_no_answer"),
        ("503", "errors_busy"),
        ("404", "errors_access"),
    ],
)
def test_what_may_pass_is_tried_again_until_it_has_passed(
    cause: str, counter: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(Server(*[failure(cause)] * 3))

    scene.delivery.deliver(BATCH)
    assert scene.delivery.held == 3
    assert scene.counted() == {"errors": 1, counter: 1}
    scene.go_on()

    assert scene.server.stored == BATCH
    assert scene.delivery.held == scene.delivery.failed == 0
    assert scene.counted() == {"sent": 3, "payloads": 1, "errors": 3, counter: 3}
    assert len(caplog.messages) == (2 if cause == "404" else 1)  # a minute has passed
    assert caplog.messages[0].startswith(f"metrics: it said {cause}; mend it so; 3 lines are tried")


def test_waits_grow_by_two_up_to_half_a_minute_and_are_random() -> None:
    scene = Scene(Server(*[failure("dns")] * 9))
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]

    scene = Scene(Server(*[failure("dns")] * 3))
    scene.share = 0.25
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == [0.125, 0.25, 0.5]

    scene.server.answers = [failure("dns")] * 2  # the next batch begins anew
    scene.share = 0.0
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == [0.01, 0.01]


def test_what_somebody_must_mend_is_tried_at_long_intervals() -> None:
    scene = Scene(Server(*[failure("401")] * 20))
    scene.share = 0.0
    scene.delivery.deliver(BATCH)
    scene.share = 1.0

    assert scene.go_on() == [15.0, *[30.0] * 19]
    assert scene.server.stored == BATCH


def test_the_servers_own_wish_is_obeyed_also_by_who_is_in_a_hurry() -> None:
    scene = Scene(Server(failure("429", 90.0), failure("503"), failure("503")))
    scene.delivery.deliver(BATCH)
    scene.delivery.hurry(at_once=True)

    assert scene.go_on(2) == [90.0, 1.0]
    assert scene.delivery.wait == 2.0
    scene.delivery.hurry()
    assert scene.delivery.wait == 0.5
    scene.delivery.hurry(at_once=True)
    assert scene.delivery.wait == 0.0
    scene.go_on()
    assert scene.server.stored == BATCH


def test_who_is_in_a_hurry_can_neither_hammer_the_server_nor_use_up_a_batchs_attempts() -> None:
    scene = Scene(Server(*[failure("503")] * 20), tries=4)
    scene.share = 1.0
    scene.delivery.deliver(BATCH)
    for _ in range(19):
        for _ in range(100):
            scene.delivery.hurry()
        assert scene.delivery.wait == 0.5
        scene.now += 0.5
        scene.delivery.retry()
        assert scene.delivery.held == 3
    scene.go_on()
    assert scene.server.stored == BATCH


def test_a_batch_that_is_too_old_is_lost_and_the_next_one_has_its_own_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene(Server(*[failure("timeout")] * 8), age=60.0)
    scene.delivery.deliver(BATCH)

    assert scene.go_on() == [0.5, 1, 2, 4, 8, 16, 28.5]
    assert scene.counted() == {"lost": 3, "errors": 8, "errors_no_answer": 8}
    assert scene.delivery.failed == 3
    assert "metrics: it said timeout; mend it so; 3 lines lost after 60 s" in caplog.messages

    scene.server.answers = [failure("timeout")]
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == [0.5]
    assert scene.server.stored == BATCH


def test_a_server_that_asks_for_a_year_is_asked_once_more_at_the_end() -> None:
    scene = Scene(Server(*[failure("503", 3e7)] * 2), age=60.0)
    scene.delivery.deliver(BATCH)

    assert scene.go_on() == [60.0]
    assert scene.counted() == {"lost": 3, "errors": 2, "errors_busy": 2}


def test_what_a_server_answers_again_and_again_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """InfluxDB 1.x answers 500 to what it will never take."""
    scene = Scene(Server(failure("ECONNREFUSED"), *[failure("500")] * 4), tries=4)
    scene.delivery.deliver(BATCH)
    scene.go_on()

    assert len(scene.server.payloads) == 5
    assert scene.counted() == {
        "lost": 3,
        "errors": 5,
        "errors_no_answer": 1,
        "errors_busy": 4,
    }
    assert caplog.messages[-1] == "metrics: it said 500; mend it so; 3 lines lost after 4 attempts"


@pytest.mark.parametrize("given", [{"tries": 1}, {"age": 0}], ids=str)
def test_the_servers_wish_is_obeyed_by_the_batch_after_one_that_is_lost(given: dict) -> None:
    scene = Scene(Server(failure("503", 90.0)), **given)
    scene.delivery.deliver(BATCH)
    assert scene.counted()["lost"] == 3
    scene.delivery.deliver([b"next"])
    scene.delivery.hurry(at_once=True)

    assert scene.delivery.wait == 90.0
    assert scene.go_on() == [90.0]
    assert scene.server.stored == [b"next"]


def test_one_long_line_does_not_shorten_all_later_batches_for_good() -> None:
    scene = Scene(Server())
    scene.server.judge = lambda lines: failure("413") if b"long" in lines else 0
    scene.delivery.deliver([b"%d" % number for number in range(999)] + [b"long"])
    scene.go_on()
    assert scene.counted()["rejected"] == 1
    assert scene.delivery.most_lines == 500

    for _ in range(50):
        scene.delivery.deliver([b"x"] * scene.delivery.most_lines)
    assert scene.delivery.most_lines > 1_000


def test_how_many_lines_a_server_takes_at_once_is_learned() -> None:
    scene = Scene(Server())
    scene.server.judge = lambda lines: failure("413") if len(lines) > 300 else 0
    for _ in range(100):
        scene.delivery.deliver([b"x"] * min(1_000, scene.delivery.most_lines))
        scene.go_on()
    assert 150 <= scene.delivery.most_lines <= 305
    assert len(scene.server.payloads) < 130
    assert "rejected" not in scene.counted()


@pytest.mark.parametrize("cause", ["405", "300", "402"])
def test_what_will_never_be_taken_is_lost_at_once(
    cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(Server(failure(cause)))
    scene.delivery.deliver(BATCH)

    assert scene.delivery.held == 0
    assert scene.counted() == {"lost": 3, "errors": 1, "errors_refused": 1}
    assert caplog.messages == [f"metrics: it said {cause}; mend it so; 3 lines lost"]


@pytest.mark.parametrize("cause", ["timeout", "503", "404"])
def test_with_no_age_nothing_is_tried_again(cause: str) -> None:
    scene = Scene(Server(failure(cause)), age=0.0)
    scene.delivery.deliver(BATCH)

    assert scene.delivery.held == 0
    assert scene.delivery.failed == 3
    assert len(scene.server.payloads) == 1


# -- bad lines ---------------------------------------------------------------------------------


def refuse(bad: set[bytes], cause: str = "400") -> Callable[[list[bytes]], int]:
    """A judge that takes nothing of a payload with one of these lines, and names the first."""

    def judge(lines: list[bytes]) -> int:
        first = next((line for line in lines if line in bad), None)
        if first is not None:
            raise SendError(f"it said {cause}: bad {first.decode()}", cause)
        return 0

    return judge


@pytest.mark.parametrize("cause", ["400", "422"])
def test_of_a_batch_refused_whole_only_the_bad_lines_are_rejected(
    cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch = [b"line %d" % number for number in range(5_000)]
    bad = {batch[number] for number in (0, 2_345, 4_999)}
    scene = Scene(Server())
    scene.server.judge = refuse(bad, cause)

    scene.delivery.deliver(batch)
    assert scene.go_on() == []

    assert scene.delivery.held == 0
    assert scene.server.stored == [line for line in batch if line not in bad]  # in order
    assert scene.delivery.failed == 3
    found = scene.counted()
    assert (found["sent"], found["rejected"]) == (4_997, 3)
    assert found["errors"] == found["errors_refused"]
    assert len(scene.server.payloads) < 50
    named = "; ".join(f"it said {cause}: bad line {number}" for number in (0, 2_345, 4_999))
    assert caplog.messages == [f"metrics: the server rejected 3 of 5000 lines: {named}"]


def test_after_64_requests_the_rest_of_a_batch_is_rejected(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = [b"line %d" % number for number in range(5_000)]
    scene = Scene(Server())
    scene.server.judge = refuse(set(batch[::3]))

    scene.delivery.deliver(batch)
    assert scene.go_on() == []

    assert scene.delivery.held == 0
    assert len(scene.server.payloads) == 64
    last = caplog.messages[-1]
    assert last.endswith("found no end of bad lines: it said 400: bad line 12"), last
    found = scene.counted()
    assert found["sent"] == len(scene.server.stored)
    assert found["sent"] + found["rejected"] == 5_000
    assert scene.delivery.failed == found["rejected"]


def test_the_attempt_after_a_conflict_is_one_of_the_64() -> None:
    scene = Scene(Server(failure("conflict")))
    scene.server.judge = refuse({b"line %d" % number for number in range(0, 5_000, 3)})

    scene.delivery.deliver([b"line %d" % number for number in range(5_000)])
    scene.go_on()

    assert len(scene.server.payloads) == 64


@pytest.mark.parametrize("cause", ["413", "EMSGSIZE"])
def test_to_whom_everything_is_too_long_64_requests_are_made(
    cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(Server())
    scene.server.judge = lambda lines: failure(cause)

    scene.delivery.deliver([b"line %d" % number for number in range(5_000)])
    scene.go_on()

    assert len(scene.server.payloads) == 64
    assert scene.counted()["rejected"] == scene.delivery.failed == 5_000
    assert caplog.messages[0].startswith("metrics: the server rejected 28 of 5000 lines: it said")
    assert caplog.messages[1].startswith("metrics: the server rejected 4972 of 4972 lines: found")


def test_each_cause_of_a_rejection_is_said_on_its_own(caplog: pytest.LogCaptureFixture) -> None:
    reasons = [
        "partial write: unable to parse 'x': missing fields dropped=0",
        'partial write: field type conflict: input field "f" on measurement "m" is type string',
        "partial write: points beyond retention policy dropped=1",
    ]
    scene = Scene(Server())
    for reason in (*reasons, *reasons):
        scene.server.answers, scene.server.rejection = [1], reason
        scene.delivery.deliver(BATCH)
    for cause in ("413", "422", "413", "422"):
        scene.server.judge = refuse({b"a f=1"}, cause)
        scene.delivery.deliver(BATCH)
        scene.go_on()

    assert caplog.messages == [
        *(f"metrics: the server rejected 1 of 3 lines: {reason}" for reason in reasons),
        "metrics: the server rejected 1 of 3 lines: it said 413: bad a f=1",
        "metrics: the server rejected 1 of 3 lines: it said 422: bad a f=1",
    ]


@pytest.mark.parametrize("cause", ["413", "EMSGSIZE"])
@pytest.mark.parametrize("most", [1, 7, 100, 2_499])
def test_what_is_too_long_at_once_goes_in_parts_and_the_next_ones_are_shorter(
    most: int, cause: str
) -> None:
    batch = [b"line %d" % number for number in range(5_000)]
    scene = Scene(Server())

    def judge(lines: list[bytes]) -> int:
        if len(lines) > most:
            raise failure(cause)
        return 0

    scene.server.judge = judge
    scene.delivery.deliver(batch)
    assert scene.go_on() == []

    assert scene.server.stored == batch
    assert scene.counted()["sent"] == 5_000
    assert "rejected" not in scene.counted()
    assert most / 2 <= scene.delivery.most_lines <= most


def test_the_answers_to_a_search_are_not_kept_until_it_is_over() -> None:
    """A server may say as much as a batch is long to each line that it does not take."""
    kept: list[weakref.ref[set[int]]] = []

    def judge(lines: list[bytes]) -> int | Exception:
        answer = {1}
        kept.append(weakref.ref(answer))
        if b"long" in lines:
            raise failure("413")
        return 0

    scene = Scene(Server())
    scene.server.judge = judge
    scene.delivery.deliver([b"long", b"a", b"long", b"b"])
    while scene.delivery.held > 1:
        scene.delivery.retry()
    assert scene.counted()["rejected"] == 2
    assert [each() for each in kept] == [None] * len(kept)


def test_a_line_that_is_too_long_alone_is_rejected() -> None:
    scene = Scene(Server())

    def judge(lines: list[bytes]) -> int:
        if sum(map(len, lines)) > 100:
            raise failure("413")
        return 0

    scene.server.judge = judge
    scene.delivery.deliver([b"a", b"x" * 101, b"b"])
    assert scene.go_on() == []

    assert scene.server.stored == [b"a", b"b"]
    assert scene.counted()["rejected"] == 1


@pytest.mark.parametrize("place", [0, 1, 2, 499, 500, 998, 999])
def test_one_bad_line_of_a_thousand_is_found_in_a_dozen_requests(place: int) -> None:
    batch = [b"line %d" % number for number in range(1_000)]
    scene = Scene(Server())
    scene.server.judge = refuse({batch[place]})

    scene.delivery.deliver(batch)
    assert scene.go_on() == []

    assert scene.server.stored == batch[:place] + batch[place + 1 :]
    assert scene.counted()["rejected"] == 1
    assert len(scene.server.payloads) <= 13


def test_while_bad_lines_are_looked_for_the_server_may_go_away() -> None:
    batch = [b"line %d" % number for number in range(100)]
    scene = Scene(Server(failure("400"), 0, failure("timeout"), failure("503")))
    scene.delivery.deliver(batch)
    assert scene.delivery.held == 100

    assert scene.go_on() == [0.5, 1.0]
    assert scene.server.stored == batch
    found = scene.counted()
    assert found.pop("payloads") > 2
    assert found == {
        "sent": 100,
        "errors": 3,
        "errors_refused": 1,
        "errors_no_answer": 1,
        "errors_busy": 1,
    }


def test_a_conflict_of_types_is_tried_again_once_and_at_once() -> None:
    scene = Scene(Server(failure("conflict"), 1))
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == []
    assert scene.counted() == {
        "sent": 2,
        "rejected": 1,
        "payloads": 1,
        "errors": 1,
        "errors_refused": 1,
    }
    assert scene.delivery.failed == 1

    scene = Scene(Server())
    scene.server.judge = refuse({BATCH[1]}, "conflict")
    scene.delivery.deliver(BATCH)
    assert scene.go_on() == []
    assert scene.server.stored == [BATCH[0], BATCH[2]]
    assert scene.counted()["rejected"] == 1


# -- whatever comes ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_server_answers_each_line_has_one_fate_and_it_comes_to_an_end(
    seed: int,
) -> None:
    chance = random.Random(seed)
    causes = [
        *("timeout", "ECONNREFUSED", "dns", "tls", "408", "429", "500", "503", "401", "404"),
        *("400", "413", "422", "conflict", "405", "301", "499", "no such word", "", "99999"),
    ]
    waits = [None, None, None, 0.0, 3.5, 1e9]

    def answer() -> int | Exception:
        if chance.random() < 0.4:
            return chance.randrange(-1, 3) if chance.random() < 0.2 else 0
        return failure(chance.choice(causes), chance.choice(waits))

    class Odd(Server):
        def write(self, *payloads: bytes) -> int:
            self.answers = [answer()]
            found = super().write(*payloads)
            return max(0, found)

    scene = Scene(Odd(), age=chance.choice([0.0, 10.0, 600.0]), tries=chance.choice([1, 3, 1_000]))
    scene.share = chance.random()
    made = 0
    for _ in range(200):
        batch = [b"line %d" % number for number in range(chance.randrange(1, 40))]
        made += len(batch)
        scene.delivery.deliver(batch)
        scene.go_on(10_000)
        assert scene.delivery.held == 0
        found: dict[str, Any] = scene.counters.total(0)
        assert found["sent"] + found["lost"] + found["rejected"] == made
        assert scene.delivery.failed == found["lost"] + found["rejected"]
    parts = ("errors_no_answer", "errors_busy", "errors_access", "errors_refused")
    assert sum(found[name] for name in parts) == found["errors"]


def test_a_spool_that_cannot_be_opened_leaves_the_batch_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    scene = Scene(Server(failure("timeout")), spool=loop)

    scene.delivery.deliver(BATCH)

    assert scene.delivery.held == 3
    assert caplog.messages[0].startswith("metrics: no spool, so points wait in memory only: ")
