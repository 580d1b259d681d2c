"""What the run stands on: a worker process, a database or a listener in its place, progress."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url

from celery_influx import Influx, InfluxError, QueryError
from celery_influx.listener import Listener
from celery_influx.queries import quote_ident
from celery_influx.transports.udp import UDPPool
from example_project.tables import Row

STALLED = 60.0  # seconds without any progress
FIRST_POINT = 5.0  # seconds for its way: influxd writes by UDP after one second, as it is set
NAMED_BY_THE_SERVER = (
    "over UDP the server's [[udp]] section names the database: put that at the end of INFLUX, "
    "as in udp://localhost:8089/telegraf"
)


class FailedError(Exception):
    """Why the run cannot go on."""


def broker(app: Celery) -> str:
    """What the broker is, with our queue in it emptied of what an earlier run may have left.

    Raises:
        FailedError: It does not answer.
    """
    uri = maybe_sanitize_url(app.conf.broker_url)
    with app.connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=5)
            app.control.purge(connection)
        except (OperationalError, *connection.connection_errors) as error:
            raise FailedError(f"no broker at {uri}: {error}") from None
    return "a folder (no server is needed)" if uri.startswith("folder") else uri


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A ``celery worker`` of two processes; at the end it finishes what it is doing, and is gone.

    Raises:
        FailedError: It did not end well.
    """
    command = [sys.executable, "-m", "celery", "-A", "example_project.app", "worker", "-c", "2"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=INFO"]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *quiet, "-n", f"example-{os.getpid()}@%h"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,  # Ctrl-C is for the run, which ends the worker
        )
    try:
        yield process
        process.terminate()
        if process.wait(30):
            raise FailedError(f"the worker ended with exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        raise FailedError("the worker did not end within 30 s of SIGTERM") from None
    except KeyboardInterrupt:
        print("\nStopping the worker", flush=True)
        raise
    finally:
        interrupt(signal.SIG_IGN)  # a second Ctrl-C must not leave it running
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        interrupt(stop)


_stopped: list[int] = []


def stop(number: int, _: FrameType | None) -> None:
    """End the run, as Ctrl-C does; noted, for Python drops what is raised in some callbacks."""
    _stopped.append(number)
    raise KeyboardInterrupt


def interrupt(handler: signal.Handlers | Callable[[int, FrameType | None], object]) -> None:
    """Let ``handler`` serve Ctrl-C, the end of the terminal, and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, handler)


def log_of(folder: Path) -> str:
    """The end of the worker's log, and where all of it is kept; "" if there is none."""
    log = folder / "worker.log"
    if not log.exists():
        return ""
    kept = shutil.copy(log, Path(tempfile.gettempdir(), f"{folder.name}.log"))
    tail = "\n  ".join(log.read_text(errors="replace").splitlines()[-15:])
    return f"\n\nThe end of the worker's log ({kept}):\n  {tail}"


class InfluxDB:
    """The server that ``INFLUX`` names; what arrived there is read back by queries."""

    def __init__(self, influx: Influx) -> None:
        self._influx = influx
        self._since = time.time_ns()

    def __enter__(self) -> "InfluxDB":
        """Look whether it answers, and make its database: by UDP a first point does that."""
        options = self._influx.default.options
        self.name = f"InfluxDB {self._influx.ping().version} at {self._influx.default.address}"
        if options.transport == "http":
            with contextlib.suppress(InfluxError):  # it may exist, and this user not be allowed to
                self._influx.post(f"CREATE DATABASE {quote_ident(options.database)}")
        else:
            UDPPool(options).write(b"example_project started=1i")
        until = time.monotonic() + FIRST_POINT
        while True:
            try:
                self.rows(["celery_task"])  # fails now, and not at the end
                return self
            except QueryError as error:
                if options.transport == "http":
                    raise
                if time.monotonic() > until:
                    raise FailedError(f"{error}; {NAMED_BY_THE_SERVER}") from None
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        """Leave what was written."""

    def rows(self, measurements: Iterable[str]) -> list[Row]:
        """What this run wrote."""
        return [
            {**row, "measurement": name}
            for name in measurements
            for row in self._influx.query(
                "SELECT * FROM $name WHERE time >= $since AND app = 'example_project'",
                params={"name": {"identifier": name}, "since": self._since},
                chunked=True,
            ).rows()
        ]

    refused = ()


class InItsPlace:
    """A ``Listener`` of this process, as strict as InfluxDB."""

    def __init__(self) -> None:
        self._listener = Listener()

    def __enter__(self) -> "InItsPlace":
        """Listen on free ports, and tell the worker by the environment."""
        listener = self._listener.start()
        # Often and little at a time: the tables are to be complete soon after the last task.
        url = f"{listener.udp_url}?http_port={listener.http_port}&flush_interval=0.2"
        os.environ["INFLUX"] = url
        self.name = f"a listener in its place, at {listener.udp_url}"
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        self._listener.close()

    def rows(self, measurements: Iterable[str]) -> list[Row]:  # noqa: ARG002 - all are this run's
        """What arrived."""
        return [
            {"measurement": point.measurement, **(point.tags or {}), **point.fields}
            for point in self._listener.points()
        ]

    @property
    def refused(self) -> list[str]:
        """Why it refused some."""
        return self._listener.refused


def database() -> "InfluxDB | InItsPlace":
    """Where points go: the server that ``INFLUX`` names, or a listener."""
    if not os.environ.get("INFLUX"):
        return InItsPlace()
    from example_project.app import app  # only now: it reads the environment

    return InfluxDB(app.influx)


class Progress:
    """Waits, and shows for what: on one line of a terminal, or else by a line now and then."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._is_terminal = sys.stdout.isatty()
        self._next_line = 0.0

    def wait(self, until: Callable[[], object], text: Callable[[], str]) -> None:
        """Wait.

        Raises:
            FailedError: The worker ended, or ``text`` has not changed for a minute.
        """
        last, changed = "", time.monotonic()
        while not until():
            if _stopped:
                raise KeyboardInterrupt
            if self._process.poll() is not None:
                raise FailedError(f"the worker ended with exit code {self._process.returncode}")
            now = text()
            if now != last:
                last, changed = now, time.monotonic()
            elif time.monotonic() - changed > STALLED:
                raise FailedError(f"nothing has moved for {STALLED:.0f} s: {now}")
            self.show(now)
            time.sleep(0.1)

    def show(self, text: str) -> None:
        """Show ``text`` in place of what stood there."""
        if self._is_terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        elif time.monotonic() >= self._next_line:
            print(text, flush=True)
            self._next_line = time.monotonic() + 5

    def end(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            print("\r\033[K", end="", flush=True)
