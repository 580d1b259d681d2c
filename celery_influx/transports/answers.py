"""What an InfluxDB server answers, read with bounds, and what went wrong where it does not.

Nothing here sends. Where influxd 1.6.7 says more than its documentation, the comments do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from celery_influx.errors import SendError
from celery_influx.line_reader import split_lines, unreadable
from celery_influx.queries import parse_json
from celery_influx.transports.bounded import LONGEST, TooSlowError, allow

if TYPE_CHECKING:
    import requests
    from typing_extensions import Self

#: Seconds: a server that asks for longer asks for ever.
_LONGEST_WISH = 10**9
#: Bytes of a body that are read, or unpacked, at a time.
_PIECE = 65_536
_UNPARSABLE = "unable to parse '"
_DROPPED = re.compile(r"dropped=(\d{1,9})\s*$")
#: Quotes of lines that were not sent: from so many on, no more lines are looked for.
_STRANGE_QUOTES = 16


class Answer:
    """A response whose body is read here, so that its errors and its length are ours to limit.

    Leaving the ``with`` block closes the connection, unless the body was read to its end.

    Attributes:
        said: The JSON of an error, after ``words``; ``None``: it was none.
    """

    def __init__(
        self,
        response: requests.Response,
        failure: Callable[[BaseException, float], SendError],
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.status = response.status_code
        self.said: object = None
        self._response = response
        self._failure = failure
        self._seconds = seconds
        self._clock = clock
        self._whole = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._whole:
            self._response.close()

    def header(self, name: str) -> str | None:
        """The value of a header."""
        value: str | None = self._response.headers.get(name)
        return value

    @property
    def credentials(self) -> str:
        """What was sent by the header ``Authorization``."""
        return str(self._response.request.headers.get("Authorization", ""))

    @property
    def is_its_own(self) -> bool:
        """Whether the server itself answered, rather than something in front of it.

        InfluxDB puts its version into each answer; an error of VictoriaMetrics, after ``words``,
        has the form of Prometheus's.
        """
        said = self.said
        return "X-Influxdb-Version" in self._response.headers or (
            isinstance(said, dict) and "errorType" in said
        )

    def finish(self) -> None:
        """Read a body that should be empty, so that the connection can be used again.

        What a proxy makes of it changes nothing: the answer is its status.
        """
        with contextlib.suppress(SendError):
            self._read(limit=65_536)

    def words(self, limit: int = 65_536) -> str:
        """What an error says: the text in its JSON, or its body; of ``limit`` bytes at most.

        What arrives within the timeout is taken; an error while reading an error is no news.
        """
        try:
            body = self._read(limit)
        except SendError:
            return ""
        text = body.decode("utf-8", "replace")
        try:
            self.said = found = parse_json(text)
            # InfluxDB 2 says "message"; 3 says of each bad line what is wrong with it.
            words = str(found.get("error") or found.get("message") or text)
            first = next(iter(bad_lines(found)), {})
            return f"{words}: {first['error_message']}" if "error_message" in first else words
        except (ValueError, RecursionError, AttributeError):
            return " ".join(text.split())

    def _read(self, limit: int) -> bytes:
        """The body, or what of it arrives within the timeout, to about ``limit`` bytes."""
        end = self._clock() + self._seconds
        body = bytearray()
        for piece in self.pieces(times=2):  # one is over below
            body += piece
            if len(body) > limit or self._clock() > end:
                break
        return bytes(body)

    def pieces(self, times: int = LONGEST) -> Iterator[bytes]:
        """The body as it comes, unpacked, for so many timeouts.

        Raises:
            SendError: It ended too soon, stalled, or cannot be unpacked.
        """
        allow(self._response, times)
        packed = (self.header("Content-Encoding") or "").strip().lower()
        pieces = self._as_sent()
        if packed in ("gzip", "x-gzip"):
            pieces = self._unpacked(pieces)
        elif packed not in ("", "identity"):
            raise self._failure(zlib.error(f"{packed!r} was not asked for"), self._seconds)
        return pieces

    def _as_sent(self) -> Iterator[bytes]:
        import urllib3

        raw = self._response.raw
        raw.enforce_content_length = True  # urllib3 before 2.0 took a body cut short for whole
        # read() waits for all it was asked for, be it a byte in a minute; read1() for something.
        read, size = (raw.read1, _PIECE) if hasattr(raw, "read1") else (raw.read, 1_024)
        while True:
            try:
                piece = read(size, decode_content=False)
                failure = None
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                failure = self._failure(error, self._seconds)
            if failure:
                raise failure
            if not piece:
                self._whole = True
                return
            yield piece

    def _unpacked(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """A thousand bytes may hold a million, so not whole pieces at once, as urllib3 once did."""
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        began = False
        for piece in pieces:
            rest, began = piece, True
            while rest and not unpacker.eof:
                try:
                    unpacked = unpacker.decompress(rest, _PIECE)
                    failure = None
                except zlib.error as error:
                    failure = self._failure(error, self._seconds)
                if failure:
                    raise failure
                yield unpacked
                rest = unpacker.unconsumed_tail
        yield unpacker.flush()
        if began and not unpacker.eof:
            raise self._failure(zlib.error("its end is missing"), self._seconds)


def lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines of a body as they come: a chunk each, whose own newlines JSON escapes."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        if b"\n" in piece:
            *whole, rest = rest.split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode("utf-8", "replace")


def bad_lines(said: Any) -> list[dict[str, Any]]:
    """What InfluxDB 3 says in an error of the lines that it did not take."""
    found = said.get("data") if isinstance(said, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def rejected_lines(words: str, payload: bytes) -> int:
    """How many lines of ``payload`` a 400 says were rejected; 0 where it speaks of other things."""
    partial = words.startswith("partial write: ")
    reason = words.removeprefix("partial write: ")
    if not reason.startswith(_UNPARSABLE):
        dropped = _DROPPED.search(words) if partial else None
        # It says nothing then of lines that it could not read.
        return int(dropped[1]) + unreadable(payload) if dropped else 0
    sent = [line.decode("utf-8", "replace") for line in split_lines(payload)]
    if not partial:
        return len(sent)
    # The text quotes each bad line, in order, and a line may hold anything, such words too:
    # so step over the very lines that were sent.
    count, start, at, strange = 0, 0, 0, 0
    while at >= 0:
        count += 1
        at += len(_UNPARSABLE)
        for index in range(start, len(sent) if strange < _STRANGE_QUOTES else start):
            if reason.startswith(sent[index] + "': ", at):
                at += len(sent[index])
                start = index + 1
                break
        else:
            strange += 1
        at = reason.find("\n" + _UNPARSABLE, at) + 1 or -1
    return min(count, len(sent))


def retry_after(value: str | None, clock: Callable[[], float] = time.time) -> float | None:
    """Seconds of a ``Retry-After`` header: a number, or the time of an HTTP date from now."""
    if value is None:
        return None
    try:
        return float(max(0, min(int(value), _LONGEST_WISH)))
    except ValueError:
        pass
    try:
        seconds = parsedate_to_datetime(value).timestamp() - clock()
        return float(max(0, min(seconds, _LONGEST_WISH)))
    except (ValueError, TypeError, OverflowError):
        return None


def why(error: BaseException, files: Mapping[str, str | None]) -> tuple[str, str, str]:
    """Cause, what happened, and what to do, from the chain of exceptions behind ``error``.

    ``files`` are those that TLS needs here, by their options.
    """
    chain = list(_chain(error))
    names = {type(each).__name__ for each in chain}
    for each in chain:
        if isinstance(each, socket.gaierror):
            return "dns", "the host's name is unknown", "correct 'host'"
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                "tls",
                f"the certificate is not trusted: {each.verify_message}",
                "set 'ca_file' to the certificate of who signed it",
            )
        # urllib3 before 2.0 compares the names by itself.
        if type(each).__name__ == "CertificateError":
            return "tls", f"the certificate is not trusted: {each}", "correct 'host'"
        if isinstance(each, TooSlowError):
            return "timeout", str(each), "is the server overloaded, or 'http_timeout' too short?"
    for option, file in files.items():
        if file and not os.access(file, os.R_OK):
            return "tls", f"{option} {file!r} cannot be read", "expected a file of PEM certificates"
    for each in chain:
        if isinstance(each, ssl.SSLError):
            said = each.reason or type(each).__name__
            return "tls", f"no TLS connection: {said}", _mend_tls(said, files)
        if type(each).__name__ == "SSLError" and "encrypted" in str(each):  # urllib3's own
            return "tls", "client_key has a passphrase", "expected a file of a key without one"
        if isinstance(each, zlib.error):
            return (
                "connection",
                f"the answer cannot be unpacked: {each}",
                "is a proxy in between that packs by itself?",
            )
    if any(isinstance(each, TimeoutError) for each in chain) or names & {
        "ConnectTimeout",
        "ReadTimeout",
        "ReadTimeoutError",
        "ConnectTimeoutError",
    }:
        return "timeout", "", "is the server overloaded, or 'http_timeout' too short?"
    if "ProxyError" in names:
        return "connection", "the proxy failed", "correct HTTP_PROXY, HTTPS_PROXY or NO_PROXY"
    for each in chain:
        number = (isinstance(each, OSError) and each.errno) or 0
        if number in errno.errorcode:
            return (
                errno.errorcode[number],
                os.strerror(number).lower(),
                "is the server running, and are 'host' and 'http_port' right?",
            )
    # urllib3 before 2.0 tries a call that raises TypeError first, and then goes on from there.
    last = [each for each in chain if not isinstance(each, TypeError)][-1]
    return (
        "connection",
        f"the connection failed: {type(last).__name__}",
        "is this InfluxDB's HTTP port, and is 'secure' right?",
    )


def _mend_tls(said: str, files: Mapping[str, str | None]) -> str:
    certificate = files.get("client_certificate")
    if "KEY_VALUES_MISMATCH" in said:
        return "'client_key' is not the key of 'client_certificate'"
    if "ALERT" in said and certificate:
        return "does the server trust 'client_certificate'?"
    if "ALERT" in said:
        return "does the server want a 'client_certificate' and 'client_key'?"
    if certificate:
        return "are 'client_certificate', 'client_key' and 'ca_file' PEM files, of such kinds?"
    return "does this port speak HTTPS, and is 'ca_file' a file of PEM certificates?"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and all that it was made of: causes, contexts, arguments."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = (each.__cause__, each.__context__, getattr(each, "reason", None), *each.args)
        waiting += [found for found in inner if isinstance(found, BaseException)]
