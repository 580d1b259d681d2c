"""Datagrams to a socket in the file system: a Telegraf's socket_listener on the same machine.

They cost as little as UDP's, and do not vanish: a listener that is away, or whose queue is full, is
noticed, and they are tried again.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket

from celery_influx.errors import SendError
from celery_influx.transports import OneSocket

#: As long as the longest of UDP: Telegraf reads no more than 65,536 bytes of a datagram.
_LONGEST = 65_507
_MENDS = {
    "ENOENT": "is Telegraf running, with a [[inputs.socket_listener]] on this 'socket_path'?",
    "ECONNREFUSED": "the socket is there, and nobody listens; is Telegraf running?",
    "EACCES": "let this process's user write to the socket: 'socket_mode' in Telegraf",
    "EAGAIN": "the listener does not keep up",
    "EMSGSIZE": "set 'datagram_bytes' lower",
}


class UnixDatagrams(OneSocket):
    """One socket, connected by the first payload and again after an error."""

    #: Seconds to wait where the listener's queue is full.
    SEND_TIMEOUT = 0.1

    @property
    def address(self) -> str:
        """``unixgram:///path``."""
        return f"unixgram://{self._options.socket_path}"

    @property
    def max_bytes(self) -> int:
        """Longest payload."""
        return self._options.datagram_bytes or _LONGEST

    def write(self, *payloads: bytes) -> int:
        """Send one datagram; without any, only connect.

        Raises:
            SendError: It is not in the listener's queue. ``cause`` is an errno's name, such as
                ``"EAGAIN"`` where that is full.
        """
        try:
            sock = self._opened()
            for payload in payloads:
                try:
                    sock.send(payload)
                except BlockingIOError:
                    with selectors.DefaultSelector() as selector:
                        selector.register(sock, selectors.EVENT_WRITE)
                        selector.select(self.SEND_TIMEOUT)
                    sock.send(payload)
        except OSError as error:
            number = error.errno or errno.EIO
            if number not in (errno.EAGAIN, errno.EMSGSIZE):
                self.close()
            cause = errno.errorcode.get(number, str(number))
            mend = _MENDS.get(cause, "is 'socket_path' the socket of a listener for datagrams?")
            raise SendError(
                f"{self.address}: {os.strerror(number).lower()} ({cause}); {mend}", cause
            ) from None
        return 0

    def _opened(self) -> socket.socket:
        if self._socket is None:
            self._socket = sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(self._options.socket_path or "")
        return self._socket
