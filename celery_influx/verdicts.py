"""What Celery makes of a run that was killed: told by a worker's requests, for ``runs``.

Or for ``signals``, where runs are in greenlets.

Signals tell some of it, some of it twice, and not the same in every version of Celery. The
request of a task knows all of it; and Celery lets a task choose its request's class.
"""

from __future__ import annotations

import logging
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]
from celery import Celery
from celery.exceptions import Terminated, WorkerLostError
from kombu.utils.imports import symbol_by_name

from celery_influx.runs import LOST
from celery_influx.signals import facts_of, killing, recorder

logger = logging.getLogger(__name__)

_Base: Any = object


def watch(app: Celery) -> None:
    """In a worker, before it consumes: have the requests of all of ``app``'s tasks tell."""
    watched: dict[type, type] = {}
    for task in app.tasks.values():
        base = symbol_by_name(task.Request)
        if not issubclass(base, _Watched):
            if base not in watched:
                watched[base] = type(base.__name__, (_Watched, base), {})
            task.Request = watched[base]  # type: ignore[assignment]


class _Watched(_Base):  # type: ignore[misc]
    """Laid over a request's class: what it does it does unchanged, and then says what it was."""

    _goes_back = False  # the message, to the queue; or the task, as a retry
    _had_succeeded = False

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """The pool failed: a child died, or a hard time limit. Or the child says the task did."""
        # What a child has said of the task it has also said to us.
        told = kwargs.get("return_ok") or (len(args) > 1 and args[1])
        told = told or self._already_cancelled or self._already_revoked
        try:
            return super().on_failure(exc_info, *args, **kwargs)
        except BaseException:
            # As in a worker that has left its broker, which then gives the message out again.
            self._goes_back = self._goes_back or not self.acknowledged
            raise
        finally:
            if not told:
                error = exc_info.exception
                error = error.exc if isinstance(error, ExceptionWithTraceback) else error
                self._judge_error(error)

    def _judge_error(self, error: BaseException) -> None:
        if isinstance(error, Terminated):
            self._judge("REVOKED", None)
            return
        if self._had_succeeded:
            self._judge("SUCCESS", None)
            return
        lost = isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt))
        self._judge_failure(LOST if lost else type(error).__name__)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """The task was revoked: its child is killed, if it was seen to have it."""
        with killing(self.id, "REVOKED", None):
            super().terminate(pool, signal)
        if self.time_start:
            self._judge("REVOKED", None)

    def cancel(self, pool: Any, *args: Any, **kwargs: Any) -> None:
        """The worker ends, or lost its broker: the child is killed.

        Celery calls it a retry, also where nobody gives the task out again.
        """
        goes_back = not self.acknowledged
        # If the broker is to do that, Celery acknowledges what it killed in a greenlet.
        green_goes_back = goes_back and kwargs.get("emit_retry", True)
        with killing(self.id, "RETRY" if green_goes_back else "FAILURE", LOST):
            super().cancel(pool, *args, **kwargs)
        if self.time_start:
            self._judge("RETRY" if goes_back else "FAILURE", LOST)

    def reject(self, requeue: bool = False) -> None:
        """The message is refused."""
        self._goes_back = self._goes_back or (requeue and not self.acknowledged)
        super().reject(requeue=requeue)

    def _retry_worker_lost(self, *args: Any) -> bool:
        """Celery 5.7's own way to start a lost task again."""
        self._goes_back = bool(super()._retry_worker_lost(*args))
        return self._goes_back

    def _success_was_stored(self) -> Any:
        """Celery 5.7's own look whether a task had its result before its child was lost."""
        found = super()._success_was_stored()
        self._had_succeeded = bool(found)
        return found

    def _judge_failure(self, exception: str) -> None:
        self._judge("RETRY" if self._goes_back else "FAILURE", exception)

    def _judge(self, state: str, exception: str | None) -> None:
        try:
            influx = recorder(self.task)
            if influx:
                retries = self.request_dict.get("retries")
                facts = facts_of(influx, self.task.name, self, retries)
                influx.judge_run(self.worker_pid or 0, self.id, state, exception, facts)
        except Exception:  # the request must go its way
            logger.exception("celery_influx: no verdict on %s", self.id)
