"""What moves payloads: the Transport protocol, and the registry of transports by URL scheme.

A transport makes one attempt and says what came of it; ``delivery`` decides the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from celery_influx.options import DatabaseOptions

#: Word in ``DatabaseOptions.transport`` to "module:class".
TRANSPORTS = {
    "udp": "celery_influx.transports.udp:UDPPool",
    "http": "celery_influx.transports.http:HTTPClient",
}


class Transport(Protocol):
    """One way to a server. Used by one thread at a time; never shared over a fork."""

    @property
    def max_bytes(self) -> int:
        """Longest payload one ``write`` takes. May change, with the route for instance."""

    @property
    def address(self) -> str:
        """Where it sends, for people: no secret in it."""

    def write(self, payload: bytes) -> int:
        """Make one attempt; give the number of lines that the server said it rejected.

        Raises:
            SendError: The payload did not arrive; ``cause`` says why in one word.
        """

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent, taking no lock."""

    def close(self) -> None:
        """Give back sockets. Idempotent; ``write`` afterwards opens them again."""


def open_transport(options: DatabaseOptions) -> Transport:
    """The transport that ``options`` name. Opens no socket yet."""
    module, _, name = TRANSPORTS[options.transport].partition(":")
    return cast("Transport", getattr(import_module(module), name)(options))
