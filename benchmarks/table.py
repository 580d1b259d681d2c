"""What all parts share: medians and spread, ratios round by round, and the printed table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass
class Table:
    """One part's figures.

    Args:
        title: The part, with what is counted.
        unit: Of the figures.
        ratio: What the last columns say, such as ``"ours / this"``.
    """

    title: str
    unit: str
    ratio: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, figures: Sequence[float], ratios: Sequence[float] = ()) -> None:
        """One row: what it is, its figure in each round, and its ratio in each round."""
        self.rows.append((name, spread(figures), spread(ratios) if ratios else ""))

    def show(self) -> None:
        """Print it, in Markdown."""
        rows = [(self.title, f"{self.unit}: median (quartiles)", self.ratio), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
        for row in rows:
            print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
        print()
        for note in self.notes:
            print(f"- {note}")
        print(flush=True)


def spread(figures: Sequence[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = quartiles(figures)
    digits = 3 if middle < 10 else 1 if middle < 1000 else 0
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def quartiles(figures: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(figures) < 2:
        return (figures[0],) * 3
    low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
    return low, middle, high


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Round by round, since what disturbs a round disturbs both of its figures."""
    return [this / that for this, that in zip(these, those, strict=True)]


def verdict(what: str, figures: Sequence[float], bound: float, *, least: bool = False) -> str:
    """Whether the median keeps the bound, as a note."""
    median = statistics.median(figures)
    kept = median >= bound if least else median <= bound
    sign = "≥" if least else "≤"
    return f"{what}: {median:.3f}, bound {sign} {bound:g}: {'kept' if kept else 'NOT KEPT'}"


def share(
    what: str, figures: Sequence[float], yardstick: Sequence[float], bound: float, of: float
) -> str:
    """Whether a bound in µs is kept on any machine, as a note.

    It is from one on which the yardstick cost ``of`` µs: so the share of that counts.
    """
    found = statistics.median(figures) / statistics.median(yardstick)
    kept = "kept" if found <= bound / of else "NOT KEPT"
    return f"{what}: {found:.3f}, bound ≤ {bound / of:.3g} ({bound:g} of {of:g} µs): {kept}"


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The same names, another one first in each round: nobody always runs behind the same one."""
    turn %= len(names)
    return [*names[turn:], *names[:turn]]


def show_machine() -> None:
    """Print the date, the machine and every version that matters."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    load = Path("/proc/loadavg")
    print(f"{time.strftime('%Y-%m-%d %H:%M %Z')}; {cpu}; {platform.system()} {platform.release()}")
    if load.exists():
        print(f"load average at the start: {load.read_text().split()[0]}")
    print(f"{platform.python_implementation()} {platform.python_version()}; " + versions(PACKAGES))
    print(flush=True)


PACKAGES = (
    "celery",
    "kombu",
    "billiard",
    "redis",
    "influxdb-client",
    "datadog",
    "statsd",
    "questdb",
    "opentelemetry-sdk",
    "opentelemetry-instrumentation-celery",
)


def versions(packages: Sequence[str]) -> str:
    """``name version`` of each, separated by commas."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    return ", ".join(found)
