"""A server for datagrams that reads all it gets, in a process of its own, and counts lines."""

from __future__ import annotations

import os
import signal
import socket


class Sink:
    """Bound at once; ``drain`` hands the reading over to a forked process.

    To UDP on loopback, or to a socket at ``path``.
    """

    def __init__(self, path: str = "") -> None:
        family = socket.AF_UNIX if path else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.socket.bind(path or ("127.0.0.1", 0))
        self.socket.settimeout(5)
        self.port: int = 0 if path else self.socket.getsockname()[1]
        self._pid = 0
        self._count = 0

    def receive(self) -> list[bytes]:
        """The lines of the next datagram; only before ``drain``."""
        return self.socket.recv(65_536).strip(b"\n").split(b"\n")

    def drain(self) -> None:
        """Read from now on in a child, whose CPU time is not this process's."""
        self._count, count = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            _read_for_ever(self.socket, count)
        os.close(count)

    def stop(self) -> int:
        """End the child; the number of lines it has read."""
        os.kill(self._pid, signal.SIGTERM)
        lines = int(os.read(self._count, 100) or b"0")
        os.waitpid(self._pid, 0)
        os.close(self._count)
        self.socket.close()
        return lines


def _read_for_ever(sock: socket.socket, count: int) -> None:
    lines = 0

    def finish(*_: object) -> None:
        os.write(count, str(lines).encode())
        os._exit(0)

    try:
        sock.settimeout(None)
        signal.signal(signal.SIGTERM, finish)
        buffer = bytearray(65_536)
        while True:
            size = sock.recv_into(buffer)
            lines += buffer[:size].strip(b"\n").count(b"\n") + 1
    finally:
        os._exit(1)
