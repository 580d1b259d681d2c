"""The header by which a server knows us, and where its secret comes from.

That is the option itself, a file, or the environment. No error names the file or the variable:
whoever wrote the secret itself in their place would read it in the log. And none is raised where a
secret is at hand, for there are tools that show what each function held.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from typing import TYPE_CHECKING
from urllib.parse import quote

from celery_influx.errors import SendError
from celery_influx.transports.servers import SERVERS

if TYPE_CHECKING:
    import requests

    from celery_influx.options import DatabaseOptions

_LONGEST = 65_536
#: Secrets that are remembered, to be masked: the server may still speak of the last one.
_REMEMBERED = 16


class _Fault(str):
    """Why there is no secret."""

    __slots__ = ()


class Credentials:
    """Puts the credentials into requests. With none it still keeps requests from .netrc.

    Args:
        options: What they are, or where.
        address: For errors.

    Attributes:
        kind: ``token``, ``basic`` or ``none``.
    """

    def __init__(self, options: DatabaseOptions, address: str) -> None:
        self._options = options
        self._address = address
        self._header = ""  # as http.client writes it: its bytes as latin-1
        self._masked: tuple[str, ...] = ()
        self.kind = "basic" if options.username else "none"
        if options.token or options.token_file or options.token_env:
            self.kind = "token"

    def renew(self, header: str) -> bool:
        """Read the secret again; whether there is another one now than what ``header`` held.

        Raises:
            SendError: As ``read``.
        """
        self.read()
        return self._header != header

    def read(self) -> None:
        """Read the secret where it is now.

        Raises:
            SendError: It is not there. The ``cause`` is ``"secret"``.
        """
        made = self._make()
        if isinstance(made, _Fault):
            raise SendError(
                f"{self._address}: {made} (secret); expected a secret as the server knows it, "
                "that this process may read",
                "secret",
            )
        self._header = made.encode().decode("latin-1")

    def _make(self) -> str:
        """The header, or why there is none."""
        if self.kind == "none":
            return ""
        if self.kind == "token":
            token = _secret(self._options, "token")
            if isinstance(token, _Fault):
                return token
            if not token.isprintable():
                return _Fault("the token holds a newline or another control character")
            self._mask(token)
            return f"{SERVERS[self._options.api].scheme} {token}"
        password = _secret(self._options, "password")
        if isinstance(password, _Fault):
            return password
        pair = b64encode(f"{self._options.username}:{password}".encode()).decode()
        self._mask(password, pair)
        return f"Basic {pair}"

    def _mask(self, *secrets: str) -> None:
        """Have them masked from now on, the long ones first: a short one may be a part of them."""
        found = {form for secret in secrets for form in _forms(secret) if secret}
        kept = [*found, *(each for each in self._masked if each not in found)][:_REMEMBERED]
        self._masked = tuple(sorted(kept, key=len, reverse=True))

    def clean(self, words: str) -> str:
        """``words`` of somebody else, for people: without secrets and control characters."""
        for secret in self._masked:
            words = words.replace(secret, "***")
        if words.isprintable():
            return words
        return "".join(
            each if each.isprintable() or each == "\n" else f"\\x{ord(each):02x}" for each in words
        )

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """What requests calls before it sends one."""
        if self._header:
            request.headers["Authorization"] = self._header
        return request

    def __repr__(self) -> str:
        return f"<Credentials {self.kind}>"


def _forms(secret: str) -> tuple[str, ...]:
    """How it may stand in URLs and in JSON, too."""
    escaped = (json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return secret, quote(secret), quote(secret, safe=""), *escaped


def _secret(options: DatabaseOptions, name: str) -> str:
    """The secret, or why there is none."""
    file, variable = (getattr(options, f"{name}_{place}") for place in ("file", "env"))
    if file:
        found = _read(file)
        fault = f"the file that '{name}_file' names {found}"
        return _Fault(fault) if isinstance(found, _Fault) else found
    if variable:
        fault = f"the environment variable that '{name}_env' names is not set, or empty"
        return os.environ.get(variable) or _Fault(fault)
    return getattr(options, name) or ""


def _read(path: str) -> str:
    """What the file holds, without the newline at its end; or why that is no secret."""
    content = b""
    try:
        # A pipe that nobody writes to is empty, and no reason to wait for ever.
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while len(content) <= _LONGEST and (piece := os.read(number, _LONGEST)):
                content += piece
        finally:
            os.close(number)
        text = content.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        return _Fault(f"cannot be read: {(error.strerror or type(error).__name__).lower()}")
    except ValueError:
        return _Fault("holds no UTF-8 text")
    if len(content) > _LONGEST:
        return _Fault(f"is longer than {_LONGEST:,} bytes")
    return text or _Fault("is empty")
