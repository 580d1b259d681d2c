"""Celery plugin that sends task timings and your own points to InfluxDB, without being felt.

One line switches it on: ``celery_influx.install(app)``. All else is Celery configuration.
"""

from celery_influx._version import __version__
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
