"""Connections for requests whose answers come to an end, however slowly they come.

A socket's timeout is for one piece: a server that sends a byte within each, or one ``100 Continue``
after the other, would hold its client for ever. So each answer has its time as a whole. And there
is no lock in which a client would wait for ever.
"""

from __future__ import annotations

import http.client
import io
import queue
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests

#: An answer to a query may take so many timeouts. Its head has one, and so has all of any other.
LONGEST = 10


class TooSlowError(TimeoutError):
    """Pieces came in time, but too many of them."""


class _Pieces(io.RawIOBase):
    """What comes from ``sock``, until the time is up."""

    def __init__(self, pieces: Any, sock: socket.socket) -> None:
        self._pieces = pieces
        self._socket = sock
        self._timeout = sock.gettimeout() or 0.0
        self._has_begun = False
        self.allow(1)

    def allow(self, times: int) -> None:
        """Give what comes from now on so many timeouts."""
        self._times = times
        self._end = time.monotonic() + times * self._timeout

    def readable(self) -> bool:
        """For ``io.BufferedReader``."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Wait for a piece."""
        left = self._end - time.monotonic()
        # The first wait of all is as long as the timeout: then nothing has to be set.
        shortened = self._has_begun and left < self._timeout
        try:
            if shortened:
                if left <= 0:
                    raise TimeoutError  # noqa: TRY301 - told as any wait that is over
                self._socket.settimeout(left)
            count: int | None = self._pieces.readinto(buffer)
        except TimeoutError as error:
            raise (self._too_slow() if shortened else error) from None
        finally:
            if shortened:
                self._socket.settimeout(self._timeout)  # it may be used again
        self._has_begun = self._has_begun or bool(count)
        return count

    def close(self) -> None:
        """Let the socket go."""
        self._pieces.close()
        super().close()

    def _too_slow(self) -> TooSlowError:
        seconds = self._times * self._timeout
        return TooSlowError(f"an answer came so slowly that it took more than {seconds:g} s")


class _Response(http.client.HTTPResponse):
    """Its head has one timeout; ``allow`` says how many the rest has."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.pieces = _Pieces(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self.pieces)

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        if self.status < 200:
            # More follows on a mere sign of life, and would be taken for the next one's answer.
            self.will_close = True


class _Idle:
    """What urllib3 keeps a pool's unused connections in, as ``queue.LifoQueue``, without a lock.

    A soft time limit may come right after that of ``queue`` is taken, which then nobody gives back:
    all later requests of the process would hang.
    """

    def __init__(self, maxsize: int) -> None:
        self._most = maxsize
        self._idle: deque[Any] = deque()

    def put(self, connection: Any, **_: Any) -> None:
        """Keep it, if there is room; never waits."""
        if len(self._idle) >= self._most:
            raise queue.Full
        self._idle.append(connection)

    def get(self, **_: Any) -> Any:
        """The one that was used last; never waits."""
        try:
            return self._idle.pop()
        except IndexError:
            raise queue.Empty from None

    def qsize(self) -> int:
        """How many there are."""
        return len(self._idle)


def allow(response: requests.Response, times: int) -> None:
    """Give what is still to come of ``response`` so many timeouts from now on."""
    head: Any = response.raw._original_response  # noqa: SLF001 - requests, too, finds it there
    head.pieces.allow(times)


def bound(manager: Any) -> None:
    """Have all connections that urllib3's ``manager`` of pools will make read answers so."""
    manager.pool_classes_by_scheme = {
        scheme: _derived(
            pool,
            ConnectionCls=_derived(pool.ConnectionCls, response_class=_Response),
            QueueCls=_Idle,
        )
        for scheme, pool in manager.pool_classes_by_scheme.items()
    }


def _derived(cls: type, **attributes: Any) -> type:
    return type(cls.__name__, (cls,), attributes)


def adapter(base: Callable[..., Any]) -> Any:
    """An adapter of requests, of the class ``base``, with such connections, to proxies too."""

    class Adapter(base):  # type: ignore[misc, valid-type]
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            bound(self.poolmanager)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            known = proxy in self.proxy_manager
            manager = super().proxy_manager_for(proxy, **kwargs)
            if not known:
                bound(manager)
            return manager

    return Adapter()
