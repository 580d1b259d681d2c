"""A worker, work for it, and a table of what arrived in InfluxDB. See README.md."""

import argparse
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from celery_influx import InfluxError
from example_project import stage, tables

BATCH = 25  # files
BACKLOG = 150  # tasks on their way at a time: enough for some to wait
PATIENCE = 3.0  # seconds in which no more points arrive


def main() -> int:
    """0: every point arrived. 1: not every one, or something failed. 130: stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m example_project", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="how long to work; default: 10")
    parser.add_argument("--files", type=int, help="work on this many files instead")
    options = parser.parse_args()
    stage.interrupt(stage.stop)
    folder = Path(tempfile.mkdtemp(prefix="celery_influx_example_"))
    os.environ["EXAMPLE_FOLDER"] = str(folder)
    os.environ["BROKER"] = os.environ.get("BROKER") or f"folder://{folder}/queue"
    try:
        return run(folder, options.files, options.seconds)
    except KeyboardInterrupt:
        print("Stopped; nothing is left running.")
        return 130
    except (stage.FailedError, InfluxError) as error:
        print(f"\nFAILED: {error}{stage.log_of(folder)}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, most_files: int | None, seconds: float) -> int:
    """Start all, do the work, stop the worker, and show what arrived; the exit code."""
    with stage.database() as database:
        from example_project import tally  # only now: the app reads the environment
        from example_project.app import app

        print(f"InfluxDB: {database.name}\nbroker:   {stage.broker(app)}", flush=True)
        with stage.worker(folder) as process:
            progress = stage.Progress(process)
            progress.wait(lambda: tally.read()["ready"], lambda: "the worker is starting")
            work(progress, most_files, seconds)
            progress.show("the worker is stopping")
        app.influx.close()
        worker = json.loads((folder / "worker.json").read_text())
        counted = tally.points()
        rows, last = database.rows(counted), time.monotonic()
        while len(rows) < counted.total() and time.monotonic() - last < PATIENCE:
            progress.show(f"{len(rows):,} of {counted.total():,} points have arrived")
            time.sleep(0.2)
            more = database.rows(counted)
            if len(more) > len(rows):
                rows, last = more, time.monotonic()
        progress.end()
        print("", tables.of_tasks(rows), "", tables.of_points(rows), "", sep="\n")
        accounts = {"the worker": worker, "this program": app.influx.stats()["celery"]}
        return compare(accounts, counted.total(), len(rows), database.refused)


def work(progress: stage.Progress, most_files: int | None, seconds: float) -> None:
    """Send tasks, not too many at a time, and wait until each has come to its end."""
    from example_project import tally, tasks

    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(str(file) for file in library.rglob("*.py") if "-packages" not in str(file))
    random.Random(1).shuffle(files)
    end = time.monotonic() + seconds
    sent = 0

    def on_their_way() -> int:
        return sent - ended()

    def ended() -> int:
        words = tally.read()
        return words["task succeeded"] + words["task failed"]

    def text() -> str:
        left = f"; {max(0, end - time.monotonic()):.0f} s left" if most_files is None else ""
        return f"{ended():,} tasks have ended, {on_their_way():,} are on their way{left}"

    for start in count(0, BATCH):
        size = BATCH if most_files is None else min(BATCH, most_files - start)
        if size <= 0 or (most_files is None and time.monotonic() > end):
            break
        batch = [files[number % len(files)] for number in range(start, start + size)]
        tally.add("point timed")
        with tasks.app.influx.timed("submit"):
            for path in batch:
                for task in (tasks.parse, tasks.count_words, tasks.compress, tasks.digest):
                    task.delay(path)
            tasks.report.apply_async((batch,), countdown=1)
        sent += 4 * size + 1
        progress.wait(lambda: on_their_way() <= BACKLOG, text)
    progress.wait(lambda: on_their_way() <= 0, text)
    progress.show(text())


def compare(
    accounts: dict[str, dict[str, int]], counted: int, received: int, refused: Sequence[str]
) -> int:
    """Hold what the plugin and the tasks counted against what arrived; the exit code."""
    made = sum(account["points"] for account in accounts.values())
    more = {"the tasks' own count": {"points": counted}, "arrived": {"received": received}}
    print(tables.of_account({**accounts, **more}), "", sep="\n")
    for reason in refused[:3]:
        print(f"refused: {reason[:200]}")
    if made == counted == received and not refused:
        print(f"{made:,} points made, {received:,} received: none lost.")
        return 0
    if received < max(made, counted):
        print(
            f"{made:,} points made ({counted:,} by the tasks' own count), {received:,} received: "
            f"{max(made, counted) - received:,} ARE MISSING."
        )
    else:
        print(
            f"THE COUNTS DIFFER: {made:,} points made, {counted:,} by the tasks' own count, "
            f"{received:,} received."
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
