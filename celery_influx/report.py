"""Log lines that cannot flood: one per cause and minute, with the count of what was left unsaid."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from celery_influx.errors import INTERRUPTS


class Report:
    """Warns at most once per cause and ``interval``.

    Args:
        logger: Where the warnings go.
        interval: Seconds of silence after a warning, for its cause.
        clock: Seconds, monotonic.
    """

    #: Causes come from a fixed set; this is for the day one does not.
    MAX_CAUSES = 100

    def __init__(
        self,
        logger: logging.Logger,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval = interval
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}
        # Reentrant: a log handler may itself send points.
        self._lock = threading.RLock()

    def warn(self, cause: str, text: str, *args: object, exc_info: bool = False) -> None:
        """Log ``text % args``, or count it if ``cause`` was logged within the interval."""
        now = self._clock()
        with self._lock:
            last, unsaid = self._said.get(cause, (None, 0))
            if last is not None and now - last < self._interval:
                self._said[cause] = (last, unsaid + 1)
                return
            if len(self._said) >= self.MAX_CAUSES:
                self._said.clear()
            self._said[cause] = (now, 0)
        if unsaid:
            text += " (and %d times more since it was last said)"
            args = (*args, unsaid)
        try:
            self._logger.warning(text, *args, exc_info=exc_info)
        except tuple(INTERRUPTS):
            raise
        except Exception:  # noqa: BLE001, S110
            pass  # a user's log filter may raise; neither a task nor the batcher ends by that
