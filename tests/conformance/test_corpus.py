"""influxdata/line-protocol-corpus against influxd 1.6.7, decode and encode.

The corpus holds the answers of InfluxDB 2's reference codec, which is stricter than influxd 1.x
(no control characters, no stray quotes) and in places laxer. corpus.json is a part of
https://github.com/influxdata/line-protocol-corpus (MIT licence, in the file) at commit
aa28ccfb893707f6d631a9f46ba40f50015e86f6. Where it and influxd differ, influxd wins.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests

from celery_influx.errors import PointError
from celery_influx.line_reader import parse
from celery_influx.point import Point
from tests.conformance.encoders import both_encode
from tests.conformance.hostile import REFUSALS
from tests.conformance.reading import exactly
from tests.servers import Influxd

pytestmark = pytest.mark.once

encode = both_encode()
CORPUS: dict[str, Any] = json.loads(Path(__file__).with_name("corpus.json").read_text("utf-8"))


def given(point: dict[str, Any]) -> Point | None:
    """A point of the corpus; None where a field has a type that 1.x has not.

    The reference codec leaves out empty tags, too, though not in what it is given.
    """

    def text(latin: str) -> str:
        return latin.encode("latin-1").decode()

    try:
        return Point(
            text(point["name"]),
            {
                text(key): text(value) if kind == "string" else _number(kind, value)
                for key, kind, value in point["fields"]
            },
            {text(key): text(value) for key, value in point["tags"] if value} or None,
            point["time"],
        )
    except LookupError:
        return None


def _number(kind: str, value: Any) -> Any:
    return {"float": float, "int": int, "bool": bool}[kind](value)


# Which of the 1,095 lines influxd stores and the corpus reads, and what sets them apart.
_ONLY_CORPUS, _ONLY_INFLUXD = "only the corpus; influxd: ", "only influxd; the corpus: "
AGREEMENT = {
    "neither": 695,
    "both": 366,
    "both, but the corpus has no -0": 2,
    # Unsigned integers, which 1.x has not; a tag "time"; CRLF.
    f"{_ONLY_CORPUS}unable to parse invalid number": 16,
    f"{_ONLY_CORPUS}partial write: invalid tag key: input tag on measurement is invalid dropped=1": 2,
    f"{_ONLY_CORPUS}unable to parse invalid boolean": 2,
    f"{_ONLY_CORPUS}unable to parse missing fields": 2,
    # Control characters, bytes that are not UTF-8, a tab before the name.
    f"{_ONLY_INFLUXD}invalid character  found at start of measurement name": 3,
    f"{_ONLY_INFLUXD}invalid utf-8 sequence in token ": 3,
    f"{_ONLY_INFLUXD}expected tag key or field but found  instead": 2,
    f"{_ONLY_INFLUXD}want  after field key , found ": 1,
    f"{_ONLY_INFLUXD}expected  after tag key , but got  instead": 1,
}


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_influxd_and_decode_agree_on_each_line(influxd: Influxd, database: str, step: int) -> None:
    session = requests.Session()
    counts: Counter[str] = Counter()
    for number, case in enumerate(CORPUS["decode"][::step]):
        line = case["line"].encode("latin-1")
        points, reasons = parse(line)
        name = database
        fresh = any(not reason.startswith("unable to parse") for reason in reasons) or points
        if fresh:
            name = f"corpus{number}"  # where no field has a type yet
            influxd.query(f'CREATE DATABASE "{name}"')

        answer = session.post(
            f"{influxd.http_url}/write", params={"db": name}, data=line, timeout=10
        )

        if fresh:
            influxd.query(f'DROP DATABASE "{name}"')
        error = answer.json()["error"] if answer.content else ""
        assert bool(reasons) == bool(error), line
        # In a new shard a conflict of types hides what would be said else.
        if reasons and not error.startswith(("engine", "field type")):
            assert any(reason in error for reason in reasons), line
        counts[_class(case, points, error)] += 1

    if step == 1:
        assert counts == AGREEMENT
    assert counts.keys() <= AGREEMENT.keys()


def _class(case: dict[str, Any], points: list[Point], error: str) -> str:
    """Who takes the line; and where only one of them does, why the other does not."""
    expected = case["points"]
    if expected is None:
        reason = re.sub(r".* at line \d+:\d+: |'[^']*'|\"[^\"]*\"", "", case.get("error", ""))
        return "neither" if error else f"only influxd; the corpus: {reason}"
    if error:
        reason = re.sub(r"'[^']*': |\"[^\"]*\" |\n.*", "", error)
        return f"only the corpus; influxd: {reason}"
    same = len(points) == len(expected) and all(
        theirs is not None
        and exactly(ours._replace(timestamp=0)) == exactly(theirs._replace(timestamp=0))
        and ours.timestamp in (None, theirs.timestamp)
        for ours, theirs in zip(points, map(given, expected), strict=True)
    )
    return "both" if same else "both, but the corpus has no -0"


def all_points() -> list[Point]:
    """Each point of the corpus once."""
    cases = [point for case in CORPUS["decode"] for point in case["points"] or []]
    cases += [case["point"] for case in CORPUS["encode"]]
    return list({exactly(p): p for case in cases if (p := given(case)) is not None}.values())


def test_no_point_of_the_corpus_that_influxd_stores_is_refused(
    influxd: Influxd, database: str
) -> None:
    points = all_points()
    refused = []
    for number, point in enumerate(points):
        one = point._replace(measurement=f"{point.measurement}~{number}")
        try:
            line = encode(one)
        except PointError:
            refused.append(point)
            continue
        assert influxd.write(line, database) == (204, "")
        assert exactly(parse(line)[0][0]) == exactly(one)

    # influxd drops points with a tag "time", too.
    assert [sorted(point.tags or {}) for point in refused] == [["tag0", "time"]] * 2
    told = " ".join(REFUSALS.read_text("utf-8").split())
    said = f"Of the {len(points)} points of the public line-protocol-corpus {len(refused)} are"
    assert (len(points), said in told) == (366, True)


#: The corpus refuses one of its points itself.
ENCODED = [case for case in CORPUS["encode"] if case["line"] is not None]


@pytest.mark.parametrize("case", ENCODED, ids=lambda case: case["point"]["name"])
def test_what_the_corpus_encodes_is_the_same_point_here(case: dict[str, Any]) -> None:
    point = given(case["point"])
    assert point is not None

    assert exactly(parse(encode(point))[0][0]) == exactly(point)
