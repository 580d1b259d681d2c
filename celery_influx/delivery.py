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

    def deliver(self, lines: list[bytes]) -> bool:
        """Send ``lines`` as one payload; whether all of them went out."""
        payload = b"\n".join(lines)
        counters = self._counters
        try:
            rejected = self._transport.write(payload)
        except SendError as error:
            counters[ERRORS] += 1
            counters[LOST] += len(lines)
            self._report.warn(
                f"send {error.cause}", "%s: %s; %d lines lost", self._name, error, len(lines)
            )
            return False
        rejected = min(rejected, len(lines))
        counters[PAYLOADS] += 1
        counters[BYTES] += len(payload)
        counters[SENT] += len(lines) - rejected
        if rejected:
            counters[REJECTED] += rejected
            self._report.warn(
                "rejected",
                "%s: the server rejected %d of %d lines: %s",
                self._name,
                rejected,
                len(lines),
                getattr(self._transport, "rejection", None) or "no reason given",
            )
        logger.debug("%s: sent %d lines, %d bytes", self._name, len(lines), len(payload))
        return not rejected

    def give_up(self, lines: int) -> None:
        """Count ``lines`` that were taken and then failed in a way nobody foresaw."""
        self._counters[ERRORS] += 1
        self._counters[LOST] += lines

    def reject(self, lines: int) -> None:
        """Count ``lines`` that are longer than any payload."""
        self._counters[REJECTED] += lines
        self._report.warn(
            "too long",
            "%s: %d lines are longer than the %d bytes of one payload to %s, and were rejected; "
            "send shorter string fields and tags, or use the transport http",
            self._name,
            lines,
            self.max_bytes,
            self._transport.address,
        )

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
