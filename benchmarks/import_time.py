"""What ``import celery_influx`` adds to a program that uses Celery."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from benchmarks.table import Table, verdict

# Both load next to nothing until a name is asked for. Every user of Celery asks for `Celery`, and
# every user of ours for `install`: of that, what Celery has loaded before is not counted.
CASES = {
    "import celery": ("import celery", "import celery_influx"),
    "from celery import Celery": ("from celery import Celery", "from celery_influx import install"),
}
BEFORE, THEN = CASES["from celery import Celery"]
TIMED = """
{}
from time import perf_counter, process_time
wall, cpu = perf_counter(), process_time()
{}
print((perf_counter() - wall) * 1e3, (process_time() - cpu) * 1e3)
"""


def run(rounds: int = 25, size: int = 8) -> None:
    """Measure and print; ``size`` is how many of the costliest modules are named."""
    with tempfile.TemporaryDirectory() as folder:
        # As installed: with compiled modules, even where this process may not write them.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        without: list[float] = []
        with_ours: list[float] = []
        added: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
        for _ in range(rounds + 1):
            without.append(_cpu(BEFORE, environment))
            with_ours.append(_cpu(f"{BEFORE}; {THEN}", environment))
            for name, case in CASES.items():
                wall, cpu = _output(environment, "-c", TIMED.format(*case)).split()
                added[name].append((float(wall), float(cpu)))
        costs = _costs(environment, size)
    table = Table("`import celery_influx`", "ms", "")
    table.add("interpreter with Celery: CPU", without[1:])  # the first round compiles
    table.add("interpreter with both: CPU", with_ours[1:])
    for name, found in added.items():
        case = " → ".join(CASES[name])
        table.add(f"{case}: CPU", [cpu for _, cpu in found[1:]])
        table.add(f"{case}: wall", [wall for wall, _ in found[1:]])
    table.notes = [
        *(
            verdict(f"ms of CPU added to {name}", [cpu for _, cpu in found[1:]], 15)
            for name, found in added.items()
        ),
        f"Costliest modules, by -X importtime, ms of their own: {costs}",
    ]
    table.show()


def _cpu(program: str, environment: Mapping[str, str]) -> float:
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{program!r} failed")
    return (usage.ru_utime + usage.ru_stime) * 1e3


def _output(environment: Mapping[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _costs(environment: Mapping[str, str], count: int) -> str:
    """The modules that cost most by themselves: the least of five runs, for each."""
    costs: dict[str, int] = {}
    pattern = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
    for _ in range(5):
        trace = _output(environment, "-X", "importtime", "-c", f"{BEFORE}; {THEN}")
        found = pattern.findall(trace)
        names = [name for _, name in found]
        start = names.index("celery_influx._version")  # what comes before is Celery's own
        for own, name in found[start:]:
            costs[name] = min(int(own), costs.get(name, int(own)))
    worst = sorted(costs, key=costs.__getitem__, reverse=True)[:count]
    total = sum(costs.values()) / 1e3
    return ", ".join(f"{name} {costs[name] / 1e3:.1f}" for name in worst) + f"; all {total:.1f}"
