"""The bands of the package: imports only go down, the core touches nothing outside, and importing
it does nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import celery_influx

PACKAGE = Path(celery_influx.__file__).parent
BASE, CORE, IO, CELERY, TOOLS = range(5)

#: Every module and its band; a new one needs a line here.
BANDS = {
    "celery_influx.speedups": BASE,  # asks the environment, once
    "celery_influx._speedups": BASE,
    "celery_influx._version": CORE,
    "celery_influx.errors": CORE,
    "celery_influx.point": CORE,
    "celery_influx.line_reader": CORE,
    "celery_influx.line_search": CORE,
    "celery_influx.line_protocol": CORE,
    "celery_influx.measurements": CORE,
    "celery_influx.field_types": CORE,
    "celery_influx.task_points": CORE,
    "celery_influx.options": CORE,
    "celery_influx.queries": CORE,
    "celery_influx.results": CORE,
    "celery_influx.counters": CORE,
    "celery_influx.stamps": CORE,
    "celery_influx.buffer": CORE,
    "celery_influx.transports": IO,
    "celery_influx.transports.udp": IO,
    "celery_influx.transports.servers": IO,
    "celery_influx.transports.tcp": IO,
    "celery_influx.transports.unixgram": IO,
    "celery_influx.transports.bounded": IO,
    "celery_influx.transports.credentials": IO,
    "celery_influx.transports.answers": IO,
    "celery_influx.transports.http": IO,
    "celery_influx.report": IO,
    "celery_influx.parts": CORE,
    "celery_influx.spool_records": CORE,
    "celery_influx.spool": IO,
    "celery_influx.delivery": IO,
    "celery_influx.runs": IO,
    "celery_influx.under_way": IO,
    "celery_influx.relay": IO,
    "celery_influx.batcher": IO,
    "celery_influx.database": IO,
    "celery_influx.plugin": CELERY,
    "celery_influx.bootstep": CELERY,
    "celery_influx.ordinary": CELERY,
    "celery_influx.signals": CELERY,
    "celery_influx.verdicts": CELERY,
    "celery_influx.timing": CELERY,
    "celery_influx.tasks": CELERY,
    "celery_influx.sampler": CELERY,
    "celery_influx.cli": TOOLS,
    "celery_influx.server_setup": TOOLS,
    "celery_influx.listener": TOOLS,
    "celery_influx.pytest_plugin": TOOLS,
}

#: Where the core would reach outside of its values. ``mmap`` (memory), ``threading`` (locks) and
#: ``time`` (a default for a clock that is handed in) are judged below, by what is used of them.
OUTSIDE = {
    "asyncio",
    "celery",
    "billiard",
    "kombu",
    "fcntl",
    "http",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "requests",
    "select",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "urllib3",
}


def module_name(path: Path) -> str:
    parts = ["celery_influx", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "build"
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each module that is imported anywhere in ``tree``, and where; for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield (whole if whole in MODULES else module), node.lineno


def test_every_module_has_its_band() -> None:
    assert set(MODULES) - set(BANDS) - {"celery_influx"} == set()


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"celery_influx"}))
def test_imports_only_go_down(name: str) -> None:
    wrong = [
        f"{name}:{line} imports {found}"
        for found, line in imports(TREES[name])
        if (found == "celery_influx" and name != "celery_influx.speedups")
        or BANDS.get(found, BASE) > BANDS[name]
    ]

    assert wrong == []


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"celery_influx"}))
def test_nobody_imports_a_tool(name: str) -> None:
    tools = [found for found, _ in imports(TREES[name]) if BANDS.get(found) == TOOLS]

    assert tools == [] or BANDS[name] == TOOLS


@pytest.mark.parametrize("name", [name for name in MODULES if BANDS.get(name) in (BASE, CORE, IO)])
def test_celery_is_known_only_above_io(name: str) -> None:
    roots = {found.partition(".")[0] for found, _ in imports(TREES[name])}

    assert not roots & {"celery", "kombu", "billiard", "vine"}


@pytest.mark.parametrize("name", [name for name in MODULES if BANDS.get(name) == CORE])
def test_the_core_takes_values_and_gives_values(name: str) -> None:
    """No socket, file, thread, log or clock: only locks, memory, and clocks as arguments."""
    tree = TREES[name]
    roots = {found.partition(".")[0] for found, _ in imports(tree)}
    assert not roots & OUTSIDE

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "threading":
                assert node.attr in ("Lock", "RLock"), f"{name}:{node.lineno}"
            if node.value.id == "socket":
                pytest.fail(f"{name}:{node.lineno}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.startswith("time."), f"{name}:{node.lineno} reads a clock"
            assert called not in ("open", "print", "input"), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", [name for name in MODULES if BANDS.get(name) in (BASE, CORE, IO)])
def test_no_lock_or_thread_or_logging_happens_at_import(name: str) -> None:
    """At the top level of a module of core and io nothing is called that makes one."""
    for statement in TREES[name].body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert not called.startswith(("threading.", "socket.socket", "os.fork"))
                assert called != "logging.basicConfig"


IMPORT = """
import json, os, sys, threading
from celery import Celery, signals  # lazy modules, which are not ours
before, files = set(sys.modules), len(os.listdir("/proc/self/fd"))
import celery_influx
new = sorted(set(sys.modules) - before)
print(json.dumps([new, threading.active_count(), len(os.listdir("/proc/self/fd")) - files]))
"""


def test_importing_the_package_imports_no_requests_and_starts_and_opens_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    modules, threads, files = json.loads(done.stdout)

    roots = {module.partition(".")[0] for module in modules}
    assert not roots & {"requests", "urllib3", "ssl", "numpy", "hypothesis"}
    assert "celery_influx.listener" not in modules
    assert threads == 1
    assert files == 0
    assert done.stderr == ""


def test_each_public_name_is_there_and_no_other() -> None:
    for name in celery_influx.__all__:
        assert getattr(celery_influx, name) is not None
        assert name in dir(celery_influx)
    with pytest.raises(AttributeError, match="'celery_influx' has no attribute 'instal'"):
        _ = celery_influx.instal
