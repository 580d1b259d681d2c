"""The example, run as `make demo` runs it: on its own parts, and with real servers."""

from __future__ import annotations

import ast
import contextlib
import os
import pty
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.servers import Influxd, Redis, free_port, wait_for

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
FILES = 40
#: One run of each task for each file, and a report on each batch of at most 25 files.
REPORTS = 2
COMMAND = [sys.executable, "-m", "example_project"]
#: By its path, for the example is run from its folder and not installed.
tables = SimpleNamespace(**runpy.run_path(str(ROOT / "example_project" / "tables.py")))
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("INFLUX", "BROKER")}


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )


def lines_of(output: str) -> dict[str, list[str]]:
    """The tables' lines: the first cell to the others."""
    cells = [re.split(r" {2,}", line.strip()) for line in output.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) > 1}


def goes_wrong() -> dict[str, int]:
    """Of the files that a run of ``FILES`` works on: how many each task fails for, or retries.

    Worked out here once more, for the example is run from its folder and not installed.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(str(file) for file in library.rglob("*.py") if "-packages" not in str(file))
    random.Random(1).shuffle(files)
    found = {"parse": 0, "count_words": 0, "compress": 0}
    for file in files[:FILES]:
        data = Path(file).read_bytes()
        found["count_words"] += not data.isascii()
        found["compress"] += zlib.crc32(file.encode()) % 10 == 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(data.decode("utf-8"))
        except (SyntaxError, ValueError):
            found["parse"] += 1
    return found


def read_number(text: str) -> float:
    return float(text.replace(",", ""))


def check_tables(output: str) -> None:
    lines = lines_of(output)
    wrong = goes_wrong()
    for task in ("parse", "count_words", "digest"):
        assert int(lines[task][0]) == FILES
        assert int(lines[task][2]) == 0
    retried = int(lines["compress"][2])
    assert int(lines["compress"][0]) == FILES + retried
    assert int(lines["report"][0]) == REPORTS
    assert retried == wrong["compress"]
    for task in ("parse", "count_words", "digest", "compress"):
        _, _, _, *times = map(read_number, lines[task])
        assert len(times) == 4
        assert min(times) > 0  # runtime and wait, each the median and 95 %
    failed = {task: int(lines[task][1]) for task in ("parse", "count_words", "digest", "compress")}
    assert failed == {**wrong, "digest": 0, "compress": 0}
    # Else what was just compared is nothing.
    assert retried > 0
    assert failed["count_words"] > 0
    assert int(lines["timed read"][1]) == failed["count_words"]
    assert int(lines["words"][0]) == FILES - failed["count_words"]
    assert int(lines["source_file"][0]) == FILES - failed["parse"]
    assert int(lines["compressed"][0]) == int(lines["timed deflate"][0]) == FILES
    assert int(lines["timed read"][0]) == 2 * FILES
    assert int(lines["timed submit"][0]) == int(lines["batch"][0]) == REPORTS

    runs = 4 * FILES + retried + REPORTS
    own = 6 * FILES + 2 * REPORTS - failed["count_words"] - failed["parse"]
    total = runs + own
    assert "\nthe worker is starting\n" in output
    assert lines["the tasks' own count"] == [str(total)]
    assert lines["arrived"] == [str(total)]
    worker, program = lines["the worker"], lines["this program"]
    assert int(worker[0]) + int(program[0]) == int(worker[1]) + int(program[1]) == total
    assert worker[2:] == program[2:] == ["0", "0", "0"]
    assert f"\n{total:,} points made, {total:,} received: none lost.\n" in output


def test_the_table_of_tasks_has_each_number_in_its_column() -> None:
    # Each differs from all others; the run that was retried has no wait, as a killed one has not.
    runs = [
        {"runtime": number / 10, "wait": number * 4.0, "state": "SUCCESS"}
        for number in range(1, 20)
    ]
    runs[3]["state"] = runs[5]["state"] = "FAILURE"
    runs.append({"runtime": 2.0, "state": "RETRY"})
    rows = [{"measurement": "celery_task", "task": "shop.resize", **run} for run in reversed(runs)]
    once = {"measurement": "celery_task", "task": "shop.once", "state": "REVOKED", "wait": 0.0015}

    table = lines_of(tables.of_tasks([*rows, once, {"measurement": "words", "total": 3}]))

    assert table == {
        "runtime": ["(ms)", "wait", "(ms)"],
        "task": ["runs", "failed", "retried", "median", "95 %", "median", "95 %"],
        # 95 %: so far along the sorted runs, from the first to the last; of waits there are 19.
        "resize": ["20", "2", "1", "1,050", "1,905", "40,000", "72,400"],
        "once": ["1", "0", "0", "0", "0", "1.5", "1.5"],
        "wait: in the queue, free to run.": ["95 %: so many took this long or less."],
    }


def test_the_tables_of_points_and_of_the_account_have_each_number_in_its_column() -> None:
    timed = [
        {"measurement": "timed", "timer": "read", "outcome": outcome, "runtime": runtime, "time": 9}
        for outcome, runtime in (("success", 0.004), ("error", 0.001), ("success", 0.002))
    ]
    own = [{"measurement": "words", "host": "here", "total": n, "seen": n / 8} for n in (500, 700)]
    counted = {"points": 6, "sent": 5, "dropped": 4, "lost": 3, "rejected": 2, "queued": 1}

    points = lines_of(tables.of_points([*timed, *own, {"measurement": "celery_task"}]))
    account = lines_of(tables.of_account({"the worker": counted, "arrived": {"received": 7}}))

    assert points == {
        "points of your own": ["count", "errors", "median of each field"],
        "timed read": ["3", "1", "runtime 2 ms"],
        "words": ["2", "seen 75, total 600"],
    }
    assert account == {
        "account": ["made", "sent", "dropped", "lost", "rejected", "received"],
        "the worker": ["6", "5", "4", "3", "2"],
        "arrived": ["7"],
    }


def test_the_demo_needs_no_server_and_every_point_arrives(tmp_path: Path) -> None:
    done = run(tmp_path, "--files", str(FILES))

    assert done.returncode == 0, done.stdout + done.stderr
    check_tables(done.stdout)
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_same_table_is_made_of_what_a_new_influxd_took_by_udp(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, redis_server: Redis
) -> None:
    # Without the database: influxd makes it at the first point.
    with Influxd(tmp_path_factory.mktemp("influxd"), make_database=False) as influxd:
        url = f"udp://127.0.0.1:{influxd.udp_port}?http_port={influxd.http_port}"

        done = run(tmp_path, "--files", str(FILES), INFLUX=url, BROKER=redis_server.url)

    assert done.returncode == 0, done.stdout + done.stderr
    check_tables(done.stdout)
    assert "InfluxDB 1.6.7" in done.stdout
    assert redis_server.url in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_database_is_made_where_points_go_by_http(
    tmp_path: Path, influxd: Influxd, redis_server: Redis
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/made_by_the_demo"

    done = run(tmp_path, "--files", str(FILES), INFLUX=url, BROKER=redis_server.url)

    assert done.returncode == 0, done.stdout + done.stderr
    check_tables(done.stdout)
    assert influxd.count("words", "total", "made_by_the_demo") > 0


def test_points_that_do_not_arrive_are_counted_and_fail_the_run(
    tmp_path: Path, influxd: Influxd
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hole:  # takes all, and reads nothing
        hole.bind(("127.0.0.1", 0))
        url = f"udp://127.0.0.1:{hole.getsockname()[1]}/celery?http_port={influxd.http_port}"

        done = run(tmp_path, "--files", "4", INFLUX=url)

    assert done.returncode == 1
    made = int(lines_of(done.stdout)["the tasks' own count"][0])
    assert made > 4 * 4
    assert f"0 received: {made} ARE MISSING" in done.stdout


@pytest.mark.long
def test_a_database_that_the_server_does_not_write_to_is_said_with_the_mend(
    tmp_path: Path, influxd: Influxd
) -> None:
    url = f"udp://127.0.0.1:{influxd.udp_port}/other?http_port={influxd.http_port}"

    done = run(tmp_path, INFLUX=url)

    assert done.returncode == 1
    assert "FAILED: the server answered: database not found: other; over UDP" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"INFLUX": "http://127.0.0.1:{port}"}, "FAILED: "),
        ({"INFLUX": "nowhere:8089"}, "FAILED: influx_databases['celery']: "),
        ({"BROKER": "redis://127.0.0.1:{port}"}, "FAILED: no broker at redis://127.0.0.1:"),
    ],
)
def test_what_cannot_start_is_said_in_one_line(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    port = free_port()

    done = run(tmp_path, **{key: url.format(port=port) for key, url in environment.items()})

    assert done.returncode == 1
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


PROGRESS = r"[\d,]+ tasks have ended, [\d,]+ are on their way"


@pytest.mark.long
def test_on_a_terminal_progress_is_one_line_that_changes_and_goes_away(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "--files", "10"],
        cwd=ROOT,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
        stdin=end,
        stdout=end,
        stderr=end,
    ) as process:
        os.close(end)
        output = b""
        with contextlib.suppress(OSError):  # EIO: nobody writes any more
            while part := os.read(terminal, 65_536):
                output += part
        os.close(terminal)
        assert process.wait(30) == 0

    shown = output.decode().split("\r\x1b[K")
    assert "the worker is starting" in shown
    ended = [text for text in shown if re.fullmatch(PROGRESS, text)]
    assert len(set(ended)) > 1
    assert ended[-1] == "41 tasks have ended, 0 are on their way"
    assert shown[-1].startswith("\r\n")
    assert "none lost." in shown[-1]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_stopped_run_leaves_no_process_and_no_file(tmp_path: Path, number: int) -> None:
    with working(tmp_path) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)

    assert process.returncode == 130
    assert output.endswith("Stopped; nothing is left running.\n")
    assert list(tmp_path.iterdir()) == []
    assert workers_of(process.pid) == []


def test_a_worker_that_is_killed_ends_the_run_with_the_end_of_its_log(tmp_path: Path) -> None:
    with working(tmp_path) as process:
        for pid in workers_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "FAILED: the worker ended with exit code -9\n" in output
    assert re.search(r"INFO/MainProcess\] Task example_project\.tasks\.\w+.* received", output)
    (log,) = tmp_path.iterdir()
    assert str(log) in output
    assert log.read_text().rstrip().endswith(output.splitlines()[-1].strip())


@contextlib.contextmanager
def working(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the middle of its work."""
    with subprocess.Popen(
        [*COMMAND, "--seconds", "60"],
        cwd=ROOT,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for(lambda: [t for t in tmp_path.glob("*/tally") if "task" in t.read_text()], 30)
            yield process
        finally:
            if process.poll() is None:  # the test has failed
                for pid in (process.pid, *workers_of(process.pid)):
                    os.kill(pid, signal.SIGKILL)


def workers_of(pid: int) -> list[int]:
    """The worker's processes: its node is named after the run's process."""
    name = f"example-{pid}@".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found
