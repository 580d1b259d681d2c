"""A pool of connected UDP sockets. UDP does not say whether anything arrived.

What little the network does say is used: a connected socket hears of a closed port (ICMP, as
ECONNREFUSED), and knows the longest datagram its route takes in one piece.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions

#: <linux/in.h>, <linux/in6.h>: the route's MTU as a connected socket knows it. Not in ``socket``.
_MTU = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 24)}
#: Bytes of IP and UDP header in front of a datagram's content.
_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
#: The longest UDP content there is over IPv4; influxd reads no more over IPv6 either.
_LONGEST = 65_507
#: What the smallest IPv6 route takes: safe where the kernel does not tell.
_SAFE = 1_232

#: Between bursts of this many bytes the sender pauses, so that the server can empty its socket's
#: buffer (212,992 bytes by default). Without it influxd lost lines of bursts on loopback.
_BURST_BYTES = 65_507
_BURST_PAUSE = 0.0005

_MENDS = {
    "ECONNREFUSED": "nobody listens there; is the server's [[udp]] service on?",
    "EMSGSIZE": "the route takes no datagram that long; set 'datagram_bytes' lower",
    "dns": "the host name is unknown; check 'host'",
}


class UDPPool:
    """``pool_size`` sockets to one server, used in turn.

    The host name is looked up again after an error, and every ``LOOKUP_INTERVAL`` seconds.
    """

    LOOKUP_INTERVAL = 60.0
    #: Seconds between look-ups that fail.
    LOOKUP_PAUSE = 1.0
    #: Seconds to wait where the kernel's send buffer is full.
    SEND_TIMEOUT = 0.1

    def __init__(
        self,
        options: DatabaseOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._options = options
        self._clock = clock
        self._sleep = sleep
        self._sockets: list[socket.socket] = []
        self._addresses: list[tuple[Any, tuple[Any, ...]]] = []
        self._turn = 0
        self._lookup_at = 0.0
        self._lookup_error: SendError | None = None
        self._max_bytes = options.datagram_bytes or _SAFE
        self._burst = 0

    @property
    def address(self) -> str:
        """``udp://host:port``."""
        host = self._options.host
        return f"udp://{f'[{host}]' if ':' in host else host}:{self._options.udp_port}"

    @property
    def max_bytes(self) -> int:
        """The longest datagram that is sent: the option, or what the route takes."""
        if not self._sockets:
            try:
                self._open()
            except SendError:
                pass  # `write` says so, and counts
        return self._max_bytes

    def write(self, payload: bytes) -> int:
        """Send one datagram.

        Raises:
            SendError: It was not sent, or the port is known to be closed.
        """
        if self._sockets and self._clock() >= self._lookup_at:
            self.close()
        if not self._sockets:
            self._open()
        self._pace(len(payload))
        for _ in self._addresses:
            self._turn = (self._turn + 1) % len(self._sockets)
            sock = self._sockets[self._turn]
            try:
                sock.send(payload)
                # On loopback the answer of a closed port is already here. From elsewhere it
                # comes later, and the next `send` on this socket raises it.
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except TimeoutError:
                code = errno.EAGAIN
            except OSError as error:
                code = error.errno or errno.EIO
            if code != errno.ECONNREFUSED:
                break
            # "localhost" may be ::1 and 127.0.0.1, and the server listen on one of them.
            self._connect_to_next_address()
        if code:
            cause = errno.errorcode.get(code, str(code))
            if code not in (errno.ECONNREFUSED, errno.EAGAIN):
                self.close()
            raise self._error(cause, os.strerror(code))
        return 0

    def probe(self) -> None:
        """Send two blank datagrams, which InfluxDB ignores, and listen for a refusal.

        Raises:
            SendError: The name is unknown, or nobody listens on the port.
        """
        for _ in range(2):
            self.write(b"\n")
            self._sleep(0.05)

    def abandon(self) -> None:
        """In a forked child: close this process's copies of the sockets, at once.

        Right after the fork the numbers still are what they were; later another file may have them.
        """
        self.close()

    def close(self) -> None:
        """Close the sockets. A ``write`` afterwards opens new ones."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            sock.close()

    def __repr__(self) -> str:
        return f"<UDPPool {self.address} sockets={len(self._sockets)} max_bytes={self._max_bytes}>"

    def _open(self) -> None:
        """Look the host up and connect to its first address that has a route."""
        now = self._clock()
        if self._lookup_error and now < self._lookup_at:
            raise self._lookup_error
        try:
            found = socket.getaddrinfo(
                self._options.host, self._options.udp_port, type=socket.SOCK_DGRAM
            )
        except OSError as error:
            self._lookup_at = now + self.LOOKUP_PAUSE
            self._lookup_error = self._error("dns", str(error))
            raise self._lookup_error from None
        self._lookup_error = None
        self._lookup_at = now + self.LOOKUP_INTERVAL
        addresses = [(family, to) for family, _, _, _, to in found if family in _MTU]
        if sorted(addresses) != sorted(self._addresses):
            self._addresses = addresses  # else keep the order: the first one worked last time
        for _ in self._addresses:
            try:
                self._connect()
            except OSError as error:
                code = error.errno or errno.EIO
                self._addresses.append(self._addresses.pop(0))
            else:
                return
        self._lookup_at = now + self.LOOKUP_PAUSE
        cause = errno.errorcode.get(code, str(code))
        self._lookup_error = self._error(cause, os.strerror(code))
        raise self._lookup_error

    def _connect(self) -> None:
        """Open the pool to the first of the addresses."""
        self.close()
        family, to = self._addresses[0]
        try:
            for _ in range(self._options.pool_size):
                sock = socket.socket(family, socket.SOCK_DGRAM)
                self._sockets.append(sock)
                # A timeout makes the socket non-blocking, and `send` wait by poll where it must.
                sock.settimeout(self.SEND_TIMEOUT)
                sock.connect(to)
            mtu = self._sockets[0].getsockopt(*_MTU[family])
        except OSError:
            self.close()
            raise
        route = min(mtu - _HEADERS[family], _LONGEST)
        self._max_bytes = self._options.datagram_bytes or max(route, 64)

    def _connect_to_next_address(self) -> None:
        if len(self._addresses) > 1:
            self._addresses.append(self._addresses.pop(0))
            try:
                self._connect()
            except OSError:
                self._open()

    def _pace(self, size: int) -> None:
        if self._burst + size > _BURST_BYTES and self._burst:
            self._sleep(_BURST_PAUSE)
            self._burst = 0
        self._burst += size

    def _error(self, cause: str, reason: str) -> SendError:
        mend = _MENDS.get(cause, "see docs/how-to/enable-udp")
        message = f"{self.address} did not take the datagram ({cause}: {reason}); {mend}"
        return SendError(message, cause)
