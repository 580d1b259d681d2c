"""Many tasks through one worker: memory stays flat, and no collection of the plugin's grows."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from tests.integration.worker import Worker, resident_kib, sending, stats
from tests.servers import Influxd, wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.timeout(3_600),
]

#: Tasks in all, for each of the two workers.
TASKS = int(os.environ.get("TASKS", "200000"))
#: After so many, everything there is to fill is full.
WARM = TASKS // 10
#: Tasks between two looks at the memory.
STEP = TASKS // 20
#: Tasks that wait in Redis at most, for each worker.
PORTION = min(STEP, 2_500)
#: Growth, in KiB of the worker and of its children, beyond that without the plugin.
#: A leak of 16 bytes with each task would be more than this, of all.
MORE = 3_072
#: By how much the length of a collection may differ from one look to the next: those who look are
#: tasks, and make points as well.
SPREAD = 32

#: How tasks end: the share of each kind, in tenths.
KINDS = ["succeed"] * 4 + ["store", "fail", "retry", "retry", "ignore", "reject"]
RUNS = {"retry": 2}


class Messages:
    """Messages as Celery makes them, but for their ids; thousands at once in no time."""

    def __init__(self, sender: Celery, store: redis.Redis) -> None:
        self._store = store
        self._templates: dict[str, str] = {}
        with sending(sender) as send:
            for kind in set(KINDS):
                send(f"leaking.{kind}", [0], task_id="<id>", queue="template")
                self._templates[kind] = store.lpop("template")

    def send(self, queue: str, numbers: range) -> None:
        """Put the tasks of these numbers into a queue."""
        with self._store.pipeline(transaction=False) as pipe:
            for number in numbers:
                message = json.loads(self._templates[KINDS[number % len(KINDS)]])
                task_id = str(uuid.uuid4())
                for part in (message["headers"], message["properties"]):
                    part.update({key: task_id for key, value in part.items() if value == "<id>"})
                message["properties"]["delivery_tag"] = task_id
                message["properties"]["delivery_info"]["routing_key"] = queue
                message["body"] = _body([number])
                pipe.lpush(queue, json.dumps(message))
            pipe.execute()


def _body(args: list[Any]) -> str:
    """Celery's second protocol: arguments, keywords, and what is to be called afterwards."""
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return base64.b64encode(json.dumps([args, {}, embed]).encode()).decode()


def private_dirty_kib(pid: int) -> int:
    """Memory that ``pid`` alone has written: what a forked child does not share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1])
    raise AssertionError(f"no memory size of {pid}")


class Side:
    """One of the two workers, and what was seen of it."""

    def __init__(self, name: str, worker: Worker, sender: Celery) -> None:
        self.name = name
        self.worker = worker
        self.processes: list[int] = []
        #: For each look, KiB of each process, and what of it is written.
        self.sizes: list[list[int]] = []
        self.dirty: list[list[int]] = []
        self._sender = sender

    def begin(self) -> None:
        """Remember its processes, the worker's own first."""
        self.processes = [self.worker.pid(), *sorted(self.worker.children())]
        assert len(self.processes) == 3

    def look(self) -> None:
        """Note the memory of each process; they still are the same."""
        assert [self.worker.pid(), *sorted(self.worker.children())] == self.processes
        self.sizes.append([resident_kib(pid) for pid in self.processes])
        self.dirty.append([private_dirty_kib(pid) for pid in self.processes])

    def grown(self, kept: list[list[int]]) -> list[int]:
        """By how much the worker, and its children together, grew beyond the warm-up's largest.

        Together, for they do the same, and each now and then takes a MiB more for itself.
        """
        warm = WARM // STEP
        parts = [(worker, sum(children)) for worker, *children in kept]
        return [
            max(part[number] for part in parts[warm:]) - max(part[number] for part in parts[:warm])
            for number in range(2)
        ]

    def kept(self) -> list[dict[str, int]]:
        """What the plugin keeps in each process."""
        found: dict[int, dict[str, int]] = {}

        def all_children() -> bool:
            tasks = [
                self._sender.send_task("leaking.look", [0.2], queue=self.name) for _ in range(2)
            ]
            found.update(task.get(timeout=30) for task in tasks)
            return len(found) == 2

        wait_for(all_children, 60, "an answer of each child")
        control = self._sender.control

        def ask() -> Any:
            return control.broadcast(
                "influx_kept", reply=True, destination=[self.worker.name], timeout=5, limit=1
            )

        (answer,) = wait_for(ask, 30, "an answer of the worker")  # type: ignore[misc]
        return [answer[self.worker.name], *(found[pid] for pid in self.processes[1:])]


def test_memory_is_flat_and_no_collection_grows(
    influxd: Influxd,
    database: str,
    broker: str,
    store: redis.Redis,
    sender: Celery,
    tmp_path: Path,
) -> None:
    url = f"http://127.0.0.1:{influxd.http_port}/{database}"
    config = {"influx_databases": {"metrics": url}}
    sides = {}
    for name in ("with", "without"):
        worker = Worker(
            tmp_path / name,
            "leaking",
            broker,
            {**(config if name == "with" else {}), "task_default_queue": name},
            variables={"PLUGIN": "yes" if name == "with" else "no"},
            level="critical",
        )
        sides[name] = Side(name, worker, sender)
    messages = Messages(sender, store)
    began = time.monotonic()
    kept: list[list[dict[str, int]]] = []

    def waiting() -> int:
        return max(store.llen(name) for name in sides)

    def all_done() -> bool:
        return not waiting() and not store.hlen("unacked")

    def all_sent() -> bool:
        return stats(sender, sides["with"].worker)["metrics"]["queued"] == 0

    with sides["with"].worker, sides["without"].worker:
        for side in sides.values():
            side.begin()
        for number in range(0, TASKS, PORTION):
            for name in sides:
                messages.send(name, range(number, number + PORTION))
            wait_for(lambda: waiting() < PORTION, 600, "the tasks are taken")
            done = number + PORTION
            if done % STEP == 0:
                wait_for(all_done, 600, "the tasks are done")
                if done == WARM:
                    # Before the memory: this writes into pages that a child shared until then.
                    wait_for(all_sent, 60, "nothing is on its way")
                    kept.append(sides["with"].kept())
                for side in sides.values():
                    side.look()
                print(done, f"{time.monotonic() - began:.0f} s", end=" ", flush=True)
                print({side.name: side.sizes[-1] for side in sides.values()}, flush=True)
        custom = sum(RUNS.get(KINDS[number % len(KINDS)], 1) for number in range(TASKS))
        made = 3 * custom  # a custom point, a timed block, and the run itself
        wait_for(all_sent, 60, "nothing is on its way")
        kept.append(sides["with"].kept())
        wait_for(all_sent, 60, "nothing is on its way")
        account = stats(sender, sides["with"].worker)["metrics"]
        for side in sides.values():
            assert side.worker.stop() == 0

    seconds = time.monotonic() - began
    for name, side in sides.items():
        print(f"{name}: RSS at first {side.sizes[0]}, warm {side.sizes[WARM // STEP - 1]},")
        print(f"  last {side.sizes[-1]}; grown {side.grown(side.sizes)}, of it written", end=" ")
        print(f"{side.grown(side.dirty)} KiB")
    biggest = Counter(kept[1][0]) | Counter(kept[1][1])
    print("kept:", dict(biggest.most_common(25)))
    print(f"{TASKS} tasks through each of two workers in {seconds:.0f} s")
    # Nothing was lost or left out, so all of it was tried.
    assert account["sent"] == account["points"]
    assert made <= account["points"] <= made + 100  # and those of who looked
    assert influxd.count("custom", "number", database) == custom
    assert influxd.count("timed", "runtime", database) == custom
    for measure in ("sizes", "dirty"):
        growth = {name: side.grown(getattr(side, measure)) for name, side in sides.items()}
        for mine, theirs in zip(growth["with"], growth["without"], strict=True):
            assert mine <= max(0, theirs) + MORE, (measure, growth)
    for before, after in zip(*kept, strict=True):
        grown = {
            where: (before.get(where, 0), length)
            for where, length in after.items()
            if length > before.get(where, 0) + SPREAD and where != "all objects"
        }
        assert grown == {}
        assert after["Influx._databases"] == 1  # it was looked into
        assert after["all objects"] < before["all objects"] + 2_000
