"""Every error this package raises, as one tree.

.. code-block:: text

    InfluxError
    ├── ConfigError (also ValueError)    the configuration cannot be used
    ├── PointError (also ValueError)     a point cannot be stored as given
    │   └── FieldError                   … because of its fields
    ├── DecodeError (also ValueError)    bytes that are not line protocol
    ├── SendError                        a server did not take what was sent
    └── QueryError                       a query was refused, here or by the server

Each takes one string, so that Celery's JSON result backends carry it unharmed.
"""

from __future__ import annotations

_WORDS = 500
#: What a signal's handler may raise at any place: Celery's soft time limit, where there is Celery.
#: It means the caller, and nothing that is done here: whoever catches all errors lets it through.
INTERRUPTS: set[type[Exception]] = set()


def show(value: object) -> str:
    """``repr(value)``, short, and whatever its ``__repr__`` does.

    Raises:
        Exception: One of ``INTERRUPTS`` came meanwhile.
    """
    try:
        text = repr(value)
    except tuple(INTERRUPTS):
        raise
    except Exception as error:  # noqa: BLE001 - a user's __repr__ may raise anything
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 100 else f"{text[:80]}...{text[-10:]}"


def show_caught(error: Exception) -> str:
    """``show`` of what was raised while a point was read.

    Raises:
        Exception: ``error`` itself, where it is one of ``INTERRUPTS``.
    """
    if isinstance(error, tuple(INTERRUPTS)):
        raise error
    return show(error)


def shorten(words: str) -> str:
    """A server's words for a log or an error: 500 characters of them at most."""
    return words if len(words) <= _WORDS else words[: _WORDS - 1] + "…"


class InfluxError(Exception):
    """Base of every error of this package."""


class ConfigError(InfluxError, ValueError):
    """The configuration has mistakes; the text names all of them, a line each."""


class PointError(InfluxError, ValueError):
    """The point cannot be stored as given; the text says what is wrong with it."""


class FieldError(PointError):
    """The point's fields cannot be stored: none is left, or a value has no field type."""


class DecodeError(InfluxError, ValueError):
    """The bytes are not line protocol as InfluxDB 1.x reads it."""


class SendError(InfluxError):
    """One attempt to reach a server failed.

    Attributes:
        cause: A short, stable word to count by, such as ``"ECONNREFUSED"`` or ``"404"``.
        retry_after: Seconds for which the server asked to be left alone; ``None``: it did not.
    """

    def __init__(
        self, message: str, cause: str = "error", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class QueryError(InfluxError):
    """A query was refused before sending, or the server answered it with an error."""
