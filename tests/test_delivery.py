"""Delivery: one attempt, and the account of what came of it."""

from __future__ import annotations

import logging

import pytest

from celery_influx.counters import COUNTERS, Counters
from celery_influx.delivery import Delivery
from celery_influx.errors import SendError
from celery_influx.report import Report


class Recorder:
    """A transport that keeps what it was given, and answers with ``answer``."""

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

    assert sender.deliver([b"a f=1", b"b f=1"]) is True

    assert transport.payloads == [b"a f=1\nb f=1"]
    assert counted(counters) == {"sent": 2, "payloads": 1, "bytes": 11}


def test_several_payloads_at_once_are_counted_each() -> None:
    transport = Recorder()
    sender, counters = delivery(transport)

    assert sender.deliver([b"a f=1", b"b f=1"], [b"c f=1"]) is True
    transport.answer = SendError("udp://here:1 refused it; mend it so", "ECONNREFUSED")
    assert sender.deliver([b"a f=1"], [b"c f=1"]) is False

    assert transport.payloads[:2] == [b"a f=1\nb f=1", b"c f=1"]
    assert counted(counters) == {"sent": 3, "payloads": 2, "bytes": 16, "lost": 2, "errors": 1}


def test_a_failed_attempt_is_counted_as_lost_and_said_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport = Recorder(SendError("udp://here:1 refused it; mend it so", "ECONNREFUSED"))
    sender, counters = delivery(transport)

    assert sender.deliver([b"a", b"b", b"c"]) is False

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

    assert sender.deliver([b"a", b"b", b"c"]) is False

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

    sender.give_up(4)

    assert counted(counters) == {"lost": 4, "errors": 1}


def test_the_limit_is_the_transports_and_closing_closes_it() -> None:
    transport = Recorder()
    sender, _ = delivery(transport)

    transport.max_bytes = 77
    sender.close()

    assert sender.max_bytes == 77
    assert transport.closed == 1
