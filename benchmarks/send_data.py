"""CPU time of one point, caller and sender together, against other clients.

Each client does what its user would write, dicts and lists built in the call. All get the same
values: 4 tags (two of them vary) and 3 fields (float, int, short str), and the present time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from datadog.dogstatsd.base import DogStatsd
from influxdb_client import Point as ClientPoint
from statsd import StatsClient

from benchmarks.sink import Sink
from benchmarks.table import Table, ratios, rotated, verdict
from celery_influx import Database, Point, decode
from celery_influx.options import DatabaseOptions
from tests.python_only import python_only

try:
    from questdb.ingress import Buffer as QuestBuffer
    from questdb.ingress import TimestampNanos
except ImportError:  # not for every Python
    QuestBuffer = None

PATHS = [f"/shop/{i}" for i in range(16)]
STATUSES = ["200", "201", "404", "503"]
Run = Callable[[list[float]], None]
#: In the name of what leaves its points in the buffer.
ALONE = "the call alone"
NOTES = """
Ours: Database.send_data to the end of flush: buffer, batcher thread, UDP to a socket that another \
process reads; datagrams of 65,507 bytes where nothing is said.
influxdb-client: Point(...).tag(...)...to_line_protocol() and no more: no batching, no sending.
QuestDB: Buffer.row(...) and no more, in the text form of its protocol; its encoder is in Rust.
datadog: DogStatsd(host, port), and with disable_buffering=False; gauge, gauge, set. No stamps.
statsd: StatsClient(host, port); it has no tags, so their values go into the names. No stamps. \
The pipeline sends datagrams of 512 bytes.
Checked before measuring: each line decodes to the same point, each metric holds value and tags.
""".strip().splitlines()

BESIDE_NOTE = """
As above: another thread of the process takes the lines and sends them meanwhile, on the other \
core, and the interpreter's lock goes to and fro.
""".strip()

ALONE_NOTES = """
The call alone: all points fit into the buffer, no batch is due, and the clocks stop before the \
flush; a line in a buffer is all that Buffer.row makes, too.
Of Buffer.row / send_data what the user makes is taken off: the dicts, and ours of the Point.
No types: field_types=False.
""".strip().splitlines()


def run(rounds: int = 15, size: int = 20_000) -> None:
    """Measure and print; ``size`` points per client and round."""
    sink = Sink()
    with _clients(sink.port) as (clients, unsent):
        _check(clients, unsent, sink)
        sink.drain()
        whole = {name: client for name, client in clients.items() if ALONE not in name}
        figures, callers = _measure(whole, rounds, size)
        # A difference of two figures wants them close together in time, and often.
        alone = {name: client for name, client in clients.items() if ALONE in name or name in CALLS}
        _, calls = _measure(alone, 20 * rounds, max(1, size // 40), unsent)
    sink.stop()
    _table(figures).show()
    _beside(callers).show()
    _alone(calls).show()


def _measure(
    clients: dict[str, Run], rounds: int, size: int, unsent: dict[str, Database] | None = None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """µs of CPU of a point, of all threads and of the caller's, of each client in each round."""
    floats = _floats(size)
    figures: dict[str, list[float]] = {name: [] for name in clients}
    callers: dict[str, list[float]] = {name: [] for name in clients}
    for turn in range(rounds + 1):
        for name in rotated(list(clients), turn):
            kind = next((kind for kind in floats if kind in name), "short floats")
            before, caller = time.process_time(), time.thread_time()
            clients[name](floats[kind])
            callers[name].append((time.thread_time() - caller) / size * 1e6)
            figures[name].append((time.process_time() - before) / size * 1e6)
        for database in (unsent or {}).values() if turn % 20 == 0 else ():
            database.flush(30)
    # The first round warms up.
    return (
        {name: found[1:] for name, found in figures.items()},
        {name: found[1:] for name, found in callers.items()},
    )


def _floats(size: int) -> dict[str, list[float]]:
    rng = random.Random(1)
    clock = [time.perf_counter() for _ in range(size + 1)]
    return {
        "short floats": [rng.randrange(1, 10_000) / 1000 for _ in range(size)],
        "clock floats": [b - a for a, b in pairwise(clock)],
        "17-digit floats": [rng.random() for _ in range(size)],
    }


@contextmanager
def _clients(port: int) -> Iterator[tuple[dict[str, Run], dict[str, Database]]]:
    """Name to a function that makes and sends a point for each float, and waits for the end.

    And name to database of those that do not wait, and whose points are still to be sent.
    """
    large, small = (
        Database(DatabaseOptions(host="127.0.0.1", udp_port=port, datagram_bytes=size))
        for size in (65_507, 1_432)
    )
    with python_only():
        python = Database(DatabaseOptions(host="127.0.0.1", udp_port=port))
        python_alone, python_untyped = _resting(port)
        for each in (python, python_alone, python_untyped):
            each.send_data(Point("warm", {"f": 1}))
    alone, untyped = _resting(port)
    unsent = {
        f"celery_influx, Point, clock floats, {ALONE}": alone,
        f"celery_influx, Point, 17-digit floats, {ALONE}": alone,
        f"celery_influx, Point, clock floats, {ALONE}, no types": untyped,
        f"celery_influx, Point, clock floats, Python only, {ALONE}": python_alone,
        f"celery_influx, Point, clock floats, Python only, {ALONE}, no types": python_untyped,
    }
    datadog = DogStatsd("127.0.0.1", port)
    buffered = DogStatsd("127.0.0.1", port, disable_buffering=False)
    statsd = StatsClient("127.0.0.1", port)
    clients = {
        "celery_influx, Point, short floats": _ours(large),
        "celery_influx, Point, clock floats": _ours(large),
        "celery_influx, Point, 17-digit floats": _ours(large),
        "celery_influx, Point, clock floats, Python only": _ours(python),
        "celery_influx, dict": _ours_by_dict(large),
        "celery_influx, Point, datagrams of 1,432": _ours(small),
        **{name: _calls(database) for name, database in unsent.items()},
        "influxdb-client, Point to line only, short floats": _influxdb_client,
        "influxdb-client, Point to line only, clock floats": _influxdb_client,
        "influxdb-client, Point to line only, 17-digit floats": _influxdb_client,
        **(QUESTDB if QuestBuffer else {}),
        "the dicts alone": _dicts,
        "the dicts and the Point": _points,
        "datadog, default, 3 calls": _datadog(datadog),
        "datadog, buffered, 3 calls": _datadog(buffered),
        "datadog, default, 1 call (1 field of 3)": _datadog_one_field(datadog),
        "datadog, buffered, 1 call (1 field of 3)": _datadog_one_field(buffered),
        "statsd, 3 calls, tags in the name": _statsd(statsd),
        "statsd, pipeline, 3 calls, tags in the name": _statsd_pipeline(statsd),
    }
    yield clients, unsent
    for database in {large, small, python, *unsent.values()}:
        database.close()
        stats = database.stats()
        if stats["sent"] != stats["points"]:
            raise RuntimeError(f"not all points were sent, so the figures are wrong: {stats}")
    buffered.stop()


def _resting(port: int) -> Iterator[Database]:
    """With types of fields, and without; neither number nor time wakes its batcher in a round."""
    for field_types in (True, False):
        yield Database(
            DatabaseOptions(
                host="127.0.0.1",
                udp_port=port,
                field_types=field_types,
                bytes_per_second=10**9,
                batch_size=10**6,
                batch_bytes=25_000_000,
                queue_size=2 * 10**6,
                queue_bytes=10**9,
                flush_interval=3_600,
            )
        )


def _ours(database: Database) -> Run:
    send = _calls(database)

    def run(floats: list[float]) -> None:
        send(floats)
        database.flush(30)

    return run


def _calls(database: Database) -> Run:
    def run(floats: list[float]) -> None:
        for i, value in enumerate(floats):
            database.send_data(
                Point(
                    "requests",
                    {"runtime": value, "size": i, "note": "ok"},
                    {
                        "path": PATHS[i & 15],
                        "method": "GET",
                        "status": STATUSES[i & 3],
                        "zone": "eu-west",
                    },
                )
            )

    return run


def _ours_by_dict(database: Database) -> Run:
    def run(floats: list[float]) -> None:
        for i, value in enumerate(floats):
            database.send_data(
                {
                    "measurement": "requests",
                    "fields": {"runtime": value, "size": i, "note": "ok"},
                    "tags": {
                        "path": PATHS[i & 15],
                        "method": "GET",
                        "status": STATUSES[i & 3],
                        "zone": "eu-west",
                    },
                }
            )
        database.flush(30)

    return run


def _dicts(floats: list[float]) -> None:
    for i, value in enumerate(floats):
        (
            {"runtime": value, "size": i, "note": "ok"},
            {"path": PATHS[i & 15], "method": "GET", "status": STATUSES[i & 3], "zone": "eu-west"},
        )


def _points(floats: list[float]) -> None:
    for i, value in enumerate(floats):
        Point(
            "requests",
            {"runtime": value, "size": i, "note": "ok"},
            {"path": PATHS[i & 15], "method": "GET", "status": STATUSES[i & 3], "zone": "eu-west"},
        )


def _questdb(floats: list[float]) -> bytes:
    buffer = QuestBuffer(protocol_version=1)
    for i, value in enumerate(floats):
        buffer.row(
            "requests",
            symbols={
                "path": PATHS[i & 15],
                "method": "GET",
                "status": STATUSES[i & 3],
                "zone": "eu-west",
            },
            columns={"runtime": value, "size": i, "note": "ok"},
            at=TimestampNanos.now(),
        )
    return bytes(buffer)


QUESTDB: dict[str, Run] = {
    f"QuestDB, Buffer.row only, {kind} floats": _questdb for kind in ("short", "clock", "17-digit")
}


#: What the call alone is compared with.
CALLS = {
    *(name for name in QUESTDB if "short" not in name),
    "influxdb-client, Point to line only, clock floats",
    "influxdb-client, Point to line only, 17-digit floats",
    "the dicts alone",
    "the dicts and the Point",
}


def _influxdb_client(floats: list[float]) -> None:
    for i, value in enumerate(floats):
        _client_line(i, value)


def _client_line(i: int, value: float) -> str:
    return (
        ClientPoint("requests")
        .tag("path", PATHS[i & 15])
        .tag("method", "GET")
        .tag("status", STATUSES[i & 3])
        .tag("zone", "eu-west")
        .field("runtime", value)
        .field("size", i)
        .field("note", "ok")
        .time(time.time_ns())
        .to_line_protocol()
    )


def _datadog(client: DogStatsd) -> Run:
    def run(floats: list[float]) -> None:
        for i, value in enumerate(floats):
            tags = [f"path:{PATHS[i & 15]}", "method:GET", f"status:{STATUSES[i & 3]}"]
            tags.append("zone:eu-west")
            client.gauge("requests.runtime", value, tags)
            client.gauge("requests.size", i, tags)
            client.set("requests.note", "ok", tags)
        client.flush()

    return run


def _datadog_one_field(client: DogStatsd) -> Run:
    def run(floats: list[float]) -> None:
        for i, value in enumerate(floats):
            tags = [f"path:{PATHS[i & 15]}", "method:GET", f"status:{STATUSES[i & 3]}"]
            tags.append("zone:eu-west")
            client.gauge("requests.runtime", value, tags)
        client.flush()

    return run


def _statsd(client: StatsClient) -> Run:
    def run(floats: list[float]) -> None:
        for i, value in enumerate(floats):
            name = f"requests.{PATHS[i & 15]}.GET.{STATUSES[i & 3]}.eu-west"
            client.gauge(f"{name}.runtime", value)
            client.gauge(f"{name}.size", i)
            client.set(f"{name}.note", "ok")

    return run


def _statsd_pipeline(client: StatsClient) -> Run:
    def run(floats: list[float]) -> None:
        with client.pipeline() as pipeline:
            _statsd(pipeline)(floats)

    return run


def _check(clients: dict[str, Run], unsent: dict[str, Database], sink: Sink) -> None:
    """Raise if a client writes anything else than the others."""
    for name, client in clients.items():
        if client is _influxdb_client:
            _check_line(name, _client_line(0, 0.25).encode())
            continue
        if client is _questdb:
            _check_line(name, _questdb([0.25]).strip())
            continue
        if client in (_dicts, _points):
            continue
        one_field = "1 call" in name
        client([0.25])
        if name in unsent:
            unsent[name].flush(30)
        metrics: dict[str, str] = {}
        while len(metrics) < (1 if one_field or "celery_influx" in name else 3):
            for line in sink.receive():
                if b"requests" not in line:
                    continue  # datadog's own telemetry
                if "celery_influx" in name:
                    _check_line(name, line)
                key, _, value = line.decode().partition(":")
                metrics[key] = value
        if "celery_influx" in name:
            continue
        if "datadog" in name:
            prefix, tags = "requests", "|#path:/shop/0,method:GET,status:200,zone:eu-west"
        else:
            prefix, tags = "requests./shop/0.GET.200.eu-west", ""
        expected = {"runtime": "0.25|g", "size": "0|g", "note": "ok|s"}
        for field in list(expected)[: 1 if one_field else 3]:
            if not metrics[f"{prefix}.{field}"].startswith(expected[field] + tags):
                raise RuntimeError(f"{name} wrote something else: {metrics}")


def _check_line(name: str, line: bytes) -> None:
    point = decode(line)
    tags = {"path": "/shop/0", "method": "GET", "status": "200", "zone": "eu-west"}
    expected = Point("requests", {"runtime": 0.25, "size": 0, "note": "ok"}, tags, point.timestamp)
    is_now = isinstance(point.timestamp, int) and abs(point.timestamp - time.time_ns()) < 60e9
    if point != expected or not is_now:
        raise RuntimeError(f"{name} wrote something else: {line!r}")


def _table(figures: dict[str, list[float]]) -> Table:
    table = Table("`send_data`: CPU of a point, all threads", "µs", "ours / this")
    for name, found in figures.items():
        kind = next((kind for kind in ("clock", "17-digit") if kind in name), "short")
        ours = figures[f"celery_influx, Point, {kind} floats"]
        table.add(name, found, ratios(ours, found))
    ours = figures["celery_influx, Point, short floats"]
    client = figures["influxdb-client, Point to line only, short floats"]
    table.notes = [
        verdict("µs a point", ours, 5),
        verdict("of influxdb-client's time", ratios(ours, client), 0.6),
        *NOTES,
    ]
    return table


def _beside(figures: dict[str, list[float]]) -> Table:
    title = "`send_data`: CPU of a point, the calling thread, its batcher beside"
    table = Table(title, "µs", "this / short floats")
    for name, found in figures.items():
        if name.startswith("celery_influx, Point"):
            yardstick = figures["celery_influx, Point, short floats"]
            table.add(name, found, ratios(found, yardstick))
    table.notes = [BESIDE_NOTE]
    return table


def _alone(figures: dict[str, list[float]]) -> Table:
    """Of the thread that calls: what a task or a request waits for."""
    table = Table(f"`send_data`: CPU of a point, {ALONE}", "µs", "this / ours")
    for name, found in figures.items():
        kind = next((kind for kind in ("clock", "17-digit") if kind in name), "clock")
        table.add(
            name, found, ratios(found, figures[f"celery_influx, Point, {kind} floats, {ALONE}"])
        )
    rows = {name: _without(found, figures["the dicts alone"]) for name, found in figures.items()}
    for kind, bound in (("clock", 1.9), ("17-digit", 1.0)) if QuestBuffer else ():
        row = rows[f"QuestDB, Buffer.row only, {kind} floats"]
        ours = _without(
            figures[f"celery_influx, Point, {kind} floats, {ALONE}"],
            figures["the dicts and the Point"],
        )
        table.notes.append(
            verdict(f"Buffer.row / send_data, {kind} floats", ratios(row, ours), bound, least=True)
        )
    python = figures[f"celery_influx, Point, clock floats, Python only, {ALONE}"]
    client = figures["influxdb-client, Point to line only, clock floats"]
    table.notes.append(
        verdict("influxdb-client / Python only", ratios(client, python), 3, least=True)
    )
    for way, part in (("C", ""), ("Python only", "Python only, ")):
        name = f"celery_influx, Point, clock floats, {part}{ALONE}"
        types = _without(figures[name], figures[f"{name}, no types"])
        table.notes.append(verdict(f"µs a point for the types of fields, {way}", types, 0.3))
    table.notes += ALONE_NOTES
    return table


def _without(found: list[float], part: list[float]) -> list[float]:
    """What is left of each round's figure."""
    return [this - that for this, that in zip(found, part, strict=True)]
