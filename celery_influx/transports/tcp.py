"""Lines over one TCP connection, each ended by a newline: Telegraf's socket_listener, QuestDB.

Nobody answers. A connection that is broken is noticed, and what is sent then is tried again over a
new one; so the server may get some lines twice. What it had not read by then, up to what both
sockets hold, is gone without a sign, and the line in the middle of which it broke may be shortened.
"""

from __future__ import annotations

import errno
import os
import socket

from celery_influx.errors import SendError
from celery_influx.transports import OneSocket, in_url
from celery_influx.transports.answers import why

#: Bytes that a server may say between two payloads; nobody reads them.
_CHATTER = 65_536


class TCPConnection(OneSocket):
    """One connection, opened by the first payload and again after an error."""

    @property
    def address(self) -> str:
        """``tcp://host:port``."""
        return f"tcp://{in_url(self._options.host)}:{self._options.tcp_port}"

    @property
    def max_bytes(self) -> int:
        """Longest payload."""
        return self._options.batch_bytes

    def write(self, *payloads: bytes) -> int:
        """Send lines; without any, only see to the connection.

        Raises:
            SendError: There is no connection, or it broke. ``cause`` is ``"timeout"``, ``"dns"``,
                ``"connection"``, or an errno's name.
        """
        try:
            sock = self._opened()
            if payloads:
                sock.sendall(b"\n".join((*payloads, b"")))
        except (OSError, ValueError) as error:  # ValueError: no host can have such a name
            wanted = "connection" if self._socket is None else "room"
            self.close()
            cause, happened, _ = why(error, {})
            happened = happened or f"no {wanted} within {self._options.http_timeout:g} s"
            raise SendError(
                f"{self.address}: {happened} ({cause}); does a server for line protocol over TCP "
                "listen there, and does it keep up?",
                cause,
            ) from None
        return 0

    def _opened(self) -> socket.socket:
        if self._socket and _is_closed(self._socket):
            self.close()
        if self._socket is None:
            where = self._options.host, self._options.tcp_port
            self._socket = socket.create_connection(where, self._options.http_timeout)
        return self._socket


def _is_closed(sock: socket.socket) -> bool:
    """Whether the server has closed it: else the first payload after that would be gone."""
    try:
        # Not os.read: eventlet has one that waits.
        return not os.readv(sock.fileno(), [bytearray(_CHATTER)])
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EINTR)
