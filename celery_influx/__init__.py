"""Celery plugin that sends task timings and your own points to InfluxDB, without being felt.

One line switches it on: ``celery_influx.install(app)``. All else is Celery configuration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from celery_influx._version import __version__

if TYPE_CHECKING:
    from celery_influx.database import Database
    from celery_influx.errors import (
        ConfigError,
        DecodeError,
        FieldError,
        InfluxError,
        PointError,
        QueryError,
        SendError,
    )
    from celery_influx.line_protocol import encode
    from celery_influx.line_reader import decode
    from celery_influx.plugin import Influx, install
    from celery_influx.point import Point, Precision
    from celery_influx.timing import timed

__all__ = [  # noqa: RUF022 - in the order of the docs
    "__version__",
    # the plugin
    "install",
    "Influx",
    "Database",
    "timed",
    # points
    "Point",
    "Precision",
    "encode",
    "decode",
    # errors
    "InfluxError",
    "ConfigError",
    "PointError",
    "FieldError",
    "DecodeError",
    "SendError",
    "QueryError",
]

#: Where each name comes from. Loaded when it is asked for, as Celery does: most of it needs Celery.
_MODULES = {
    "plugin": ("install", "Influx"),
    "database": ("Database",),
    "timing": ("timed",),
    "point": ("Point", "Precision"),
    "line_protocol": ("encode",),
    "line_reader": ("decode",),
    "errors": (
        *("InfluxError", "ConfigError", "PointError", "FieldError"),
        *("DecodeError", "SendError", "QueryError"),
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
