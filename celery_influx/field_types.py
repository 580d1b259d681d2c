"""The type of each field of a database: InfluxDB fixes it at the field's first value.

A later value of another type costs its point, and in a new shard every point of the batch, over
UDP without a word. So here, too, the first type stays: for all processes of a worker, or for one
that is no worker's. Our own measurements have theirs by ``measurements``. No I/O.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

from celery_influx.errors import FieldError
from celery_influx.measurements import MEASUREMENTS
from celery_influx.queries import Series

KINDS: tuple[type, ...] = (float, int, bool, str)
_BY_NAME = {kind.__name__: kind for kind in KINDS}
#: InfluxDB's words. An "unsigned" one, of 2.x, is none that we could send.
_BY_WORD = {"float": float, "integer": int, "boolean": bool, "string": str}
_OWN = {
    (measurement.name, column.name): _BY_NAME[column.type]
    for measurement in MEASUREMENTS
    for column in measurement.columns
    if column.type != "tag"
}


class TypeTable:
    """One database's fields and their types, in memory that all processes of a worker share.

    Cells of 64 bits: the upper 62 are a field's hash, the lowest two its type. A field has the
    first free one of those that its hash leads to, for good. There is no lock, in which a signal's
    handler could wait for ever: a cell is written where it is empty, then read again, and what
    stands there holds. Two processes that both find it empty within the same microsecond may go on
    with a type each; that costs what it does without a table: the points of one of them.

    Args:
        shared: Over ``fork``.
        learning: The server is being asked for its types, which are to win.
    """

    CELLS = 16_384
    #: Tried for a field. With three quarters of all cells taken, one of 100 new ones finds none.
    PROBES = 16

    def __init__(self, *, shared: bool = False, learning: bool = False) -> None:
        size = (self.CELLS + 1) * 8
        self._cells = memoryview(mmap.mmap(-1, size) if shared else bytearray(size)).cast("Q")
        self._cells[self.CELLS] = learning

    @property
    def learning(self) -> bool:
        """Whether a field's type may still change, and so must not be kept elsewhere."""
        return bool(self._cells[self.CELLS])

    def learn(self, found: Iterable[tuple[str, str, type]]) -> None:
        """Take over what the server has: measurement, field and type, whatever was claimed."""
        for measurement, field, kind in found:
            wanted = _hash(measurement, field)
            place = self._place(wanted)
            if place is not None:
                self._cells[place] = wanted | KINDS.index(kind)

    def end_learning(self) -> None:
        """From now on no type changes."""
        self._cells[self.CELLS] = False

    def claim(self, measurement: str, field: str, kind: type) -> type | None:
        """The type that a field has: ``kind`` if it had none; None where there is no room."""
        wanted, cells = _hash(measurement, field), self._cells
        cell = wanted | KINDS.index(kind)
        while (place := self._place(wanted)) is not None:
            # No thread comes in between: Python switches them at calls only, and jumps backwards.
            if not cells[place]:
                cells[place] = cell
            if cells[place] | 3 == wanted | 3:
                return KINDS[cells[place] & 3]
        return None

    def _place(self, wanted: int) -> int | None:
        """The field's cell, or the one that it may have."""
        step = wanted >> 40 | 1
        for place in range(wanted >> 2, (wanted >> 2) + self.PROBES * step, step):
            if self._cells[place % self.CELLS] & ~3 in (0, wanted):
                return place % self.CELLS
        return None


def _hash(measurement: str, field: str) -> int:
    """The same in every process; the lowest two bits are 0, and never all are."""
    text = f"{len(measurement)} {measurement}{field}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") & ~3 or 4


def server_types(answer: Iterable[Series]) -> Iterator[tuple[str, str, type]]:
    """Measurement, field and type by the answer to ``SHOW FIELD KEYS``.

    A field that has several, each in other shards, is not among them: which one the present shard
    has is not said. VictoriaMetrics, where types do not matter, answers something else.
    """
    for measurement, _, columns, rows in answer:
        if columns != ["fieldKey", "fieldType"]:
            continue
        words: dict[str, set[str]] = {}
        for field, word in rows:
            words.setdefault(field, set()).add(word)
        for field, (word, *others) in words.items():
            if word in _BY_WORD and not others:
                yield measurement, field, _BY_WORD[word]


class FieldTypes:
    """The types as one process knows them: what an encoder asks.

    Args:
        table: Where they are for all processes.
        on_conflict: Called with a point's measurement and, for each of its fields that are left
            out for their type, what is wrong with it.
        on_full: Called with the measurement and the name of a field that finds no room in the
            table: each process then decides on its type by itself.

    Attributes:
        known: Measurement to field to type: what has not to be asked for again. It only grows,
            until it is emptied, so a part of it that somebody holds stays true.
        on_emptied: Called when it is; an encoder's, which forgets what it has of it.
    """

    #: Beyond it ``known`` begins anew; longer names, together, are never kept.
    MOST, LONGEST = TypeTable.CELLS, 512

    def __init__(
        self,
        table: TypeTable,
        on_conflict: Callable[[str, list[str]], None],
        on_full: Callable[[str, str], None],
    ) -> None:
        self._table = table
        self._on_conflict = on_conflict
        self._on_full = on_full
        self._kept = 0
        self.on_emptied: Callable[[], None] = lambda: None
        self.known: dict[str, dict[str, type]] = {}

    def fit(self, measurement: str, fields: dict[str, Any]) -> dict[str, Any]:
        """``fields`` as they can be stored, the same dict where all of them can.

        An int for a float's field becomes the nearest float, which is the same number up to 2**53;
        a field of another type is left out. Values are exact float, int, bool or str.

        Raises:
            FieldError: None is left.
        """
        types = {name: self._type(measurement, name, type(fields[name])) for name in fields}
        wrong = {name: kind for name, kind in types.items() if kind is not type(fields[name])}
        if not wrong:
            return fields
        fitting, conflicts = {}, []
        for name, value in fields.items():
            kind = wrong.get(name)
            if kind is None:
                fitting[name] = value
            elif kind is float and type(value) is int:
                fitting[name] = float(value)
            else:
                conflicts.append(
                    f"{name!r:.100} is of type {type(value).__name__}, expected {kind.__name__}"
                )
        if conflicts:
            self._on_conflict(measurement, conflicts)
        if not fitting:
            raise FieldError(
                f"point {measurement!r:.100}: no field is left to store: {conflicts[0]}, since "
                "InfluxDB fixes a field's type at its first value. Send one type, or use another "
                "name"
            )
        return fitting

    def _type(self, measurement: str, field: str, kind: type) -> type:
        """The field's type: ``kind`` if it has none yet."""
        # Looked at first: the server's answer may come in between.
        final = not self._table.learning
        found = self.known.get(measurement, {}).get(field) or _OWN.get((measurement, field))
        if found is None:
            found = self._table.claim(measurement, field, kind)
        if found is None:
            self._on_full(measurement, field)
            found = kind
        if not final or len(measurement) + len(field) > self.LONGEST:
            return found
        if self._kept >= self.MOST:
            self._kept = 0
            for fields in list(self.known.values()):
                fields.clear()  # an encoder may hold on to it
            self.known.clear()
            self.on_emptied()
        self._kept += 1
        return self.known.setdefault(measurement, {}).setdefault(field, found)
