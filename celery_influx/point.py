"""The words users type: Point and Precision. Values only; nothing here reads a clock."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One point: what was measured, its values, its labels, and when.

    Attributes:
        measurement: What is measured, such as ``"checkout"``.
        fields: Name to value: float, int (64 bits, signed), bool or str. numpy scalars become
            what they hold, a ``Decimal`` or a long double the nearest float (64 bits), if there
            is one. ``None`` is left out; so are NaN and infinity, which InfluxDB cannot store.
            At least one field must remain.
        tags: Name to value, indexed by InfluxDB; values are written as strings. ``None`` and
            the empty string are left out: InfluxDB knows no empty tag.
        timestamp: Nanoseconds since 1970 in UTC, or a datetime (a naive one is taken as UTC).
            ``None``: the present time.
    """

    measurement: str
    fields: Mapping[str, Any]
    tags: Mapping[str, Any] | None = None
    timestamp: int | datetime | None = None


class Precision(str, Enum):
    """The unit of the timestamps that are sent. Its word and its length in nanoseconds.

    InfluxDB 1.x takes an unknown word, ``us`` among them, silently as nanoseconds; the words
    here are those it knows.
    """

    NS = "ns"
    U = "u"
    MS = "ms"
    S = "s"

    @property
    def nanoseconds(self) -> int:
        """How many nanoseconds one unit has."""
        return {"ns": 1, "u": 1_000, "ms": 1_000_000, "s": 1_000_000_000}[self.value]
