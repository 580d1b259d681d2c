"""Searches for a line by which influxd 1.x stores a point that it loses when written as usual.

influxd looks for the end of a line, and then for that of its fields, by rules looser than those by
which it reads the names between: see ``line_reader``. Backslashes in names lead both searches
astray. To the first, a backslash and a space in a tag begin the fields; to the second, a backslash
and an equals sign in a key are one field more. Where they end then depends on the order of tags
and fields, and on what is escaped, wherever influxd reads both ways alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from celery_influx.line_reader import is_scalar

#: So many steps, some 4 µs each, and a few more for each character. Of all the points that
#: tests/conformance/hostile.py makes none needs a third of them, found or not.
_PATIENCE = 10_000

_UNIT = re.compile(r'[^\\", =\n]+|.', re.DOTALL)
_ESCAPED_UNIT = re.compile(r'\\.|[^\\", =\n]+|.', re.DOTALL)
# These change nothing for either search, wherever they stand.
_is_plain_tag = re.compile(r'(?:[^\\"\n]|\\[ ,=])*').fullmatch
_is_plain_field = re.compile(r'(?![\t\0])[^\\", =\n]+=(?:[^\\", =\n]+|"[^\\", =\n]*")').fullmatch

#: Each part of a text, in the ways in which it may be written.
_Ways = list[tuple[str, ...]]
#: What is written so far: the last part, and before it the same of the rest.
_Chain = tuple["_Chain", str] | None


class _Scan(NamedTuple):
    """How far influxd's two searches have come.

    A depth is how many equals signs more than commas there were; below 1 quotes mean nothing.
    """

    escaped: bool = False
    # The search for the end of the line.
    in_fields: bool = False
    line_quoted: bool = False
    line_depth: int = 0
    # The search for the end of the fields. Before them it is blind, as it is in quotes.
    quoted: bool = True
    depth: int = 0
    #: The number or truth value that is being read.
    word: str | None = None
    #: What was last: a backslash, a separator with none before it (","), the tags ("^").
    last: str = ""


def find(head: str, tags: list[str], fields: Mapping[str, str]) -> str | None:
    """The line, without a time; ``None`` where there is none, or finding it takes too long.

    Tried are all orders, and names in all ways that influxd reads alike, so long as each tag and
    field is written once, and each quote in a string is escaped.

    Args:
        head: The measurement as it is written.
        tags: Each tag as it is written, the comma before it included.
        fields: The values as they are written, by keys as they are stored.
    """
    size = len(head) + sum(map(len, tags)) + sum(len(key) + len(fields[key]) for key in fields)
    steps = iter(range(_PATIENCE + 4 * size))
    rare_tags = [_once(tag) for tag in tags if not _is_plain_tag(tag)]
    begun = _spelled(_Scan(), None, _once(head + "".join(filter(_is_plain_tag, tags))), steps)
    misled = []
    for scan, chain in _orders(begun, rare_tags, steps):
        if scan.line_quoted or scan.line_depth:
            misled.append((scan, chain))
        elif line := _with_fields(scan, chain, fields, steps):
            return line
    for scan, chain in sorted(misled, key=lambda end: end[0].line_quoted):
        if line := _with_fields(scan, chain, fields, steps):
            return line
    return None


def _with_fields(
    scan: _Scan, chain: _Chain, fields: Mapping[str, str], steps: Iterator[int]
) -> str | None:
    scan = scan._replace(in_fields=True, quoted=False, last="^")
    plain = ",".join(filter(_is_plain_field, (f"{key}={fields[key]}" for key in fields)))
    rare = [
        [*_key(key), ("=",), *_value(value)]
        for key, value in fields.items()
        if not _is_plain_field(f"{key}={value}")
    ]
    if plain:
        firsts = [(_once(plain), rare)]
    else:
        firsts = [(one, [other for other in rare if other is not one]) for one in rare]
    for first, others in firsts:
        begun = _spelled(scan, (chain, " "), first, steps)
        for end, written in _orders(begun, [[(",",), *ways] for ways in others], steps):
            if (
                not (end.escaped or end.line_quoted or end.quoted)
                and end.depth == 1
                and (end.word is None or is_scalar(end.word))
            ):
                return _text(written)
    return None


def _orders(
    begun: Mapping[_Scan, _Chain], pieces: list[_Ways], steps: Iterator[int]
) -> Iterator[tuple[_Scan, _Chain]]:
    """Where influxd may be after all pieces, in whatever order, and one text for each."""
    everything = tuple(range(len(pieces)))
    stack = [(scan, chain, everything, 0) for scan, chain in reversed([*begun.items()])]
    seen = set()
    while stack:
        scan, chain, left, at = stack.pop()
        if at == 0:
            if (scan, left) in seen:
                continue
            seen.add((scan, left))
            if not left:
                yield scan, chain
                continue
        if at + 1 < len(left):
            stack.append((scan, chain, left, at + 1))
        others = left[:at] + left[at + 1 :]
        reached = _spelled(scan, chain, pieces[left[at]], steps)
        stack += [(*each, others, 0) for each in reversed([*reached.items()])]


def _spelled(scan: _Scan, chain: _Chain, piece: _Ways, steps: Iterator[int]) -> dict[_Scan, _Chain]:
    """Where influxd may be after one piece, in whatever way, and one text for each."""
    found = {scan: chain}
    for ways in piece:
        reached: dict[_Scan, _Chain] = {}
        for before, text in found.items():
            for way in ways:
                if next(steps, None) is None:
                    return {}
                after = _read(before, way)
                if after is not None:
                    reached.setdefault(after, (text, way))
        found = reached
    return found


def _once(text: str) -> _Ways:
    return [(unit,) for unit in _ESCAPED_UNIT.findall(text)]


def _key(key: str) -> _Ways:
    ways: _Ways = []
    before = ""
    for unit in _UNIT.findall(key):
        if unit == "=" or (before == "\\" and unit in ', "'):
            ways.append((f"\\{unit}",))
        elif unit == '"':
            ways.append((unit, f"\\{unit}"))
        else:
            ways.append((f"\\{unit}", unit) if unit in ", " else (unit,))
        before = unit
    return ways


def _value(text: str) -> _Ways:
    """A backslash in a string may be alone, but before a quote or another one."""
    units = _ESCAPED_UNIT.findall(text)
    return [
        (unit, "\\") if unit == "\\\\" and after[0] not in '"\\' else (unit,)
        for unit, after in zip(units, [*units[1:], '"'], strict=True)
    ]


def _text(chain: _Chain) -> str:
    parts = []
    while chain:
        chain, part = chain
        parts.append(part)
    return "".join(reversed(parts))


def _read(scan: _Scan, way: str) -> _Scan | None:
    """Where influxd is after a unit, escaped or not; ``None`` where it ends or refuses the line."""
    if scan.last == "^" and way[0] in " \t\0":
        return None  # skipped before the fields
    after: _Scan | None = scan
    for unit in way if way[0] == "\\" else (way,):
        after = after and _step(after, unit)
    return after


def _step(scan: _Scan, unit: str) -> _Scan | None:
    escaped, in_fields, line_quoted, line_depth, quoted, depth, word, last = scan
    if not escaped:
        if unit == "\n":
            if not line_quoted:
                return None
        elif unit == " ":
            in_fields = True
        elif in_fields and unit == '"':
            line_quoted ^= line_depth > 0
        elif in_fields and not line_quoted:
            line_depth += (unit == "=") - (unit == ",")
    line = (in_fields, line_quoted, line_depth)
    if word is not None:
        if unit in ", ":
            if not is_scalar(word):
                return None
        elif word or unit != '"':
            # In the middle of a word neither quotes nor equals signs count, nor is any valid.
            return None if unit == "\\" else _Scan(False, *line, quoted, depth, word + unit)
        word = None
    if not escaped:
        if unit == '"':
            quoted ^= depth > 0
        elif not quoted:
            if unit == " " or (unit == "=" and last == ","):
                return None
            depth += (unit == "=") - (unit == ",")
            word = "" if unit == "=" else None
    last = "\\" if unit == "\\" else "," if unit in ", " and last != "\\" else ""
    return _Scan(unit == "\\" and not escaped, *line, quoted, depth, word, last)
