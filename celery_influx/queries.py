"""InfluxQL as text and as answers: what only reads, quoting, bound parameters, results. No I/O.

The tokens are those of influxd's own scanner
(https://github.com/influxdata/influxql/blob/master/scanner.go), oddities included; whatever
it might read in two ways is refused. Checked against: tests/integration/test_http_influxd.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from celery_influx.errors import QueryError

#: Words for the unit of times in an answer. 1.x takes every other word silently as ns.
EPOCHS = ("ns", "u", "ms", "s", "m", "h")

_READS = "expected SHOW, SELECT without INTO, or EXPLAIN of such a SELECT; to change data use post"
_PARAMS = (
    "expected a string, a finite number, a 64-bit integer, a boolean or one of "
    "{'duration': '1h'}, {'identifier': 'name'}, {'regex': '.*'}"
)
_PAIRS = frozenset({"ALTER", "CREATE", "DROP", "KILL", "SET"})

# A word that touches a quoted name is swallowed by it: influxd reads FROM"m" as the name m.
# After a number's digits a dot belongs to the number, even with no digit behind it: 1./2.
_QUOTED = r'"(?:[^"\\\r\n]|\\[n\\"\'])*"'
_TOKEN = re.compile(
    rf"""
    (?P<space>     [ \t\r\n]+ | --[^\r\n]* | /\*[\s\S]*?\*/ )
  | (?P<string>    '(?:[^'\\\r\n]|\\[n\\"'])*' )
  | (?P<param>     \$[A-Za-z0-9_]*(?:{_QUOTED})? )
  | (?P<name>      (?:[A-Za-z_][A-Za-z0-9_]*)?{_QUOTED} )
  | (?P<word>      [A-Za-z_][A-Za-z0-9_]* )
  | (?P<number>    [0-9]+(?:\.[0-9]*|[A-Za-zµ][A-Za-zµ0-9]*)? | \.[0-9]+ )
  | (?P<sign>      =~ | !~ | != | >= | <= | <> | :: | [-+*%&|^=<>(),:.;] )
    """,
    re.VERBOSE,
)
# Only \/ is an escape here; a backslash before anything else stands for itself, so the
# second one of \\/ still keeps the slash from ending the literal.
_REGEX = re.compile(r"/(?:\\/|[^/\\\r\n]|\\(?!/))*/")
_BEFORE_REGEX = frozenset({"SELECT", "FROM", "BY", ",", "(", "=", "=~", "!~"})
_OPERANDS = frozenset({"string", "param", "name", "word", "number", "regex"})
_MINUS_ZERO = re.compile(r"-0(?=[,\]])")


class _Token(NamedTuple):
    kind: str
    text: str


def require_read_only(statement: str) -> None:
    """Raise unless every statement in ``statement`` only reads.

    Those are ``SHOW …``, ``SELECT …`` without ``INTO`` at any depth, and ``EXPLAIN [ANALYZE]``
    of such a ``SELECT``. InfluxDB 1.x itself does not see to it: a GET that says ``DROP`` drops.

    Raises:
        QueryError: Naming the kind of statement that may write, or the place that cannot be
            read for sure, such as an unfinished string or a character that InfluxQL lacks.
    """
    found = False
    for tokens in _statements(statement):
        found = True
        words = [token.text.upper() if token.kind == "word" else "" for token in tokens]
        if "INTO" in words:
            raise QueryError(f"query: {words[0] or 'a statement'} … INTO writes; {_READS}")
        if words[0] == "EXPLAIN":
            rest = words[1:]
            for option in ("ANALYZE", "VERBOSE"):
                rest = rest[1:] if rest[:1] == [option] else rest
            if rest[:1] != ["SELECT"]:
                raise QueryError(f"query: EXPLAIN of something other than SELECT; {_READS}")
        elif words[0] not in ("SHOW", "SELECT"):
            length = 2 if words[0] in _PAIRS else 1
            kind = " ".join(word for word in words[:length] if word) or repr(tokens[0].text[:40])
            raise QueryError(f"query: {kind} is not a statement that only reads; {_READS}")
    if not found:
        raise QueryError(f"query: no statement in {statement[:40]!r}; {_READS}")


def _statements(text: str) -> Iterator[list[_Token]]:
    """The tokens of each statement that has any, comments and white space left out."""
    # influxd's scanner takes NUL for the end of what it is reading, such as a comment, and
    # then reads on.
    if "\0" in text or not _encodable(text):
        raise QueryError(f"query: a NUL or half a surrogate pair in the text; {_READS}")
    tokens: list[_Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match:
            token = _Token(str(match.lastgroup), match.group())
        elif text[position] == "/":
            token = _slash(text, position, tokens)
        else:
            raise _unclear(text, position)
        position += len(token.text)
        if token == ("sign", ";"):
            if tokens:
                yield tokens
            tokens = []
        elif token.kind != "space":
            tokens.append(token)
    if tokens:
        yield tokens


def _slash(text: str, position: int, before: list[_Token]) -> _Token:
    """The division sign or the regular expression that begins at ``position``."""
    last = before[-1] if before else _Token("", "")
    if last.text.upper() in _BEFORE_REGEX and last.kind in ("word", "sign"):
        regex = True
    elif last == ("sign", "."):
        # FROM rp./re/ holds a regex, but a./2 divides a: influxd looks at the clause.
        regex = _names_a_source(before)
        if not regex:
            raise _unclear(text, position)
    elif last.kind in _OPERANDS or last in (("sign", ")"), ("sign", "*")):
        regex = False
    else:
        raise _unclear(text, position)
    if not regex:
        return _Token("sign", "/")
    match = _REGEX.match(text, position)
    if not match:
        raise _unclear(text, position)
    return _Token("regex", match.group())


def _names_a_source(tokens: list[_Token]) -> bool:
    """Whether ``tokens`` end in FROM and a dotted name."""
    for token in reversed(tokens):
        if token.kind == "word" and token.text.upper() == "FROM":
            return True
        if token.kind not in ("word", "name", "param") and token != ("sign", "."):
            return False
    return False


def _unclear(text: str, position: int) -> QueryError:
    rest = text[position : position + 20]
    return QueryError(
        f"query: cannot tell how the server reads character {position + 1}, {rest!r}; {_READS}"
    )


def require_text(name: str, value: object) -> None:
    """Raise unless ``value``, an argument called ``name``, is text that can be sent.

    Raises:
        QueryError: It is none. The value is not shown: a statement may hold a password.
    """
    if not isinstance(value, str):
        raise QueryError(f"{name}: expected a str, got a value of type {type(value).__name__}")
    if not _encodable(value):
        raise QueryError(f"{name}: half a surrogate pair is no text; expected Unicode text")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quote_ident(name: str) -> str:
    """``name`` as InfluxQL writes a database, measurement, tag, field: ``"…"``.

    Raises:
        QueryError: ``name`` holds a NUL, a carriage return or half a surrogate pair, which
            InfluxQL cannot write. A bound ``{"identifier": name}`` can, the last one excepted.
    """
    return _quote(name, '"')


def quote_string(value: str) -> str:
    """``value`` as InfluxQL writes a string, such as a tag's value: ``'…'``.

    A bound parameter is the better way: ``query("… WHERE host = $host", params={"host": …})``.

    Raises:
        QueryError: ``value`` holds a NUL, a carriage return or half a surrogate pair, which
            InfluxQL cannot write. A bound parameter can, the last one excepted.
    """
    return _quote(value, "'")


def _quote(text: str, mark: str) -> str:
    for character, word in (("\0", "a NUL"), ("\r", "a carriage return")):
        if character in text:
            raise QueryError(
                f"{text[:40]!r}: InfluxQL has no way to write {word}; bind it by params"
            )
    if not _encodable(text):
        raise QueryError(f"{text[:40]!r}: half a surrogate pair is no text; expected Unicode text")
    escaped = text.replace("\\", "\\\\").replace(mark, "\\" + mark).replace("\n", "\\n")
    return f"{mark}{escaped}{mark}"


def encode_params(params: Mapping[str, Any]) -> str:
    """Bound parameters as the JSON that ``/query`` takes.

    Raises:
        QueryError: No mapping, or a value that InfluxDB cannot bind, such as ``None`` or a list.
    """
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise QueryError(
            f"params: expected a mapping with str keys, such as {{'host': 'a'}}; got {params!r:.80}"
        )
    return "{" + ",".join(f"{_json(name)}:{_param(name, params[name])}" for name in params) + "}"


def _param(name: str, value: object) -> str:
    if isinstance(value, bool) or (isinstance(value, str) and _encodable(value)):
        return _json(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int.__repr__(value)
    if isinstance(value, float) and math.isfinite(value):
        # influxd takes a number without a point for an integer: 1e+16 is an error there.
        digits = float.__repr__(value)
        return digits if "." in digits else digits.replace("e", ".0e")
    if isinstance(value, Mapping) and len(value) == 1:
        (kind,) = value
        if kind in ("duration", "identifier", "regex") and isinstance(value[kind], str):
            return f"{{{_json(kind)}:{_param(name, value[kind])}}}"
    raise QueryError(f"params[{name!r}]: {_PARAMS}; got {value!r:.80}")


def _json(value: object) -> str:
    return json.dumps(value)


class Series(NamedTuple):
    """One series of an answer: a table.

    ``pandas.DataFrame(series.values, columns=series.columns)`` makes a data frame of it.

    Attributes:
        name: The measurement, or what a ``SHOW`` lists; may be empty.
        tags: The tags of ``GROUP BY``, which all rows share.
        columns: The names of the columns; the first is mostly ``time``.
        values: The rows, a list each. Numbers are exact; a float without a fraction comes as
            an int, since the server's JSON does not tell them apart.
    """

    name: str
    tags: dict[str, str]
    columns: list[str]
    values: list[list[Any]]

    def rows(self) -> list[dict[str, Any]]:
        """Each row as a mapping of tag and column names; a column wins over a tag."""
        tags, columns = self.tags, self.columns
        return [{**tags, **dict(zip(columns, row, strict=False))} for row in self.values]


@dataclass(frozen=True)
class QueryResult:
    """What a server answered: the series of all statements, in their order.

    Iterating gives the series and ``len`` counts them, so an empty answer is false.

    Attributes:
        series: One for each measurement and each set of ``GROUP BY`` tags.
        partial: The server cut the answer short, at its ``max-row-limit`` for instance. Where
            the answer was not chunked, InfluxDB 1.x says so of every series with more than
            10,000 rows, cut or not: ask ``chunked`` for those.
        messages: The server's warnings, as ``"warning: …"``.
    """

    series: list[Series] = field(default_factory=list)
    partial: bool = False
    messages: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Series]:
        return iter(self.series)

    def __len__(self) -> int:
        return len(self.series)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all series, as mappings of tag and column names."""
        return [row for series in self.series for row in series.rows()]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, for a result backend that speaks JSON."""
        return {
            "series": [series._asdict() for series in self.series],
            "partial": self.partial,
            "messages": list(self.messages),
        }


def parse_json(text: str) -> Any:
    """JSON as influxd writes it: ``-0`` there is a float, which Python would make the int 0.

    Raises:
        ValueError: ``text`` is not JSON.
    """
    if _MINUS_ZERO.search(text):
        return json.loads(text, parse_int=lambda word: -0.0 if word == "-0" else int(word))
    return json.loads(text)


def count_statements(statement: str) -> int:
    """How many statements ``statement`` holds, for ``parse_answer``.

    Raises:
        QueryError: The place that cannot be read for sure.
    """
    return sum(1 for _ in _statements(statement))


def require_rows(result: QueryResult, most: int) -> None:
    """Raise QueryError where all series of a result together have more than so many rows."""
    if sum(len(found.values) for found in result.series) > most:
        raise _too_many(most)


def limited(pieces: Iterable[bytes], most_rows: int, most_bytes: int) -> Iterator[bytes]:
    """``pieces`` of an answer, as long as they keep within its limits.

    Rows are counted before anything is made of them: as Python's values they are many times as
    long. ``],[`` parts them in influxd's JSON; of other JSON ``parse_answer`` counts them.

    Raises:
        QueryError: They do not; nothing further is taken from ``pieces``.
    """
    size = rows = 0
    inside = False  # of a string, at the end of the last piece
    rest = b""  # a backslash there
    for piece in pieces:
        size += len(piece)
        if size > most_bytes:
            raise _too_much(f"longer than {most_bytes:,} bytes", "query_bytes")
        plain = (rest + piece).replace(rb"\\", b"").replace(rb"\"", b"")
        rest = b"\\" if plain.endswith(b"\\") else b""
        parts = plain.removesuffix(rest).split(b'"')
        rows += b"".join(parts[inside::2]).count(b"],[")
        inside ^= len(parts) % 2 == 0
        if rows >= most_rows:
            raise _too_many(most_rows)
        yield piece


def _too_many(rows: int) -> QueryError:
    return _too_much(f"of more than {rows:,} rows", "query_rows")


def _too_much(how: str, option: str) -> QueryError:
    return QueryError(
        f"the answer is {how}; ask for less, by LIMIT, a shorter time or GROUP BY time(…), or set "
        f"{option!r} higher"
    )


def parse_answer(
    documents: Iterable[Any],
    *,
    chunked: bool = False,
    statements: int = 0,
) -> QueryResult:
    """The result that the JSON documents of one answer make up.

    Args:
        documents: The one document of a plain answer, or those of a chunked one in order.
        chunked: ``partial`` then means that more follows, and is an end too soon only in the
            last document of a statement.
        statements: How many were asked. At its row limit InfluxDB leaves out the statements
            that follow without a word: fewer results than this are ``partial``.

    Raises:
        QueryError: The server's words, for an error at the top or in any statement's result.
    """
    series: list[Series] = []
    messages: list[str] = []
    partial: dict[object, bool] = {}
    continued = False
    try:
        for document in documents:
            _raise_error(document)
            for result in document.get("results") or ():
                _raise_error(result)
                messages += [
                    f"{message.get('level')}: {message.get('text')}"
                    for message in result.get("messages") or ()
                ]
                statement = result.get("statement_id")
                cut = bool(result.get("partial"))
                for found in result.get("series") or ():
                    values = found.get("values") or []
                    if continued:
                        series[-1].values.extend(values)
                    else:
                        series.append(
                            Series(
                                found.get("name", ""),
                                found.get("tags") or {},
                                found.get("columns") or [],
                                values,
                            )
                        )
                    cut = cut or bool(found.get("partial"))
                    continued = chunked and bool(found.get("partial"))
                partial[statement] = cut if chunked else cut or partial.get(statement, False)
    except (AttributeError, TypeError):
        pass
    else:
        return QueryResult(series, any(partial.values()) or len(partial) < statements, messages)
    raise QueryError(
        'the answer is JSON, but not of the shape that InfluxDB gives; expected {"results": […]}; '
        "is this InfluxDB's HTTP API?"
    )


def _raise_error(part: Any) -> None:
    words = str(part.get("error") or "")
    if words == "not executed":
        # 1.6.7 overwrites a failed statement's error with that of the statement after it.
        words += ": one of the statements failed; send them one by one, or chunked, to learn why"
    if words:
        raise QueryError(f"the server answered: {words[:500]}")
