"""Both encoders as one, so that real servers meet what either of them writes.

Where the extension is built, the one in Python would else meet none: it takes what is rare only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_influx.errors import PointError
from celery_influx.line_protocol import Encoder
from celery_influx.point import Point
from tests.python_only import python_only


def both_encode(**options: Any) -> Callable[[Point], bytes]:
    """The ``encode`` of two Encoders with these options, which must be of one mind."""
    encoders = [Encoder(**options).encode]
    with python_only():
        encoders.append(Encoder(**options).encode)

    def encode(point: Point) -> bytes:
        found: set[bytes | str] = set()
        for each in encoders:
            try:
                found.add(each(point))
            except PointError as error:
                found.add(str(error))
        assert len(found) == 1, (point, found)
        (line,) = found
        if isinstance(line, str):
            raise PointError(line)
        return line

    return encode
