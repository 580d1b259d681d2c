"""The account: what became of every point, in memory that all processes of a worker share.

A table of 64-bit cells: a row per process, one writer each, and in it a block per database.
A pool child's row belongs to its slot, not to it: the next child in that slot counts on, so
nothing counted dies with a process and nothing needs to be merged.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

#: Name to meaning. At rest ``points + adopted == sent + dropped + lost + rejected + queued``.
COUNTERS = {
    "points": "handed to `send_data`, or made by the plugin itself",
    "sent": "handed to the kernel (UDP, TCP, `unixgram`) or taken by the server (HTTP)",
    "dropped": "left the buffer, the pipe or the spool unsent, since it was full or time ran out",
    "lost": "sent or tried, and given up; or gone from the spool",
    "rejected": "refused by the encoder, too long for the transport, or refused by the server",
    "errors": "failed attempts to send",
    "payloads": "datagrams, requests or, over TCP, batches that went out",
    "bytes": "bytes of those payloads",
    "left_out": "fields that were NaN or infinite and left out",
    "conflicts": "fields left out since they have another type in InfluxDB",
    "clamped": "waits that clock skew made negative, written as 0",
    "errors_no_answer": "nobody there, not in time, a broken connection, a full queue (`unixgram`)",
    "errors_busy": "the server cannot now: HTTP 408, 425, 429, 5xx",
    "errors_access": "somebody must mend something: HTTP 401, 403, 404, redirects, TLS, no secret",
    "errors_refused": "what was sent was not taken: too long a datagram, all other HTTP statuses",
    "spooled": "written to the spool, since the server was away",
    "adopted": "found in the spool, left there by processes that have ended",
}
(
    POINTS,
    SENT,
    DROPPED,
    LOST,
    REJECTED,
    ERRORS,
    PAYLOADS,
    BYTES,
    LEFT_OUT,
    CONFLICTS,
    CLAMPED,
    ERRORS_NO_ANSWER,
    ERRORS_BUSY,
    ERRORS_ACCESS,
    ERRORS_REFUSED,
    SPOOLED,
    ADOPTED,
) = range(len(COUNTERS))


class Counters:
    """The whole table.

    Args:
        databases: How many databases are counted.
        rows: How many processes count; more than one makes the memory shared over ``fork``.
    """

    def __init__(self, databases: int, rows: int = 1) -> None:
        self._databases = databases
        self.rows = rows
        size = rows * databases * len(COUNTERS) * 8
        # Anonymous and shared: children made by fork write into the same pages.
        memory = mmap.mmap(-1, size) if rows > 1 else bytearray(size)
        self._cells = memoryview(memory).cast("Q")

    def row(self, database: int, row: int = 0) -> memoryview:
        """The cells of one process for one database; ``row[POINTS] += 1`` counts.

        That statement is atomic under the interpreter lock: since Python 3.10 a thread gives
        the lock away only at calls and backward jumps, and there is none in it.
        """
        width = len(COUNTERS)
        start = (row * self._databases + database) * width
        return self._cells[start : start + width]

    def add(self, database: int, sums: Mapping[str, int]) -> None:
        """Count into row 0 what was counted elsewhere before."""
        row = self.row(database)
        for number, name in enumerate(COUNTERS):
            count = sums.get(name, 0)
            row[number] += count  # others count in it meanwhile

    def total(self, database: int) -> dict[str, int]:
        """Name to sum over all processes, and ``queued``: what is still on its way."""
        width = len(COUNTERS)
        step = self._databases * width
        start = database * width
        sums = {
            name: sum(self._cells[start + offset :: step]) for offset, name in enumerate(COUNTERS)
        }
        settled = sums["sent"] + sums["dropped"] + sums["lost"] + sums["rejected"]
        # The rows are read one after another, so a point may be seen sent before it is seen made.
        sums["queued"] = max(0, sums["points"] + sums["adopted"] - settled)
        return sums
