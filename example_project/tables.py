"""Rows of InfluxDB → tables to read. A row is a mapping of tags, fields and ``measurement``."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

Row = Mapping[str, Any]
LEGEND = "wait: in the queue, free to run.  95 %: so many took this long or less."


def of_tasks(rows: Iterable[Row]) -> str:
    """A line for each task, from ``celery_task``."""
    tasks = _grouped((row for row in rows if row["measurement"] == "celery_task"), "task")
    lines = [
        ("", "", "", "", "runtime", "(ms)", "wait", "(ms)"),
        ("task", "runs", "failed", "retried", "median", "95 %", "median", "95 %"),
    ]
    for name, runs in tasks.items():
        states = [row["state"] for row in runs]
        cells = [name.rpartition(".")[2], f"{len(runs):,}"]
        cells += [f"{states.count(state):,}" for state in ("FAILURE", "RETRY")]
        for field in ("runtime", "wait"):
            values = [row[field] * 1000 for row in runs if row.get(field) is not None]
            cells += [_number(value) for value in _middle_and_high(values)]
        lines.append(tuple(cells))
    return f"{_table(lines)}\n  {LEGEND}"


def of_points(rows: Iterable[Row]) -> str:
    """A line for each measurement of the project's own, and for each timer."""
    lines = [("points of your own", "count", "errors", "median of each field")]
    own = [row for row in rows if row["measurement"] != "celery_task"]
    for measurement, points in _grouped(own, "measurement").items():
        for timer, found in _grouped(points, "timer").items():
            errors = sum(row.get("outcome") == "error" for row in found) if timer else ""
            medians = ", ".join(f"{field} {_median(found, field)}" for field in _fields(found))
            name = f"{measurement} {timer}".strip()
            lines.append((name, f"{len(found):,}", f"{errors}", medians))
    return _table(lines)


def of_account(accounts: Mapping[str, Mapping[str, int]]) -> str:
    """A line for each who counted."""
    names = ("points", "sent", "dropped", "lost", "rejected", "received")
    lines = [("account", "made", *names[1:])]
    for who, counts in accounts.items():
        lines.append((who, *(f"{counts[name]:,}" if name in counts else "" for name in names)))
    return _table(lines)


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.get(key) or ""].append(row)
    return dict(sorted(groups.items()))


def _fields(rows: Iterable[Row]) -> list[str]:
    """Names of what is a number: tags are text, and ``time`` is nobody's field."""
    names = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))}
    return sorted(names - {"time"})


def _middle_and_high(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    return median(values), quantiles(values, n=20, method="inclusive")[-1]


def _median(rows: Sequence[Row], field: str) -> str:
    value = median(row[field] for row in rows if row.get(field) is not None)
    return f"{_number(value * 1000)} ms" if field == "runtime" else _number(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first is text, the others are numbers but for long ones."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) if w < 15 else c for c, w in zip(line[1:], widths[1:], strict=True)]
        texts.append("  " + "  ".join(cells).rstrip())
    return "\n".join(texts)
