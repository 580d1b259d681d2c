"""The documentation: its code runs, its links lead somewhere, its tables are what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import celery
import pytest

import celery_influx
from celery_influx.listener import Listener
from tests.integration.worker import Worker, publisher
from tests.servers import Influxd, Redis, wait_for

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
#: The package that is tested, installed or not, and what the pages' code imports besides.
PATH = os.pathsep.join([str(Path(celery_influx.__file__).parent.parent), str(ROOT)])
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")],
    key=str,
)


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(words after "python", code) of each Python block."""
    return re.findall(
        r"^```python *([\w-]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )


def test_every_code_block_is_python() -> None:
    for page in PAGES:
        for words, code in blocks(page):
            compile(code, str(page), "exec")
            assert words in ("", "with-servers")


RUNNING = {page: [code for words, code in blocks(page) if not words] for page in PAGES}
WITH_SERVERS = [page for page in PAGES if any(words for words, _ in blocks(page))]


@pytest.mark.parametrize("page", [page for page in PAGES if RUNNING[page]], ids=ident)
def test_the_code_blocks_of_the_page_run_one_after_another(page: Path) -> None:
    script = "\n".join(RUNNING[page])

    # The warning is about localhost:8089, where nobody listens in a test.
    done = subprocess.run(
        [sys.executable, "-c", script + "\napp.influx.close(1)"],
        env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "rejected" not in done.stderr


@pytest.mark.parametrize("page", WITH_SERVERS, ids=ident)
def test_the_code_blocks_of_the_page_run_with_a_server_and_a_worker(
    page: Path,
    influxd: Influxd,
    database: str,
    redis_server: Redis,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {"influx_databases": {"main": f"http://127.0.0.1:{influxd.http_port}/{database}"}}
    influxd.write(b"celery_task,task=shop.resize,queue=images runtime=1.5", database)
    app = publisher(redis_server.url, **config)
    celery_influx.install(app)

    with Worker(tmp_path, "outages", redis_server.url, config):
        for _, code in blocks(page):
            exec(code, {"app": app})
    app.close()

    printed = "celery_task {'queue': 'images'} ['time', 'mean'] [["
    assert capsys.readouterr().out.startswith(printed)


class Pasted(Worker):
    """``celery -A shop worker``, of a module ``shop`` in its folder with just this code."""

    def __init__(self, folder: Path, code: str, broker: str) -> None:
        super().__init__(folder, "", broker)
        (folder / "shop.py").write_text(code)
        self._command[self._command.index("-A") + 1] = "shop"

    def start(self) -> None:
        """Start it and wait until its log says that it takes tasks."""
        process = self.launch()

        def ready() -> bool:
            assert process.poll() is None, self.log()
            return f"{self.name} ready." in self.log()

        wait_for(ready, 40, "the worker is ready")


def test_the_first_lines_of_the_readme_measure_a_task_of_a_real_worker(
    broker: str, tmp_path: Path
) -> None:
    first, where, *_ = RUNNING[ROOT / "README.md"]
    assert len([line for line in first.splitlines() if line]) == 6
    assert first.count('"redis://localhost"') == where.count('"udp://influx.example:8089"') == 1

    with Listener() as listener:
        code = first.replace("redis://localhost", broker) + where.replace(
            "udp://influx.example:8089", f"{listener.udp_url}?http_port={listener.http_port}"
        )
        app = publisher(broker)
        with Pasted(tmp_path, code, broker) as worker:
            for number in range(3):
                app.send_task("shop.resize", [f"{number}.jpg"])
            wait_for(lambda: listener.count("resized") == 3, 20, "the tasks' own points")
            wait_for(lambda: listener.count("celery_task") == 3, 20, "the runs' points")
        log = worker.log()
        app.close()

        own, runs = listener.points("resized"), listener.points("celery_task")
        assert [point.fields for point in own] == [{"bytes": 4711}] * 3
        assert [(point.tags["task"], point.tags["state"]) for point in runs] == [
            ("shop.resize", "SUCCESS")
        ] * 3
        assert all(point.fields["runtime"] > 0 for point in runs)
        assert listener.refused == []
    assert "] celery_influx: " in log
    assert "WARNING/MainProcess] celery_influx" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_every_link_of_the_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_each_test_that_a_page_names_is_there() -> None:
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))

    named = {
        (page, name) for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())
    }

    assert len(named) > 20
    assert [each for each in named if f"def {each[1]}(" not in tests] == []


def test_each_row_of_what_is_lost_when_names_a_test_that_is_there() -> None:
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    page = (ROOT / "docs/explanation/what-is-lost-when.md").read_text()

    lines = [line.removesuffix(" |") for line in page.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.endswith(("| shown by", "| ---"))]
    named = [re.findall(r"`(test_\w+)`", row.rpartition("|")[2]) for row in rows]

    assert len(rows) > 20
    assert [row for row, names in zip(rows, named, strict=True) if not names] == []
    assert [name for names in named for name in names if f"def {name}(" not in tests] == []


def test_the_demo_asks_the_database_that_the_udp_section_names() -> None:
    section = (ROOT / "docs/how-to/enable-udp.md").read_text()
    (named,) = re.findall(r'^ +database = "(.*?)"', section, re.MULTILINE)
    (url,) = re.findall(r"`make demo INFLUX=(\S+)", (ROOT / "README.md").read_text())

    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from example_project.app import app; print(app.influx.default.options.database)",
        ],
        env={**os.environ, "PYTHONPATH": PATH, "INFLUX": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    app = celery.Celery(set_as_current=False)

    assert done.stdout.strip() == named, done.stderr
    assert celery_influx.install(app).default.options.database == named


def test_the_reference_tables_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout


def test_no_name_that_is_written_is_an_influxql_keyword() -> None:
    # https://docs.influxdata.com/influxdb/v1/query_language/spec/#keywords
    keywords = """ALL ALTER ANY AS ASC BEGIN BY CREATE CONTINUOUS DATABASE DATABASES DEFAULT DELETE
        DESC DESTINATIONS DIAGNOSTICS DISTINCT DROP DURATION END EVERY EXPLAIN FIELD FOR FROM GRANT
        GRANTS GROUP GROUPS IN INF INSERT INTO KEY KEYS KILL LIMIT SHOW MEASUREMENT MEASUREMENTS
        NAME OFFSET ON ORDER PASSWORD POLICY POLICIES PRIVILEGES QUERIES QUERY READ REPLICATION
        RESAMPLE RETENTION REVOKE SELECT SERIES SET SHARD SHARDS SLIMIT SOFFSET STATS SUBSCRIPTION
        SUBSCRIPTIONS TAG TO USER USERS VALUES WHERE WITH WRITE"""
    from celery_influx.measurements import MEASUREMENTS

    names = {m.name for m in MEASUREMENTS} | {c.name for m in MEASUREMENTS for c in m.columns}

    assert not names & set(keywords.lower().split())
