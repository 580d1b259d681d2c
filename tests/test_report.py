"""Report: a warning once per cause and minute, with the count of what was left unsaid."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from celery_influx.report import Report
from tests.conftest import TimeIsUp

LOGGER = logging.getLogger("tests.report")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def report(clock: Clock) -> Report:
    return Report(LOGGER, 60.0, clock)


@pytest.fixture
def filtered() -> Iterator[list[object]]:
    """Filters that are taken off at the end."""
    filters: list[object] = []
    yield filters
    for each in filters:
        LOGGER.removeFilter(each)


def test_a_cause_is_said_once_a_minute_with_the_count_of_the_rest(
    report: Report, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for moment in (0, 1, 30, 59.9, 60, 61, 120.5, 200):
        clock.now = moment
        report.warn("cause", "at %s", moment)

    assert caplog.messages == [
        "at 0",
        "at 60 (and 3 times more since it was last said)",
        "at 120.5 (and 1 times more since it was last said)",
        "at 200",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_tasks_time_may_end_in_a_log_filter(
    report: Report, filtered: list[object], time_is_up: None
) -> None:
    def ends(record: logging.LogRecord) -> bool:
        raise TimeIsUp

    LOGGER.addFilter(ends)
    filtered.append(ends)

    with pytest.raises(TimeIsUp):
        report.warn("cause", "text")


def test_causes_do_not_silence_each_other(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    for cause in ("a", "b", "a", "b"):
        report.warn(cause, "%s", cause)

    assert caplog.messages == ["a", "b"]


def test_the_trace_goes_into_the_log_where_it_is_asked_for(
    report: Report, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        {}["here"]
    except KeyError:
        report.warn("cause", "failed", exc_info=True)

    assert "KeyError: 'here'" in caplog.text


def test_causes_without_end_do_not_fill_the_memory(report: Report) -> None:
    for number in range(10 * Report.MAX_CAUSES):
        report.warn(str(number), "x")

    assert len(report._said) <= Report.MAX_CAUSES


def test_of_many_threads_one_says_it_and_all_are_counted(
    report: Report, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Barrier(8)

    def warn() -> None:
        start.wait()
        for _ in range(500):
            report.warn("cause", "said")

    threads = [threading.Thread(target=warn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now = 61
    report.warn("cause", "said")

    assert caplog.messages == ["said", "said (and 3999 times more since it was last said)"]


def test_a_log_filter_that_raises_reaches_nobody(report: Report, filtered: list[object]) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError("from a user's filter")

    LOGGER.addFilter(refuse)
    filtered.append(refuse)

    report.warn("cause", "text")


def test_a_log_handler_that_warns_again_is_not_called_for_ever(
    report: Report, filtered: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    def again(record: logging.LogRecord) -> bool:
        report.warn("cause", "again")
        return True

    LOGGER.addFilter(again)
    filtered.append(again)

    report.warn("cause", "once")

    assert caplog.messages == ["once"]
