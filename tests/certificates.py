"""Certificates for tests: an authority's, a server's and a client's, and a stranger's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers import find

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
_EXTENSIONS = (
    "basicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1\n"
    "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
)


def make(folder: Path) -> Path:
    """Write ca.pem; server.pem for 127.0.0.1, and client.pem, which it signed; and stranger.pem,
    which it did not; and the key of each."""
    (folder / "extensions").write_text(_EXTENSIONS)
    for name in ("ca", "stranger"):
        _openssl(
            folder, "req", "-x509", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-days", "2", "-subj", f"/CN=test {name}", "-addext", "keyUsage=critical,keyCertSign",
        )  # fmt: skip
    for name in ("server", "client"):
        _openssl(
            folder, "req", "-new", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr",
            "-subj", "/CN=127.0.0.1",
        )  # fmt: skip
        _openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "extensions",
        )  # fmt: skip
    return folder


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [find("openssl"), *arguments], cwd=folder, check=True, capture_output=True, timeout=60
    )
