"""Write the reference's tables from the declarations in the code; with ``--check``, compare.

``--check`` writes nothing, and exits with 1 where a file is not what the code says.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from celery_influx.counters import COUNTERS
from celery_influx.measurements import MEASUREMENTS
from celery_influx.options import DatabaseOptions, Options, expectation

REFERENCE = Path(__file__).parent / "reference"


def row(*cells: object) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"


def options() -> Iterator[str]:
    """docs/reference/options.md."""
    yield from ("# Options", "", "All are Celery configuration; a wrong one is named at the start.")
    for title, cls, prefix in (
        ("Settings", Options, "influx_"),
        ("Options of one database, in `influx_databases`", DatabaseOptions, ""),
    ):
        yield from ("", f"## {title}", "", row("name", "default", "takes", "meaning"))
        yield row("---", "---", "---", "---")
        for field in dataclasses.fields(cls):
            if field.metadata:
                default = {} if field.default is dataclasses.MISSING else field.default
                takes = expectation(field).replace("'", "`")
                yield row(f"`{prefix}{field.name}`", f"`{default!r}`", takes, field.metadata["doc"])


def ex_flux() -> Iterator[str]:
    """docs/reference/ex_flux.md."""
    yield from (
        "# ex_flux compared",
        "",
        "ex_flux is the Elixir library whose model this one follows. Every option of ex_flux 0.2.0",
        "and its counterpart here.",
    )
    yield from ("", row("ex_flux", "its default", "ours", "our default", "why where they differ"))
    yield row("---", "---", "---", "---", "---")
    for field in dataclasses.fields(DatabaseOptions):
        if field.metadata.get("ex_flux"):
            theirs, default, why = (part.strip() for part in field.metadata["ex_flux"].split("|"))
            yield row(theirs, default, f"`{field.name}`", f"`{field.default!r}`", why)
    yield from (
        row("`pool_overflow`", "0", "(none)", "", "A socket is not borrowed, so none is missing."),
        row("`udp_conn_opts`", "binary, passive", "(none)", "", "Connected, non-blocking sockets."),
        row("`json_encoder`", "Poison", "(none)", "", "Python has one."),
        row("`otp_app`", "(required)", "(none)", "", "Celery's configuration is the place."),
    )
    yield from ("", row("ex_flux", "ours", "difference"), row("---", "---", "---"))
    yield from (
        row("`push(point)`", "`send_data(point)`", "Encoded and stamped at the call; counted."),
        row("`ping()`", "`ping()`", "Gives version and round trip, or raises with the reason."),
        row("`query(q)`", "`query(q, params=…)`", "Read-only; an error inside a 200 raises."),
        row("`post(q)`", "`post(q, params=…)`", "As a task only with `influx_allow_post`."),
    )


def measurements() -> Iterator[str]:
    """docs/reference/measurements.md."""
    yield from ("# Measurements", "", "What is written. Durations are seconds.")
    for measurement in MEASUREMENTS:
        yield from ("", f"## `{measurement.name}`", "", f"Written {measurement.when}.", "")
        yield from (row("name", "type", "unit", "meaning"), row("---", "---", "---", "---"))
        for name, kind, unit, doc in measurement.columns:
            yield row(f"`{name}`", kind, unit, doc)


def counters() -> Iterator[str]:
    """docs/reference/counters.md."""
    yield from (
        "# Counters",
        "",
        "`app.influx.stats()` and `celery inspect stats` give them per database, for all processes",
        "of a worker together. At rest",
        "`points + adopted = sent + dropped + lost + rejected + queued`.",
        "",
        row("name", "counts"),
        row("---", "---"),
    )
    for name, doc in COUNTERS.items():
        yield row(f"`{name}`", doc)
    yield row("`queued`", "what is still on its way: made, and not yet any of the above")
    yield from (
        "",
        "Each of the `errors` is of one of four classes, `errors_…`, by what has to be done; over",
        "UDP, and where we ourselves fail, of none. The cause, such as `ECONNREFUSED` or 503, is",
        "in the log, where each has a line of its own, once a minute, with the server's own words.",
    )


PAGES = {
    "options.md": options,
    "ex_flux.md": ex_flux,
    "measurements.md": measurements,
    "counters.md": counters,
}


def main() -> int:
    """Write or check every page."""
    stale = []
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        path = REFERENCE / name
        text = "\n".join(["<!-- Made by docs/tables.py from the code. -->", *page(), ""])
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        print("not what the code says:", *stale, "\nto mend it: python docs/tables.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
