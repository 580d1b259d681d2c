"""A pool of connected UDP sockets. UDP does not say whether anything arrived.

What little the network does say is used: a connected socket hears of a closed port (ICMP, as
ECONNREFUSED), and knows the longest datagram its route takes in one piece.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NoReturn

from celery_influx.errors import SendError
from celery_influx.options import DatabaseOptions
from celery_influx.transports import in_url

#: <linux/in.h>, <linux/in6.h>: the route's MTU as a connected socket knows it. Not in ``socket``.
_MTU = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 24)}
#: Bytes of IP and UDP header in front of a datagram's content.
_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
#: The longest UDP content there is over IPv4; influxd reads no more over IPv6 either.
_LONGEST = 65_507

#: <linux/udp.h>: SOL_UDP and UDP_SEGMENT. One call's content is cut into datagrams by the kernel,
#: or by the network card: that takes a tenth of the CPU time of a call for each, at
#: 1,432 bytes (``python -m benchmarks batcher``).
_SEGMENT = 17, 103
_MOST_SEGMENTS = 64
#: What the kernel says where it cannot do so, on this route or with this card.
_UNCUT = {"EINVAL", "EIO", "EMSGSIZE", "EOPNOTSUPP", "ENOPROTOOPT"}

#: How much is sent at once, and how fast what follows. influxd empties its socket's buffer
#: (212,992 bytes by default) when it comes to it; what finds the buffer full is gone, and the
#: sender hears nothing. Of 300,000 lines of 130 bytes, influxd 1.6.7 on loopback, on two cores
#: shared with other work, stored, in datagrams of 1,472 and of 65,507 bytes:
#:
#:     as fast as it goes                   20-26 %      4-8 %
#:     0.5 ms asleep after each 65,507      71 %         58 %
#:     bursts of 131,072 bytes, 16 MB/s     81 %         95 %
#:     bursts of 65,536 bytes, 16 MB/s      98.6 %       100 %
#:     bursts of 65,536 bytes, 8 MB/s       99.4-100 %   99.3-100 %
#:     the same, three processes a core     98.1-100 %   95.3-100 %
#:     the same, read-buffer = 8388608      100 %        100 %
#:
#: So 61,000 such lines a second by default ('bytes_per_second'); more than that waits in the
#: buffer, where what is lost is counted.
_BURST_BYTES = 65_536

_MENDS = {
    "ECONNREFUSED": "nobody listens there; is the server's [[udp]] service on?",
    "EMSGSIZE": "the route takes no datagram that long; set 'datagram_bytes' lower",
    "dns": "the host name is unknown; check 'host'",
}


class UDPPool:
    """``pool_size`` sockets to one server, used in turn.

    The host name is looked up again after an error, and every ``LOOKUP_INTERVAL`` seconds.
    """

    confirms = False

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
        self._failure: tuple[str, str] | None = None  # cause and reason of the last look-up
        self._max_bytes = options.datagram_bytes or _LONGEST
        self._burst = 1
        #: Whether to send bursts where the kernel knows how; until it refuses.
        self.may_cut = True
        self._paced_to = 0.0  # when a sender of just that speed would have sent what was sent

    @property
    def address(self) -> str:
        """``udp://host:port``."""
        return f"udp://{in_url(self._options.host)}:{self._options.udp_port}"

    @property
    def max_bytes(self) -> int:
        """The longest datagram that is sent: the option, or what the route takes."""
        if not self._sockets:
            try:
                self._open()
            except SendError:
                pass  # `write` says so, and counts
        return self._max_bytes

    @property
    def burst(self) -> int:
        """How many datagrams one ``write`` takes."""
        return self._burst

    def write(self, *payloads: bytes) -> int:
        """Send one datagram, or a burst of them in one call.

        All but the last of a burst are filled up to the longest by newlines: servers ignore blank
        lines.

        Raises:
            SendError: They were not sent, or the port is known to be closed.
        """
        if not self._sockets or self._clock() >= self._lookup_at:
            self._open()
        if len(payloads) == 1:
            self._attempt(payloads[0])
            return 0
        size = max(map(len, payloads))
        filled = [payload.ljust(size, b"\n") for payload in payloads[:-1]]
        try:
            self._attempt(b"".join([*filled, payloads[-1]]), size)
        except SendError as error:
            if error.cause not in _UNCUT:
                raise
            self._open()
            if size <= self._max_bytes:  # else it is the route that has changed
                self.may_cut, self._burst = False, 1
            for payload in payloads:
                self.write(payload)
        return 0

    def _attempt(self, content: bytes, size: int = 0) -> None:
        """``size``: of the datagrams that the kernel is to make of it."""
        self._pace(len(content))
        for _ in self._addresses:
            self._turn = (self._turn + 1) % len(self._sockets)
            sock = self._sockets[self._turn]
            try:
                self._send(sock, content, size)
                # On loopback the answer of a closed port is already here. From elsewhere it
                # comes later, and the next `send` on this socket raises it.
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except OSError as error:
                code = error.errno or errno.EIO
            if code != errno.ECONNREFUSED:
                break
            # "localhost" may be ::1 and 127.0.0.1, and the server listen on one of them.
            self._connect_to_next_address()
        if code:
            if code == errno.ECONNREFUSED:
                # The server may have moved; but not so often that it costs.
                self._lookup_at = min(self._lookup_at, self._clock() + self.LOOKUP_PAUSE)
            elif code != errno.EAGAIN:
                self.close()
            raise self._error(errno.errorcode.get(code, str(code)), os.strerror(code))

    def _send(self, sock: socket.socket, content: bytes, size: int) -> None:
        try:
            _send_now(sock, content, size)
        except BlockingIOError:
            # Not select.poll: eventlet takes it away. This is cooperative there and with gevent.
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_WRITE)
                if not selector.select(self.SEND_TIMEOUT):
                    raise
            _send_now(sock, content, size)

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
        """Look the host up and connect to its first address that has a route.

        Where the name cannot be found any more, the sockets there are go on.
        """
        if self._failure and not self._sockets and self._clock() < self._lookup_at:
            raise self._error(*self._failure)
        try:
            found = socket.getaddrinfo(
                self._options.host, self._options.udp_port, type=socket.SOCK_DGRAM
            )
        except (OSError, ValueError) as error:  # ValueError: no host can have such a name
            # The clock is read after the look-up, which may have taken long.
            if self._sockets:
                self._lookup_at = self._clock() + self.LOOKUP_INTERVAL
                return
            self._fail("dns", str(error))
        addresses = [(family, to) for family, _, _, _, to in found if family in _MTU]
        if sorted(addresses) != sorted(self._addresses):
            self._addresses = addresses  # else keep the order: the first one worked last time
        code = errno.EADDRNOTAVAIL
        for _ in addresses:
            try:
                self._connect()
            except OSError as error:
                code = error.errno or errno.EIO
                self._addresses.append(self._addresses.pop(0))
            else:
                self._failure = None
                self._lookup_at = self._clock() + self.LOOKUP_INTERVAL
                return
        self._fail(errno.errorcode.get(code, str(code)), os.strerror(code))

    def _fail(self, cause: str, reason: str) -> NoReturn:
        # The words are kept and not the error: raised again and again it would keep every frame
        # that it came through, and the payloads in them.
        self._failure = (cause, reason)
        self._lookup_at = self._clock() + self.LOOKUP_PAUSE
        raise self._error(cause, reason) from None

    def _connect(self) -> None:
        """Open the pool to the first of the addresses."""
        self.close()
        family, to = self._addresses[0]
        try:
            for _ in range(self._options.pool_size):
                sock = socket.socket(family, socket.SOCK_DGRAM)
                self._sockets.append(sock)
                sock.setblocking(False)  # with a timeout, every `send` would poll first
                sock.connect(to)
            mtu = self._sockets[0].getsockopt(*_MTU[family])
        except OSError:
            self.close()
            raise
        route = min(mtu - _HEADERS[family], _LONGEST)
        self._max_bytes = self._options.datagram_bytes or max(route, 64)
        self._burst = 1
        if self.may_cut and self._max_bytes <= route and _can_cut(self._sockets[0]):
            # No more than goes in 0.1 s: an attempt that has begun holds up the end of the process.
            most = min(_LONGEST, self._options.bytes_per_second // 10)
            self._burst = max(1, min(int(most // self._max_bytes), _MOST_SEGMENTS))

    def _connect_to_next_address(self) -> None:
        if len(self._addresses) > 1:
            self._addresses.append(self._addresses.pop(0))
            try:
                self._connect()
            except OSError:
                self._open()

    def _pace(self, size: int) -> None:
        """Wait where, with ``size`` bytes more, a burst would be ahead of the speed."""
        speed = self._options.bytes_per_second
        burst = _BURST_BYTES / speed
        now = self._clock()
        self._paced_to = max(self._paced_to, now) + size / speed
        if self._paced_to - now > burst:
            # Half a burst at once, for each sleep costs.
            self._sleep(self._paced_to - now - burst / 2)

    def _error(self, cause: str, reason: str) -> SendError:
        mend = _MENDS.get(cause, "see docs/how-to/enable-udp")
        message = f"{self.address} did not take the datagram ({cause}: {reason}); {mend}"
        return SendError(message, cause)


def _send_now(sock: socket.socket, content: bytes, size: int) -> None:
    if size:
        sock.sendmsg([content], [(*_SEGMENT, struct.pack("=H", size))])
    else:
        sock.send(content)


def _can_cut(sock: socket.socket) -> bool:
    """Whether the kernel knows of it: an older one would send all as one datagram."""
    try:
        sock.getsockopt(*_SEGMENT)
    except OSError:
        return False
    return True
