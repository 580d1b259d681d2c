"""What moves payloads: the Transport protocol, and the registry of transports by URL scheme.

A transport makes one attempt and says what came of it; ``delivery`` decides the rest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from celery_influx.options import DatabaseOptions

#: Word in ``DatabaseOptions.transport`` to "module:class".
TRANSPORTS = {
    "udp": "celery_influx.transports.udp:UDPPool",
    "http": "celery_influx.transports.http:HTTPClient",
    "tcp": "celery_influx.transports.tcp:TCPConnection",
    "unixgram": "celery_influx.transports.unixgram:UnixDatagrams",
}


class Transport(Protocol):
    """One way to a server. Used by one thread at a time; never shared over a fork.

    Attributes:
        confirms: Whether a ``write`` that fails says why the server did not take it, and one that
            does not, that it did. What failed is tried again only then, and ``burst`` is 1.
    """

    confirms: bool

    @property
    def max_bytes(self) -> int:
        """Longest payload. May change, with the route for instance."""

    @property
    def burst(self) -> int:
        """Most payloads that one ``write`` takes. May change, too."""

    @property
    def address(self) -> str:
        """Where it sends, for people: no secret in it."""

    def write(self, *payloads: bytes) -> int:
        """Make one attempt; give the number of lines that the server said it rejected.

        Raises:
            SendError: They did not arrive; ``cause`` says why in one word.
        """

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent, taking no lock."""

    def close(self) -> None:
        """Give back sockets. Idempotent; ``write`` afterwards opens them again."""


class OneSocket:
    """What transports by one socket share: a ``write`` opens it, and again after an error."""

    confirms = True
    burst = 1

    def __init__(self, options: DatabaseOptions) -> None:
        self._options = options
        self._socket: socket.socket | None = None

    @property
    def address(self) -> str:
        """Where it sends."""
        raise NotImplementedError

    def abandon(self) -> None:
        """In a forked child: close this process's copy of the socket, at once."""
        self.close()

    def close(self) -> None:
        """Close the socket. A ``write`` afterwards opens a new one."""
        sock, self._socket = self._socket, None
        if sock:
            sock.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address} open={self._socket is not None}>"


def in_url(host: str) -> str:
    """A host as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def open_transport(options: DatabaseOptions) -> Transport:
    """The transport that ``options`` name. Opens no socket yet."""
    module, _, name = TRANSPORTS[options.transport].partition(":")
    return cast("Transport", getattr(load(module), name)(options))


def load(module: str) -> ModuleType:
    """Import ``module`` now, if it is not there, and let nobody fork meanwhile.

    A fork in the middle of another thread's import leaves the child with a module that is locked
    for ever: whoever imports it there hangs, in ``send_data`` even.
    """
    with forks_wait():
        return import_module(module)


@functools.cache
def forks_wait() -> Any:
    """A lock to do something under that no other thread may fork in the middle of."""
    lock = threading.RLock()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    # A process's first look-up of a host loads a module of Python's, and the C library's name
    # services: of 300 children forked in the middle of the latter, 13 hung in their own first.
    # This name costs no network.
    with lock, contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", None)
    return lock
