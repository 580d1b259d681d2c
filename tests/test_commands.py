"""What is missing: what `make test` says of it, and that in CI nothing may be."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.worker import skip_without
from tests.servers import find, load, missing

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
SCRIPT = "scripts/install-servers.sh"
#: What the tests look for.
PROGRAMS = {
    program
    for path in ROOT.glob("tests/**/*.py")
    for program in re.findall(r'\bfind\("([\w-]+)"\)', path.read_text())
}
#: The script also looks where a user's own PATH may not lead.
MISSING = {each for each in PROGRAMS if not shutil.which(each, path="/usr/sbin:/sbin")}


def bare(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which nothing can be found but these programs, by what each does."""
    for name, does in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    return {"PATH": str(folder)}


def listed(printed: str) -> set[str]:
    """The programs that are said to be missing."""
    (found,) = re.findall(
        r"^Not installed: (.*)\. Tests that need them are skipped", printed, re.MULTILINE
    )
    return set(found.split())


@pytest.mark.parametrize(
    ("programs", "why"),
    [
        ({}, "apt-get, which is not here"),
        ({"id": "echo 1000", "apt_get": "", "sudo": "echo no right; exit 1"}, "no right"),
        ({"id": "echo 0", "apt_get": 'echo "no net for $1"; exit 100'}, "no net for update"),
        (
            {"id": "echo 0", "apt_get": '[ "$1" = update ] || { echo "no $*"; exit 100; }'},
            r"no install .* influxdb .*openssl",
        ),
    ],
    ids=["no apt-get", "no right", "no network", "no such package"],
)
def test_what_cannot_be_installed_is_said_with_the_command_that_mends_it(
    programs: dict[str, str], why: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["/bin/sh", SCRIPT],
        cwd=ROOT,
        env=bare(tmp_path, **programs),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert re.search(why, done.stderr)
    assert listed(done.stderr) == MISSING
    assert f"\nTo install them: sh {SCRIPT} (Debian, Ubuntu; as root)\n" in done.stderr


def test_make_test_runs_the_tests_all_the_same(tmp_path: Path) -> None:
    make = shutil.which("make") or missing("make is not installed; apt install make")
    environment = bare(tmp_path, sh='exec /bin/sh "$@"', id="echo 1000", apt_get="", sudo="exit 1")
    (tmp_path / "bin").mkdir()
    bare(tmp_path / "bin", python='echo "python $*"')
    (tmp_path / ".test").touch()

    done = subprocess.run(
        [make, "test", f"VENV={tmp_path}", "ARGS=-k relay"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert listed(done.stderr) == MISSING
    assert done.stdout.endswith("\npython -m pytest -n 5 -k relay\n")


def test_a_machine_that_has_them_all_is_left_alone(tmp_path: Path) -> None:
    environment = bare(tmp_path, **{name.replace("-", "_"): "exit 1" for name in PROGRAMS})

    done = subprocess.run(
        ["/bin/sh", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("look", [find, load, skip_without])
def test_what_is_missing_skips_a_test_and_fails_it_in_ci(
    look: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "no_such_thing"

    for ci, end in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(end, match=f"{name} is not installed"):
            look(name)
