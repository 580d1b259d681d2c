"""InfluxDB's HTTP API: write, ping, query, post. One attempt each, by requests.

Redirects are not followed, credentials travel in a header only, and no answer takes more time or
memory than the options allow. Rules: https://docs.influxdata.com/influxdb/v1/tools/api/; where
influxd 1.6.7 says more than its documentation, the comments here do.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import ipaddress
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from celery_influx.errors import QueryError, SendError, shorten
from celery_influx.queries import (
    EPOCHS,
    QueryResult,
    count_statements,
    limited,
    parse_json,
    require_read_only,
    require_rows,
    require_text,
)
from celery_influx.transports import bounded, in_url
from celery_influx.transports import load as load_module
from celery_influx.transports.answers import Answer, lines, retry_after, why
from celery_influx.transports.credentials import Credentials
from celery_influx.transports.servers import SERVERS, Question

if TYPE_CHECKING:
    import requests
    from typing_extensions import Self

    from celery_influx.options import DatabaseOptions

logger = logging.getLogger(__name__)

_LONGEST_GET = 8_000
_LONGEST_TIMEOUT = 10**6
_MEND = {
    "401": "set 'username' and 'password', or 'token', to what the server knows",
    "403": "give the user the right to do this",
    "404": "create the database, or correct 'database' and 'http_port'",
    "413": "lower 'batch_bytes' below the server's max-body-size",
    "5xx": "the log of the server, or of a proxy in front of it, says more",
    "other": "is this InfluxDB's HTTP API, and are 'api', 'database' and 'http_port' right?",
}


def load() -> None:
    """Import requests now: 86 ms of CPU that a worker spends before it starts its threads."""
    load_module("requests")


class Ping(NamedTuple):
    """A server's answer to a ping.

    Attributes:
        version: As the server names it; VictoriaMetrics does not.
        seconds: The round trip.
    """

    version: str | None
    seconds: float


class HTTPClient:
    """One database over HTTP. Opens nothing until the first request.

    ``ping``, ``query`` and ``post`` may be called by several threads at once, beside the one that
    writes. Connections are kept open and reused, up to ten of them. Proxies come from the
    environment (``HTTPS_PROXY``, ``NO_PROXY``) except for loopback addresses, which never go
    through one; ``.netrc`` is not read.

    Args:
        options: Where the database is, and the credentials.
        clock: Seconds for timing a ping and for limiting how long an error's text is read.

    Attributes:
        rejection: The server's words on the lines that the last ``write`` says were rejected.
    """

    confirms = True

    def __init__(
        self, options: DatabaseOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rejection: str | None = None
        self._options = options
        self._clock = clock
        scheme = "https" if options.secure else "http"
        self._root = f"{scheme}://{in_url(options.host)}:{options.http_port}"
        self._database = options.database or options.name
        self._server = server = SERVERS[options.api]
        self._write_params = {
            server.database: self._database,
            "precision": server.precision[options.precision],
        }
        if options.retention_policy and server.retention_policy:
            self._write_params[server.retention_policy] = options.retention_policy
        elif options.retention_policy:
            self._write_params[server.database] += f"/{options.retention_policy}"
        if options.organization and server.organization:
            self._write_params[server.organization] = options.organization
        self._credentials = Credentials(options, self.address)
        # The process that opened the session stands beside it: another must not use it.
        self._session: tuple[int, requests.Session] | None = None
        self._inherited: list[object] = []

    @property
    def max_bytes(self) -> int:
        """Longest payload."""
        return self._options.batch_bytes

    @property
    def burst(self) -> int:
        """Most payloads that one ``write`` takes."""
        return 1

    @property
    def address(self) -> str:
        """Where it sends, for people: no secret in it."""
        return f"{self._root}/{quote(self._database, safe='')}"

    def write(self, *payloads: bytes) -> int:
        """Send lines; the number of them that the server says it rejected, the rest being stored.

        ``rejection`` then holds the server's words, 500 characters of them at most. Of lines that
        it cannot read InfluxDB says nothing where others are refused for another reason, a field's
        type for instance: such are counted here.

        Raises:
            SendError: Nothing arrived, or nothing was stored. ``cause`` is the HTTP status, or
                ``"conflict"``: two types for one new field, where InfluxDB stores nothing at the
                first attempt and all but the conflicting points at the second; or one of
                ``"timeout"``, ``"dns"``, ``"tls"``, ``"secret"``, ``"connection"``, or an errno's
                name.
        """
        self.rejection = None
        payload = b"\n".join(payloads)
        body, headers = payload, None
        if self._options.gzip:
            # At the quickest level.
            body, headers = gzip.compress(payload, 1, mtime=0), {"Content-Encoding": "gzip"}
        with self._request(
            "POST", self._server.write, params=self._write_params, data=body, headers=headers
        ) as answer:
            if answer.status == 204:
                answer.finish()
                return 0
            # An error quotes every bad line, so it may be as long as the payload, and more in
            # JSON's escapes.
            words = answer.words(limit=65_536 + 6 * len(payload))
            if answer.status == 400:
                rejected = self._server.rejected(words, answer.said, payload)
                if rejected:
                    self.rejection = self._clean(words)
                    return rejected
                if words.startswith("field type conflict"):
                    raise SendError(
                        f"{self.address}: {self._clean(words)}; expected one type for each field "
                        "of a measurement",
                        "conflict",
                    )
            raise self._refused(answer, words, "204")

    def ping(self, timeout: float | None = None) -> Ping:
        """Ask whether the server is up. InfluxDB 1.x and 2.x do not look at credentials then.

        Args:
            timeout: Longest wait for a connection, and again for an answer, in seconds; default:
                ``http_timeout``.

        Raises:
            SendError: It is not up, and why.
            QueryError: ``timeout`` is not greater than 0.
        """
        started = self._clock()
        with self._request("GET", "/ping", timeout=timeout) as answer:
            seconds = self._clock() - started
            if answer.status != self._server.alive:
                raise self._refused(answer, answer.words(), str(self._server.alive))
            answer.finish()
            return Ping(answer.header("X-Influxdb-Version"), seconds)

    def query(
        self,
        statement: str,
        *,
        params: Mapping[str, Any] | None = None,
        database: str | None = None,
        retention_policy: str | None = None,
        epoch: str | None = None,
        chunked: bool | int = False,
        timeout: float | None = None,
    ) -> QueryResult:
        """Run statements that only read.

        An answer may have ``query_rows`` rows and ``query_bytes`` bytes. It is read no further
        than to its first byte beyond.

        Args:
            statement: InfluxQL; several statements are parted by ``;``. With the ``api``
                ``victoria`` or ``victoria-cluster`` one expression of PromQL, as of now: each
                metric of its answer is a series whose tags are the labels, with the columns
                ``time`` and ``value``. InfluxDB 3.x gives a series for each measurement, in which
                ``GROUP BY`` tags are columns.
            params: Values for ``$name`` in the statement: strings, numbers and booleans, and
                ``{"duration": "1h"}``, ``{"identifier": "name"}``, ``{"regex": ".*"}``. Never
                format values into the statement. Not for PromQL.
            database: Default: the option ``database``. Not for PromQL, which asks all of them.
            retention_policy: Default: the option of that name. Not for PromQL.
            epoch: Unit of the times in the answer: ns, u, ms, s, m or h. Default: the option.
            chunked: Let the server send the answer in pieces, which its ``max-row-limit`` does
                not cut: True for pieces of 10,000 rows, or the number of rows. InfluxDB 3.x cuts
                nothing. Not for PromQL.
            timeout: Longest wait, in seconds, for a connection, and for each piece of the answer,
                of which all may take ten times as long. Default: ``http_timeout``.

        Raises:
            QueryError: A statement may write, or cannot be read for sure: nothing was sent; or
                the server refused it, a value in ``params`` cannot be bound, or an argument was
                given that PromQL does not know; or the answer is longer than ``query_rows`` and
                ``query_bytes`` allow.
            SendError: The server did not answer.
        """
        question = self._question(statement, params, database, retention_policy, epoch)
        question = question._replace(chunked=chunked)
        fields = self._server.fields(question, self._options)
        if not self._server.unchangeable:
            require_read_only(statement)
            question = question._replace(statements=count_statements(statement))
        # Proxies and servers refuse long request lines; what only reads may go by POST as well.
        length = sum(len(quote(value)) for value in fields.values())
        method = "GET" if length < _LONGEST_GET else "POST"
        return self._ask(method, fields, timeout, question)

    def post(
        self,
        statement: str,
        *,
        params: Mapping[str, Any] | None = None,
        database: str | None = None,
        retention_policy: str | None = None,
        epoch: str | None = None,
        timeout: float | None = None,
    ) -> QueryResult:
        """Run any statements, also such as change or delete data. Arguments as for ``query``.

        Raises:
            QueryError: The server refused one of them; those before it were carried out. Or all
                were, and the answer is too long.
            SendError: The server did not answer; the statements may have been carried out.
        """
        if self._server.unchangeable:
            raise QueryError(f"post: {self._server.unchangeable}")
        question = self._question(statement, params, database, retention_policy, epoch)
        return self._ask("POST", self._server.fields(question, self._options), timeout, question)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connections without closing them."""
        # Kept: its finalisers would close file numbers that may be others' by now.
        session, self._session = self._session, None
        self._inherited.append(session)

    def close(self) -> None:
        """Close the connections. Idempotent; the next request opens new ones."""
        session, self._session = self._session, None
        if session and session[0] == os.getpid():
            session[1].close()
        elif session:
            self._inherited.append(session)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        session = self._session
        opened = bool(session and session[0] == os.getpid())
        return f"<HTTPClient {self.address} auth={self._credentials.kind} open={opened}>"

    # -- requests --------------------------------------------------------------------------------

    def _question(
        self,
        statement: str,
        params: Mapping[str, Any] | None,
        database: str | None,
        retention_policy: str | None,
        epoch: str | None,
    ) -> Question:
        epoch = self._options.epoch if epoch is None else epoch
        require_text("statement", statement)
        require_text("database", self._database if database is None else database)
        if epoch not in EPOCHS:
            raise QueryError(f"epoch: expected one of {', '.join(EPOCHS)}; got {epoch!r}")
        require_text("retention_policy", retention_policy or self._options.retention_policy or "")
        return Question(statement, epoch, params, database, retention_policy)

    def _ask(
        self, method: str, fields: dict[str, str], timeout: float | None, question: Question
    ) -> QueryResult:
        sent: dict[str, Any] = {"params": fields} if method == "GET" else self._server.body(fields)
        with self._request(method, self._server.query, timeout=timeout, **sent) as answer:
            if answer.status != 200:
                words = answer.words()
                if answer.status in (400, 422) and answer.is_its_own:
                    raise QueryError(f"the server answered: {self._clean(words)}")
                raise QueryError(str(self._refused(answer, words, "200")))
            documents = []
            text = ""
            pieces = limited(answer.pieces(), self._options.query_rows, self._options.query_bytes)
            try:
                for text in lines(pieces) if "chunked" in fields else _whole(pieces):
                    documents.append(parse_json(text))
            except (ValueError, RecursionError):
                documents = []
            if not documents:
                kind = answer.header("Content-Type") or "no content type"
                raise QueryError(
                    f"{self.address}: expected JSON, got {self._clean(kind)}: "
                    f"{self._clean(text)!r}; is this InfluxDB's HTTP API?"
                )
        try:
            result = self._server.answer(documents, question)
            require_rows(result, self._options.query_rows)
            return result
        except QueryError as error:
            failure = QueryError(self._credentials.clean(str(error)))
        raise failure

    def _request(
        self,
        method: str,
        path: str,
        *,
        timeout: float | None = None,
        params: dict[str, str] | None = None,
        data: bytes | dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        seconds = self._options.http_timeout if timeout is None else timeout
        if not isinstance(seconds, (int, float)) or not seconds > 0:
            raise QueryError(f"timeout: expected seconds greater than 0, got {seconds!r:.80}")
        seconds = min(seconds, _LONGEST_TIMEOUT)  # who asks for ever would get an OverflowError
        attempt = functools.partial(
            self._attempt, method, path, seconds, params=params, data=data, headers=headers
        )
        answer = attempt()
        with contextlib.ExitStack() as stack:
            stack.push(answer)
            if answer.status != 401 or not self._credentials.renew(answer.credentials):
                stack.pop_all()
                return answer
        return attempt()  # by the new secret: what was refused was not carried out

    def _attempt(self, method: str, path: str, seconds: float, **request: Any) -> Answer:
        requests = load_module("requests")
        options = self._options
        certificate = options.client_certificate
        try:
            response = self._opened().request(
                method,
                self._root + path.format(tenant=self._options.tenant),
                timeout=seconds,
                # Given here, and not to the session: REQUESTS_CA_BUNDLE would win over that.
                verify=not options.insecure and (options.ca_file or True),
                cert=certificate and (certificate, options.client_key or certificate),
                allow_redirects=False,
                stream=True,
                **request,
            )
            return Answer(response, self._failure, seconds, self._clock)
        except (requests.RequestException, OSError, ValueError) as error:
            failure = self._failure(error, seconds)
        # Raised out here, or the error of requests, which holds the URL, would hang on to it.
        raise failure

    def _opened(self) -> requests.Session:
        """This process's session. Two threads may make one each at first: the later one stays."""
        opened = self._session
        if opened and opened[0] == os.getpid():
            return opened[1]
        self.abandon()
        self._credentials.read()
        library = load_module("requests")
        session: requests.Session = library.Session()
        from http.cookiejar import DefaultCookiePolicy  # requests has imported it

        session.auth = self._credentials
        session.headers["User-Agent"] = "celery_influx"
        session.headers["Accept-Encoding"] = "gzip"  # what `Answer` unpacks
        session.trust_env = not _loopback(self._options.host)
        # Cookies would be the one thing that answers change in a session shared by threads.
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # Even where a redirect is not followed, requests reads its body, be it endless.
        session.get_redirect_target = lambda _: None  # type: ignore[assignment]
        for scheme in ("http://", "https://"):
            session.mount(scheme, bounded.adapter(library.adapters.HTTPAdapter))
        if self._options.secure and self._options.insecure:
            self._be_insecure()
        self._session = (os.getpid(), session)
        return session

    def _be_insecure(self) -> None:
        """Say so once, and not at every request, as urllib3 would."""
        warnings.filterwarnings(
            "ignore", rf"Unverified HTTPS request .* host '\[?{re.escape(self._options.host)}\]?'"
        )
        _warn_insecure(self.address, os.getpid())

    # -- what went wrong -------------------------------------------------------------------------

    def _failure(self, error: BaseException, seconds: float) -> SendError:
        """``error`` in our words: those of requests hold URLs, and proxies' passwords."""
        files = ("ca_file", "client_certificate", "client_key") if self._options.secure else ()
        cause, happened, mend = why(error, {file: getattr(self._options, file) for file in files})
        happened = happened or f"no answer within {seconds:g} s"
        return SendError(f"{self.address}: {happened} ({cause}); {mend}", cause)

    def _refused(self, answer: Answer, words: str, expected: str) -> SendError:
        status = str(answer.status)
        said = f": {self._clean(words)}" if words else ""
        mend = _MEND.get(status) or _MEND["5xx" if status[0] == "5" else "other"]
        if answer.status // 100 == 3:
            target = self._clean(_place(answer.header("Location") or "nowhere"))
            said, mend = f", which points to {target}", "redirects are not followed: set that URL"
        text = f"{self.address}: expected {expected}, got {status}{said}; {mend}"
        return SendError(text, status, retry_after(answer.header("Retry-After")))

    def _clean(self, words: str) -> str:
        """Words of the server for a log: shortened, and without our own secrets in them."""
        return shorten(self._credentials.clean(words))


@functools.cache
def _warn_insecure(address: str, _process: int) -> None:
    logger.warning(
        "%s: any certificate is trusted ('insecure'): who stands in between reads and changes all "
        "that is sent, the password too; set 'ca_file' instead",
        address,
    )


def _whole(pieces: Iterable[bytes]) -> list[str]:
    return [b"".join(pieces).decode("utf-8", "replace")]


def _place(url: str) -> str:
    """A URL without the parts of it in which others put their secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "no URL"
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def _loopback(host: str) -> bool:
    """Whether ``host`` is this machine, by its name or address alone."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
