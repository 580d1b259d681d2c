"""What becomes of a payload: one attempt by the transport, and the account of it.

Retries, backoff and the spool belong here; a transport only ever makes one attempt.
"""

from __future__ import annotations

import logging

from celery_influx.counters import BYTES, ERRORS, LOST, PAYLOADS, REJECTED, SENT
from celery_influx.errors import SendError
from celery_influx.report import Report
from celery_influx.transports import Transport

logger = logging.getLogger(__name__)


class Delivery:
    """Hands payloads to ``transport`` and counts what came of them in ``counters``.

    Args:
        name: The database's name, for the log.
        transport: Makes the attempts.
        counters: The writer's row for this database.
        report: Where failures are said, once a minute per cause.
    """

    def __init__(
        self, name: str, transport: Transport, counters: memoryview, report: Report
    ) -> None:
        self._name = name
        self._transport = transport
        self._counters = counters
        self._report = report

    @property
    def max_bytes(self) -> int:
        """Longest payload the transport takes now."""
        return self._transport.max_bytes

    @property
    def burst(self) -> int:
        """Most payloads that are delivered at once."""
        return self._transport.burst

    def deliver(self, *lists: list[bytes]) -> bool:
        """Send each list of lines as one payload; whether all of them went out."""
        payloads = [b"\n".join(lines) for lines in lists]
        count, size = sum(map(len, lists)), sum(map(len, payloads))
        counters = self._counters
        try:
            rejected = self._transport.write(*payloads)
        except SendError as error:
            counters[ERRORS] += 1
            counters[LOST] += count
            self._report.warn(
                f"send {error.cause}", "%s: %s; %d lines lost", self._name, error, count
            )
            return False
        rejected = min(rejected, count)
        counters[PAYLOADS] += len(payloads)
        counters[BYTES] += size
        counters[SENT] += count - rejected
        if rejected:
            counters[REJECTED] += rejected
            self._report.warn(
                "rejected",
                "%s: the server rejected %d of %d lines: %s",
                self._name,
                rejected,
                count,
                getattr(self._transport, "rejection", None) or "no reason given",
            )
        logger.debug("%s: sent %d lines, %d bytes", self._name, count, size)
        return not rejected

    def give_up(self, lines: int) -> None:
        """Count ``lines`` that were taken and then failed in a way nobody foresaw."""
        self._counters[ERRORS] += 1
        self._counters[LOST] += lines

    def reject(self, lines: int) -> None:
        """Count ``lines`` that are longer than any payload."""
        self._counters[REJECTED] += lines
        address = self._transport.address
        self._report.warn(
            "too long",
            "%s: %d lines are longer than the %d bytes of one payload to %s, and were rejected; "
            "send shorter string fields and tags, or %s",
            self._name,
            lines,
            self.max_bytes,
            address,
            "use the transport http" if address.startswith("udp:") else "set 'batch_bytes' higher",
        )

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
