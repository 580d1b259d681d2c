"""The worker's step: it starts and stops what ``plugin`` does, and tells what it is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import billiard
from celery import bootsteps, signals

from celery_influx import signals as our_signals
from celery_influx import tasks, verdicts
from celery_influx.database import Database
from celery_influx.errors import SendError
from celery_influx.plugin import Influx, find
from celery_influx.transports import http, open_transport
from celery_influx.transports.udp import UDPPool

logger = logging.getLogger(__name__)


class InfluxStep(bootsteps.StartStopStep):
    """Attaches the plugin to a worker."""

    label = "Influx"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        """Check the configuration and make what children inherit: no child exists yet.

        Raises:
            ConfigError: The configuration has mistakes; the worker does not start.
        """
        super().__init__(parent, **kwargs)
        self.influx: Influx = parent.app.influx
        pool = _pool(parent)
        self.influx.start_worker(parent.hostname, pool)
        if pool in ("prefork", "spawn") and self.influx.records_tasks:
            our_signals.guard()
        our_signals.shorten()
        tasks.register(parent.app, self.influx)
        if any(database.options.http_port for database in self.influx):
            http.load()  # else a thread would, in the middle of the work

    def start(self, parent: Any) -> None:
        """Start the threads, and say so."""
        if not self.influx.options.enabled:
            logger.info("celery_influx is switched off (influx_enabled)")
            return
        self.influx.start()
        self.influx.run_tasks()
        if self.influx.watches_runs or self.influx.is_green:
            _watch_tasks(parent.consumer)
        _watch_messages(parent.consumer)
        logger.info("celery_influx: %s", "; ".join(map(self._line, self.influx)))
        for database in self.influx:
            for look in (database.learn_types, partial(_probe, database)):
                threading.Thread(target=look, name="celery_influx probe", daemon=True).start()

    def _line(self, database: Database) -> str:
        tasks = self.influx.records_tasks and database is self.influx.default
        what = "task runs, timed, send_data" if tasks else "timed, send_data"
        return f"{database.name} → {database.address} ({what})"

    def stop(self, parent: Any) -> None:
        """Nothing: tasks still run. ``worker_shutdown`` comes when the last one has ended."""

    def terminate(self, parent: Any) -> None:
        """A cold shutdown: ``worker_shutdown`` does not come, and before Celery 5.5 runs still end.

        So all is sent when the process exits.
        """
        our_signals.exit_first()

    def info(self, parent: Any) -> dict[str, Any]:  # type: ignore[override]
        """For ``celery inspect stats``."""
        return {"influx": self.influx.stats()}


def _pool(worker: Any) -> str:
    """The name of its pool's module, or ``spawn`` for prefork's where it does not fork."""
    name = str(worker.pool_cls.__module__.rpartition(".")[2])
    if name != "prefork":
        return name
    method = getattr(worker, "pool_start_method", "fork")  # since Celery 5.7
    if "fork" == method == billiard.get_start_method():
        return name
    logger.warning(
        "celery_influx: this pool spawns its children and does not fork them: runs that are "
        "killed have no point, and stats() does not count what the children do"
    )
    return "spawn"


@signals.worker_shutdown.connect(weak=False, dispatch_uid="celery_influx.shutdown")
def _on_worker_shutdown(sender: Any = None, **_: Any) -> None:
    influx = find(getattr(sender, "app", None))
    if influx and influx.is_green:
        # Greenlets may still run, until the process exits; all is sent then, and once.
        our_signals.exit_first()
    elif influx:
        influx.end_worker()


# Methods of Celery's own consumer, for which it has no signals, or none that comes for sure. They
# are laid over in this worker's consumer alone.


def _watch_tasks(consumer: Any) -> None:
    """Watch the tasks there are, whenever Celery looks for new ones: at each start, and later."""
    update = consumer.update_strategies

    def update_strategies() -> None:
        verdicts.watch(consumer.app)
        update()

    consumer.update_strategies = update_strategies


def _watch_messages(consumer: Any) -> None:
    """Tell of messages of which no task can be made."""
    for name, tell in (
        ("on_decode_error", our_signals.on_refused),
        ("on_unknown_task", our_signals.on_unknown),
    ):
        setattr(consumer, name, _telling(consumer, getattr(consumer, name), tell))


def _telling(
    consumer: Any, handle: Callable[..., None], tell: Callable[[Any, Any, Exception], None]
) -> Callable[..., None]:
    def handle_and_tell(*args: Any) -> None:
        *_, message, error = args
        try:
            handle(*args)
        finally:
            # Else it will come again. Where a result backend is down, it will not.
            if message.acknowledged:
                try:
                    tell(consumer, message, error)
                except Exception:  # Celery guards itself against signals' receivers, not against us
                    logger.exception("celery_influx: a message that was refused has no point")

    return handle_and_tell


def _probe(database: Database) -> None:
    """Warn once where nothing answers: UDP tells its sender nothing, and is off by default."""
    options = database.options
    if options.transport != "http":
        transport = open_transport(options)
        is_udp = isinstance(transport, UDPPool)
        try:
            if isinstance(transport, UDPPool):
                transport.probe()
            else:
                transport.write()
        except SendError as error:
            logger.warning(
                "celery_influx: %s: %s%s",
                database.name,
                error,
                " See docs/how-to/enable-udp.md. Points are sent all the same, and lost until "
                "somebody listens."
                if is_udp
                else " Points wait until it does.",
            )
            return
        finally:
            transport.close()
    if not options.http_port:
        return
    try:
        database.ping()
    except SendError as error:
        if error.cause == "secret":
            waiting = "points wait" if options.transport == "http" else "query and post fail"
            logger.warning(
                "celery_influx: %s: %s; %s until there is one", database.name, error, waiting
            )
            return
        logger.warning(
            "celery_influx: %s: no answer to a ping (%s)%s",
            database.name,
            error,
            "; UDP gives no sign either, so points may go nowhere. If this server has no HTTP "
            "API, say so by 'http_port': 0"
            if options.transport == "udp"
            else "; points wait until it answers, as many as find room",
        )
