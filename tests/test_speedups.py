"""The extension: the same as the Python it stands in for, whatever it is given; and it holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import itertools
import operator
import os
import shlex
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from celery_influx import line_protocol
from celery_influx.field_types import FieldTypes, TypeTable
from celery_influx.line_protocol import Encoder, make_encode
from celery_influx.line_reader import decode
from celery_influx.point import Point
from celery_influx.relay import handler_of
from celery_influx.task_points import point_of, run_line
from tests.integration.worker import resident_kib
from tests.no_memory import without_memory

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "celery_influx" / name for name in ("_speedups.c", "_shortest.cpp")]
if not (importlib.util.find_spec("celery_influx._speedups") or os.environ.get("CI")):
    pytest.skip(
        "the extension is not built; with a C and a C++ compiler: pip install -e .",
        allow_module_level=True,
    )

from celery_influx import _speedups  # noqa: E402 - as late as it may be
from tests.differential import SETTINGS, Pair, Wild, Word, differ, differ_in_floats  # noqa: E402

POINT = Point("cpu load", {"a": 1.25, "b": 3, "c": 'x"y', "d": True}, {"host": "h,1"}, 17)


def test_the_switch_and_the_name_of_what_encodes(tmp_path: Path) -> None:
    def said(**environment: str) -> str:
        code = "from celery_influx import line_protocol; print(line_protocol.implementation)"
        rest = {k: v for k, v in os.environ.items() if k != "CELERY_INFLUX_PURE"}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **rest, **environment},
            cwd=tmp_path,  # where no source of the package lies
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    assert said() == "c"
    assert said(CELERY_INFLUX_PURE="") == "c"
    assert said(CELERY_INFLUX_PURE="1") == "python"


def test_without_the_extension_python_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_protocol, "extension", None)

    assert type(Encoder().encode).__name__ == "function"
    assert Encoder().encode(POINT) == rb'cpu\ load,host=h\,1 a=1.25,b=3i,c="x\"y",d=true 17'


def refuse(point: object) -> bytes:
    """An encoder behind the extension that must not be asked."""
    raise AssertionError(point)


def test_ordinary_points_are_encoded_without_python() -> None:
    encode = _speedups.encoder({"w": "1"}, b",w=1", 1, None, None, refuse, refuse)

    assert encode(POINT) == rb'cpu\ load,w=1,host=h\,1 a=1.25,b=3i,c="x\"y",d=true 17'
    assert encode(Point("m", {"f": 1.0}, {"t": 2, "u": 2.5, "v": False, "x": None}, -1)) == (
        b"m,w=1,t=2,u=2.5,v=False f=1.0 -1"
    )
    assert encode(Point("é", {"ü": "日本 😀"})) == 'é,w=1 ü="日本 😀"'.encode()


def test_ordinary_points_whose_types_are_known_are_encoded_without_python() -> None:
    types: dict[str, dict[str, type]] = {"m": {"f": float, "i": int, "b": bool, "s": str}}
    rare: list[Point] = []
    encode = _speedups.encoder({}, b"", 1, None, None, rare.append, refuse, types)
    fields = {"f": 0.5, "i": 1, "b": True, "s": "x"}

    assert encode(Point("m", fields, None, 1)) == b'm f=0.5,i=1i,b=true,s="x" 1'
    assert encode(Point("m", {"f": 3, "i": 3}, None, 1)) == b"m f=3.0,i=3i 1"
    others = [Point("n", {"f": 0.5})]
    others += [Point("m", {"i": 1, name: 0.5}) for name in ("i", "b", "s", "new")]
    for point in others:
        assert encode(point) is None
    assert rare == others
    with pytest.raises(TypeError, match="expected types in a dict, or None"):
        _speedups.encoder({}, b"", 1, None, None, refuse, refuse, [])


@pytest.mark.parametrize("doubles", [False, True], ids=["points", "doubles"])
@pytest.mark.parametrize(
    "portions",
    [1, pytest.param(100, id="100", marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
def test_no_difference(doubles: bool, portions: int) -> None:
    with ProcessPoolExecutor(2) as pool:
        work = differ_in_floats if doubles else differ
        tried = sum(
            pool.map(work, [100_000 if portions > 1 else 5_000] * portions, range(portions))
        )
    print(f"{tried:,} tried")


def test_there_is_no_difference_where_the_types_that_are_known_were_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FieldTypes, "MOST", 3)
    pair = Pair(next(each for each in SETTINGS if each[2:] == (True, True)))
    for number in range(20):
        pair.check(Point("m", {"f": 1.5}, {"t": "v"}))
        for other in range(number % 5):
            pair.check(Point("m", {f"f{number}.{other}": True}))
        pair.check(Point("m", {"f": 7}, {"t": "v"}))


def test_a_name_that_no_line_can_have_takes_no_stamp_whatever_was_encoded_before() -> None:
    """Of ten million points one had asked Python's clock once more than C's."""
    pair = Pair(SETTINGS[1])
    pair.check(Point("m", {"a": 1}))
    pair.check(Point("m", {Word("a"): 1, "\ud800": 1}))


def test_a_name_is_written_for_what_it_names_whatever_it_named_before() -> None:
    """The same object each time: what is known of it for one use does not hold for another."""
    uses = [
        lambda name: Point(name, {"f": 1}, None, 1),
        lambda name: Point("m", {name: 1}, None, 1),
        lambda name: Point("m", {"f": name}, None, 1),
        lambda name: Point("m", {"f": 1}, {name: "x"}, 1),
        lambda name: Point("m", {"f": 1}, {"x": name}, 1),
    ]
    for setting in SETTINGS:
        for name in (
            "time",
            "_x",
            "a",
            "",
            "b c=d,",
            "é",
            'q"',
            "x" * 22,
            "x" * 23,
            "," * 11,
            "," * 12,
        ):
            for first, second in itertools.product(uses, repeat=2):
                pair = Pair(setting)
                for use in (first, second, first):
                    pair.check(use(name))


def test_an_encoder_keeps_short_names_only_and_few_and_not_for_ever() -> None:
    names = [f"name{number}" + "x" * length for length in (1, 30) for number in range(1_000)]

    def counts() -> list[int]:
        return [sys.getrefcount(name) for name in names]

    before = counts()
    encode = make_encode({}, 1, None, None, _speedups)
    for text in names:
        encode(Point("m", {text: 1}, {text: text}, 1))
    kept = list(map(operator.sub, counts(), before))
    assert 0 < sum(kept[:1_000]) <= 128
    assert kept[1_000:-1] == [0] * 999  # `text` is the last one
    del encode, text
    assert counts() == before


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        encode = _speedups.encoder(*arguments)
        return lambda point: encode(point).replace(b"0.1", b"0.10")

    monkeypatch.setattr("tests.differential._speedups", SimpleNamespace(encoder=broken))
    with pytest.raises(AssertionError, match="Python: "):
        differ(20_000, 1)


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
@pytest.mark.once
def test_under_the_sanitizers(count: int, tmp_path: Path) -> None:
    """Built anew with AddressSanitizer and UndefinedBehaviorSanitizer; any finding ends it."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
    flags += f" -fPIC -Wall -Wextra -Wno-unused-parameter -Wno-cast-function-type -I{sysconfig.get_path('include')}"
    built = tmp_path / "celery_influx"
    built.mkdir()
    objects = [str(tmp_path / f"{source.stem}.o") for source in SOURCES]
    extension = built / f"_speedups{sysconfig.get_config_var('EXT_SUFFIX')}"
    for source, target in zip(SOURCES, objects, strict=True):
        run([compiler, *shlex.split(flags), "-c", str(source), "-o", target])
    run([compiler, "-shared", *objects, "-o", str(extension), "-lstdc++", *shlex.split(flags)])
    for source in (ROOT / "celery_influx").iterdir():
        if source.suffix != ".so" and not (built / source.name).exists():
            (built / source.name).symlink_to(source)
    preload = [
        run([compiler, f"-print-file-name={name}"]).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *sys.path]),
        "LD_PRELOAD": " ".join(preload),
        "PYTHONMALLOC": "malloc",  # else Python's own allocator hides what is read past an end
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    }
    said = run(
        [sys.executable, "-m", "tests.differential", str(count), "7"], cwd=tmp_path, **environment
    )
    print(said)
    assert said.startswith(str(extension))
    said = run([sys.executable, "-m", "tests.test_ordinary_runs"], cwd=tmp_path, **environment)
    print(said)
    assert said.count("no difference") == 2


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """Run it to its end; what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "rounds", [10, pytest.param(20_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
@pytest.mark.once
def test_calls_leave_the_memory_as_it_was(rounds: int) -> None:
    """5,000 points in each round, of every kind; the long form makes 100 million calls."""
    wild = Wild(3)
    rest = [wild.anything() for _ in range(20)] if rounds < 100 else []  # seldom quick
    ordinary: list[Any] = []
    is_quick = _speedups.encoder({"host": "h"}, b",host=h", 1, lambda: 1, None, refuse, refuse)
    while len(ordinary) < 5_000 - len(rest):
        point = wild.ordinary()
        with contextlib.suppress(AssertionError):
            is_quick(point)
            ordinary.append(point)
    times = itertools.count()
    encode = make_encode({"host": "h"}, 1, times.__next__, lambda count: None, _speedups)

    def round_of_calls() -> None:
        for point in ordinary:
            encode(point)
        for point in rest:
            try:
                encode(point)
            except Exception:
                pass  # of which kind, other tests look at

    for _ in range(20):
        round_of_calls()
    before = resident_kib(os.getpid())
    for _ in range(rounds):
        round_of_calls()
    grown = (resident_kib(os.getpid()) - before) * 1024
    print(f"{rounds * 5_000:,} calls: {grown:,} bytes more")
    assert grown < 1_000_000


def test_the_clock_and_on_left_out_may_send_points_themselves_and_raise() -> None:
    seen: list[bytes] = []
    asked = 0

    def clock() -> int:
        nonlocal asked
        asked += 1
        if asked <= 3:
            seen.append(encode(Point("inner", {"f": 1.5})))
        return 5

    def leave_out(count: int) -> None:
        if count > 1:
            raise KeyError(count)

    encode = make_encode({}, 1, clock, leave_out, _speedups)
    assert encode(Point("outer", {"f": 2.5, "n": float("nan")})) == b"outer f=2.5 5"
    assert seen == [b"inner f=1.5 5"] * 3
    with pytest.raises(KeyError):
        encode(Point("outer", {"f": 2.5, "n": float("nan"), "i": float("inf")}))


def test_a_clock_is_asked_as_often_as_by_python() -> None:
    """Of a line that becomes too long, among others."""
    for fields in (
        {"a": None, "b": "x" * 40_000, "c": "y" * 40_000},
        {"b": "x" * 65_500},
        {"a": None, "b": 1.5},
        {"n": float("nan"), "b": 1.5},
    ):
        asked = []
        for speedups in (None, _speedups):
            times = iter(range(100))
            encode = make_encode({}, 1, lambda times=times: next(times), None, speedups)  # type: ignore[misc]
            try:
                made: object = encode(Point("m", fields))
            except Exception as error:
                made = str(error)
            asked.append((made, next(times)))
        assert asked[0] == asked[1]


@pytest.mark.parametrize(
    "first", [RuntimeError, True, 2**63], ids=["raises", "no time", "too late"]
)
def test_an_int_of_a_float_field_is_a_float_whatever_the_clock_gives(first: Any) -> None:
    """Python and the extension ask it again, as often."""
    made = []
    for speedups in (None, _speedups):
        clock = Mock(side_effect=[first, 7, 8])
        types = FieldTypes(TypeTable(), refuse, refuse)
        encode = make_encode({}, 1, clock, None, speedups, types)
        encode(Point("m", {"f": 1.5}, None, 1))
        made.append((encode(Point("m", {"f": 3})), clock.call_count))
    assert made == [(b"m f=3.0 8", 3)] * 2


def test_a_value_that_is_no_plain_one_runs_python_with_nothing_begun() -> None:
    """Its ``__str__`` changes the very dicts that are being encoded."""
    tags: dict[str, Any] = {"a": "1"}
    fields: dict[str, Any] = {"f": 1.5}

    class Changing:
        def __str__(self) -> str:
            tags.clear()
            fields.clear()
            return "changed"

    tags["b"] = Changing()
    tags["c"] = "3"
    assert Encoder().encode(Point("m", dict(fields), tags, 1)) == b"m,a=1,b=changed,c=3 f=1.5 1"


def test_the_line_of_a_run_is_the_same_and_reads_back() -> None:
    wild = Wild(5)

    def ns() -> int:
        return wild.below(10 ** (1 + wild.below(18)))

    for number in range(5_000):
        cpu, wait, age = (ns() if wild.below(4) else None for _ in range(3))
        facts = ("t", "q", "w"), wild.below(100), wait, age, None
        runtime, unit = ns(), 10 ** wild.below(10)
        lines = []
        for make in (run_line, _speedups.run_line):
            stamps = _speedups.Stamps(1, lambda number=number: number * 10**14)  # type: ignore[misc]
            lines.append(make("celery_task,é=ü\\ ,x=y ", facts, runtime, cpu, stamps, unit))
        assert lines[0] == lines[1]
        point = point_of(facts, "SUCCESS", None, runtime, cpu)
        assert decode(lines[0], unit).fields == point.fields


@pytest.mark.parametrize(
    ("place", "wrong", "error"),
    [
        (0, 5, TypeError), (0, "\ud800", UnicodeEncodeError), (1, ((),), TypeError), (2, -1, ValueError),
        (2, "1", ValueError), (3, 2**63, ValueError), (4, 5, TypeError), (5, "1", TypeError), (5, 0, ValueError),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(place: int, wrong: object, error: type[Exception]) -> None:
    arguments: list[Any] = ["m ", (("t", "q", "w"), 0, 1, 1, None), 1, 1, _speedups.Stamps(1), 1]
    assert _speedups.run_line(*arguments)
    arguments[place] = wrong

    with pytest.raises(error):
        _speedups.run_line(*arguments)
    with pytest.raises(TypeError):
        _speedups.run_line(*arguments[:5])


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python has no such str any more")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_str_of_an_old_extension_is_not_taken_for_an_empty_one() -> None:
    """Filled in after it was made, as extensions could once do: not yet in the form that is read."""
    make, text_of = ctypes.pythonapi.PyUnicode_FromUnicode, ctypes.pythonapi.PyUnicode_AsUnicode
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    text_of.restype, text_of.argtypes = ctypes.c_void_p, [ctypes.py_object]

    def old(text: str) -> Any:
        made = make(None, len(text))
        ctypes.memmove(text_of(made), ctypes.create_unicode_buffer(text), 4 * len(text))
        return made

    encode = make_encode({}, 1, None, None, _speedups)
    assert encode(Point("m", {"f": old("abc")}, None, 1)) == b'm f="abc" 1'
    assert encode(Point("m", {"f": 1}, {"t": old("abc")}, 1)) == b"m,t=abc f=1i 1"
    assert encode(Point(old("abc"), {old("f"): 1}, {old("t"): old("v")}, 1)) == b"abc,t=v f=1i 1"


class Way:
    """From points to a buffer of at most 5 lines, of which 3 are a batch."""

    def __init__(self) -> None:
        self.buffer = _speedups.Buffer(5, 10_000)
        self.cells = memoryview(bytearray(8)).cast("Q")
        self.rare: list[Point] = []
        self.called: list[int] = []
        encode = make_encode({}, 1, _speedups.Stamps(1), None, _speedups)
        self.send = _speedups.sender(
            encode, self.buffer, self.cells, 3, 10_000, self.rare.append, self.called.append
        )

    def put(self, count: int) -> None:
        for number in range(count):
            self.send(Point("m", {"f": number}))


def test_the_batcher_is_called_once_for_a_batch_and_again_after_it_has_taken() -> None:
    way = Way()

    way.put(2)
    assert way.called == []
    way.put(2)
    assert way.called == [0]
    assert len(way.buffer.take(10, 10_000)[0]) == 4
    way.put(2)
    assert way.called == [0]
    way.put(1)
    assert way.called == [0, 0]
    way.buffer.clear()
    way.put(3)
    assert way.called == [0, 0, 0]
    assert way.cells[0] == 10


def test_each_line_that_is_dropped_is_told_and_every_point_is_counted() -> None:
    way = Way()

    way.put(8)
    assert way.called == [0, 1, 1, 1]
    assert (len(way.buffer), way.buffer.dropped, way.cells[0]) == (5, 3, 8)


def test_what_is_rare_goes_the_python_way_uncounted() -> None:
    way = Way()
    rare = [Point("m", {"f": float("nan"), "g": 1}), Point("m", {}), Point("#", {"f": 1})]
    for point in rare:
        way.send(point)

    assert way.rare == rare
    assert (len(way.buffer), way.cells[0]) == (0, 0)


def test_a_call_that_fails_is_made_again() -> None:
    way = Way()
    failures = [KeyError("one")]

    def call(dropped: int) -> None:
        way.called.append(dropped)
        if failures:
            raise failures.pop()

    encode = make_encode({}, 1, _speedups.Stamps(1), None, _speedups)
    way.send = _speedups.sender(encode, way.buffer, way.cells, 3, 10_000, refuse, call)
    way.put(2)
    with pytest.raises(KeyError):
        way.put(1)
    way.put(1)
    assert way.called == [0, 0]
    assert way.cells[0] == 4


def test_what_cannot_be_taken_for_want_of_memory_stays() -> None:
    failed = 0
    for number in range(1, 10):
        buffer = _speedups.Buffer(1_000, 100_000)
        buffer.put([b"too long"] * 600 + [b"line"])

        taken = without_memory(number, lambda buffer=buffer: buffer.take(10, 4))

        if isinstance(taken, MemoryError):
            failed += 1
            assert (len(buffer), buffer.taken) == (601, 0)
            taken = buffer.take(10, 4)
        assert taken == ([b"line"], 600)
    assert failed


def test_a_line_that_finds_no_memory_to_wait_in_is_counted_as_dropped() -> None:
    lines = [str(number).encode() * 70_000 for number in range(5)]  # each in memory of its own
    failed = 0
    for number in range(1, 20):
        buffer = _speedups.Buffer(3, 1_000_000)

        dropped = without_memory(number, lambda buffer=buffer: buffer.put(lines))

        kept = list(buffer.take(10, 1_000_000)[0])
        assert dropped == buffer.dropped == 2
        assert buffer.put_lines == 5
        assert kept in [[each for each in lines if each != missing][-3:] for missing in lines]
        failed += kept != lines[2:]
    assert failed


@pytest.mark.parametrize("length", [10, 5_000])
def test_a_point_for_which_a_pool_child_has_no_memory_goes_the_python_way(length: int) -> None:
    point = Point("m", {"f": "x" * length})
    for number in range(1, 20):
        reader, writer = os.pipe()
        cells = memoryview(bytearray(8)).cast("Q")
        python: deque[object] = deque()  # which has memory for some
        send = _speedups.relay_sender(
            make_encode({}, 1, _speedups.Stamps(1), None, _speedups),
            *(writer, 0, cells, python.append, python.append, handler_of),
        )

        assert without_memory(number, lambda send=send: send(point)) is None

        assert cells[0] + len(python) == 1
        os.close(reader)
        os.close(writer)


def test_a_way_for_points_and_its_cells_may_be_collected_together_the_cells_first() -> None:
    class Thing:
        """Something that can be seen to be gone."""

    cells = memoryview(bytearray(8)).cast("Q")
    thing = Thing()
    thing.itself = thing  # type: ignore[attr-defined] # a cycle
    thing.send = _speedups.sender(  # type: ignore[attr-defined]
        make_encode({}, 1, _speedups.Stamps(1), None, _speedups),
        *(_speedups.Buffer(1, 1), cells, 1, 1, len, len),
    )
    seen = weakref.ref(thing)

    del cells, thing
    gc.collect()

    assert seen() is None


class Slotted:
    __slots__ = ("slot",)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: _speedups.sender(len, _speedups.Buffer(1, 1), bytearray(8), 1, 1, len, len),
        lambda: _speedups.sender(
            make_encode({}, 1, _speedups.Stamps(1, lambda: 1), None, _speedups),
            *(_speedups.Buffer(1, 1), bytearray(8), 1, 1, len, len),
        ),
        lambda: _speedups.sender(
            make_encode({}, 1, _speedups.Stamps(1), None, _speedups),
            *(_speedups.Buffer(1, 1), b"12345678", 1, 1, len, len),
        ),
        lambda: _speedups.sender(
            make_encode({}, 1, _speedups.Stamps(1), None, _speedups),
            *(_speedups.Buffer(1, 1), bytearray(7), 1, 1, len, len),
        ),
        lambda: _speedups.method(len, Point, Slotted.slot),
        lambda: _speedups.method(refuse, Point(*"abcd"), Slotted.slot),
        lambda: _speedups.method(refuse, Point, Slotted.__init__),
        lambda: _speedups.method(refuse, Point, type(refuse).__closure__),
        lambda: _speedups.Buffer(2**70, 1),
        lambda: _speedups.Stamps("1"),
    ],
    ids=[
        "another encode",
        "another clock",
        "cells that cannot be written",
        "no cell",
        "no function",
        "no class",
        "no slot",
        "another's slot",
        "limits",
        "slot",
    ],
)
def test_half_made_parts_are_refused_and_leave_nothing_behind(wrong: Any) -> None:
    for _ in range(1_000):
        with pytest.raises((TypeError, ValueError, BufferError, OverflowError)):
            wrong()


def test_threads_encode_at_once_while_others_change_the_dicts() -> None:
    tags = {f"k{number}": "v" for number in range(50)}
    fields = {f"f{number}": 1.5 for number in range(50)}
    stop = threading.Event()
    encode = make_encode({}, 1, None, None, _speedups)

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            tags[f"k{number % 100}"] = f"{number}"
            tags.pop(f"k{(number * 7) % 100}", None)
            fields[f"f{number % 100}"] = number / 3
            if len(fields) > 20:
                fields.pop(f"f{(number * 7) % 100}", None)

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20_000):
            assert encode(Point("m", fields, tags, 1)).startswith(b"m")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
