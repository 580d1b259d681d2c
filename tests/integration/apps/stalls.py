"""A monkey-patched process whose greenlets send points, while a ticker times the hub.

Arguments: ``gevent`` or ``eventlet``; the name of a function here; its arguments as JSON. What
it found goes to the standard output as JSON. No worker: the points leave from this process.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before anything else is imported, as both libraries want it.
    if sys.argv[1] == "gevent":
        from gevent import monkey

        monkey.patch_all()
    else:
        import eventlet

        eventlet.monkey_patch()

import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

import celery_influx
from celery_influx.transports.udp import UDPPool

GREENLETS = 1_000


def spawn(function: Callable[[int], None], number: int) -> Callable[[], object]:
    """Run ``function(number)`` in a greenlet; what waits for its end."""
    if sys.argv[1] == "gevent":
        import gevent

        return gevent.spawn(function, number).join
    import eventlet

    return eventlet.spawn(function, number).wait


def plugin(url: str, **config: Any) -> celery_influx.Influx:
    """The plugin of an app of its own, which sends to ``url``."""
    app = Celery("stalls", set_as_current=False)
    app.conf.update(influx_databases={"main": url}, **config)
    return celery_influx.install(app)


class Ticker:
    """Wants a turn each millisecond; ``longest`` is the most it had to wait beyond that, in ms.

    Time in which other processes had the processor is taken off, where Linux tells it.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.turns = 0

    def run(self) -> None:
        """Until ``stop``."""
        self._runs = True
        last = time.perf_counter() - waited()
        while self._runs:
            time.sleep(0.001)
            now = time.perf_counter() - waited()
            self.longest = max(self.longest, (now - last) * 1_000 - 1)
            self.turns += 1
            last = now

    def stop(self) -> None:
        """After its next turn."""
        self._runs = False


def waited() -> float:
    """Seconds that this process's first thread was able to run and had no processor."""
    return int(os.pread(_SCHEDSTAT, 100, 0).split()[1]) / 1e9 if _SCHEDSTAT >= 0 else 0.0


try:
    _SCHEDSTAT = os.open("/proc/self/schedstat", os.O_RDONLY)
except OSError:
    _SCHEDSTAT = -1


@contextmanager
def ticking() -> Iterator[Ticker]:
    """A ticker that runs meanwhile."""
    ticker = Ticker()
    greenlet = threading.Thread(target=ticker.run)
    greenlet.start()
    yield ticker
    ticker.stop()
    greenlet.join()


def sends(url: str, enabled: bool, rounds: int, points: int, seconds: float) -> dict[str, Any]:
    """The longest stall of each round, in ms; with the plugin, or with one that does nothing.

    There is one round more: at first both the library and the plugin set out.
    In a round each of the greenlets sends its points, one after the other over so many seconds;
    and then what waits is flushed, and all is closed, with the ticker still running.
    """
    influx = plugin(url, influx_enabled=enabled)
    stalls: list[float] = []

    def work(number: int) -> None:
        # They come one by one, as if from so many sockets; and when all have been made.
        time.sleep(0.1 + seconds * number / GREENLETS / points)
        for serial in range(points):
            influx.send_data(
                {
                    "measurement": "custom",
                    "tags": {"shop": f"shop {number % 7}"},
                    "fields": {"number": number, "serial": serial, "text": "x" * 40},
                }
            )
            time.sleep(seconds / points)

    gc.disable()  # a collection is as likely in the one as in the other, and longer than both
    for _ in range(rounds + 1):
        gc.collect()
        ends = [spawn(work, number) for number in range(GREENLETS)]
        with ticking() as ticker:
            for end in ends:
                end()
            influx.flush(0.25)
            influx.close(0.25)
        stalls.append(ticker.longest)
        assert ticker.turns > 100 * seconds
    return {"stalls": stalls[1:], "stats": influx.stats()["main"]}


def first_point(url: str) -> dict[str, Any]:
    """The longest stall around the first point of a process, with all that is started by it."""
    influx = plugin(url)
    with ticking() as ticker:
        influx.send_data({"measurement": "custom", "fields": {"number": 1}})
        flushed = influx.flush(3)
    return {"stall": ticker.longest, "flushed": flushed}


def backlog(url: str, lines: int) -> dict[str, Any]:
    """The longest stall while so many lines leave that have come at once."""
    influx = plugin(url)
    influx.send_data({"measurement": "custom", "fields": {"number": 0}})
    influx.flush(3)
    stalls = []
    for _ in range(5):
        waiting = [b"custom number=%di" % number for number in range(lines)]
        with ticking() as ticker:
            influx.default._buffer.put(waiting)
            time.sleep(0.005)
            ticker.longest = 0.0
            influx.flush(3)
        stalls.append(ticker.longest)
    return {"stalls": stalls, "sent": influx.stats()["main"]["sent"]}


def unknown_host(url: str) -> dict[str, Any]:
    """The longest stall while the server's name is looked up, which takes 0.3 s and fails."""
    asked: list[Any] = []
    if sys.argv[1] == "gevent":
        import _socket

        from gevent import monkey

        def look_up(*_: object, **__: object) -> None:
            asked.append(1)
            monkey.get_original("time", "sleep")(0.3)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")

        _socket.getaddrinfo = look_up  # what gevent's resolver calls, in a thread of its own
    else:
        from eventlet.support import greendns

        nameserver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        nameserver.bind(("127.0.0.1", 0))
        threading.Thread(target=lambda: asked.append(nameserver.recv(512)), daemon=True).start()
        resolver = greendns.resolver._resolver
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = nameserver.getsockname()[1]
        resolver.lifetime = resolver.timeout = 0.3
    influx = plugin(url)
    with ticking() as ticker:
        influx.send_data({"measurement": "custom", "fields": {"number": 1}})
        time.sleep(0.05)
        ticker.longest = 0.0
        began = time.perf_counter()
        flushed = influx.flush(3)
        took = time.perf_counter() - began
    return {
        "stall": ticker.longest,
        "took": took,
        "flushed": flushed,
        "account": influx.stats()["main"],
        "asked": bool(asked),
    }


def full_socket(url: str) -> dict[str, Any]:
    """One datagram to a socket whose send buffer is full and stays so: what came of it."""
    pool = UDPPool(plugin(url).default.options)
    pool.write(b"custom number=1i")
    # Over loopback a UDP socket's buffer always empties; this one's does when somebody reads.
    ours, _theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    pool._sockets = [ours]
    try:
        while True:
            ours.send(b"x" * 1_000)
    except BlockingIOError:
        pass
    outcome = "sent"
    with ticking() as ticker:
        began = time.perf_counter()
        try:
            pool.write(b"custom number=2i")
        except Exception as error:
            outcome = getattr(error, "cause", repr(error))
        took = time.perf_counter() - began
    return {"outcome": outcome, "took": took, "stall": ticker.longest}


def hog(url: str) -> dict[str, Any]:
    """Send points, then compute without a pause; and then with pauses of a millisecond."""
    influx = plugin(url)

    def sent() -> int:
        return influx.stats()["main"]["sent"]

    influx.send_data({"measurement": "custom", "fields": {"number": 0}})
    influx.flush(3)
    influx.send_data({"measurement": "custom", "fields": {"number": 1}})
    compute(0.5)
    during = sent()
    until = time.monotonic() + 10
    while sent() == during and time.monotonic() < until:
        time.sleep(0.01)
    after = sent()
    influx.send_data({"measurement": "custom", "fields": {"number": 2}})
    until = time.monotonic() + 10
    while sent() == after and time.monotonic() < until:
        compute(0.01)
        # Not 0: gevent then lets no timer at all go off for a second and more.
        time.sleep(0.001)
    return {"sent": [during, after, sent()]}


def compute(seconds: float) -> None:
    """Keep the processor, and the hub, busy."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def leaves(url: str) -> dict[str, Any]:
    """Send a point, and end: it is sent at the exit."""
    plugin(url).send_data({"measurement": "custom", "fields": {"number": 1}})
    return {}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
