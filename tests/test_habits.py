"""What surrounds the code: make's targets, the citation, the changelog, the checks on every change."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import memvir

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="there is no make")


def read_yaml(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout's Makefile and requirements, where a path has a space, a tab and a dollar sign."""
    folder = tmp_path / "my models\tfor $HOME"
    folder.mkdir()
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As from a terminal, and not as from the make that runs the tests."""
    of_make = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "JOBS"}
    outside = {key: value for key, value in os.environ.items() if key not in of_make}
    assert MAKE is not None
    command = [MAKE, *arguments]
    return subprocess.run(command, cwd=folder, env=outside | environment, capture_output=True, text=True)


def programs(folder: Path, **scripts: str) -> str:
    """A PATH on which there is what a shell needs, and these scripts alone; underscores stand for dots."""
    folder.mkdir()
    for name in ("bash", "rm", "touch"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, script in scripts.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return str(folder)


def python(minor: int) -> str:
    """A script that passes for Python 3.MINOR."""
    pretended = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    return f'[ "$1" = -c ] && exec "{sys.executable}" -c "{pretended}" "$2"'


@needs_make
def test_make_help_and_make_alone_list_every_target_with_a_line(folder):
    outcome = make(folder, "help")
    assert outcome.stderr == "" and make(folder).stdout == outcome.stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^make ([\w-]+) +\S.*", outcome.stdout, re.MULTILINE) == targets.split()


@needs_make
@pytest.mark.parametrize("options", [(), ("JOBS=2",)])
def test_make_repro_sets_up_and_runs(folder, options):
    outcome = make(folder, "--dry-run", "repro", f"PYTHON={sys.executable}", *options)
    assert outcome.returncode == 0, outcome.stderr
    lines = ["-m venv --clear .venv", "-m pip install", "-r requirements.txt", "touch .venv/.installed", "-m stages."]
    positions = [outcome.stdout.index(line) for line in lines]
    assert positions == sorted(positions)


@needs_make
@pytest.mark.parametrize("target", ["repro", "test", "lint"])
def test_without_a_recent_python_make_says_so_in_one_line(folder, tmp_path, target):
    path = programs(tmp_path / "bin", python3=python(10), python=python(8), python3_12="exit 127")
    outcome = make(folder, target, PATH=path)
    assert outcome.returncode != 0 and outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert "Python 3.11 or later" in line and "make PYTHON=" in line
    (line,) = make(folder, target, f"PYTHON={path}/python3").stderr.splitlines()
    assert f"{path}/python3 is not" in line
    assert not (folder / ".venv").exists()


@needs_make
@pytest.mark.parametrize(
    ("minors", "chosen"),
    [((14, 12, 13), "python3.12"), ((11, 12), "python3.11"), ((14,), "python3.14"), ((), "python3")],
)
def test_make_takes_the_python_that_there_is(folder, tmp_path, minors, chosen):
    found = {f"python3_{minor}": python(minor) for minor in minors}
    path = programs(tmp_path / "bin", python3=python(15), **found)
    assert f'"{chosen}" -m venv' in make(folder, "--dry-run", "test", PATH=path).stdout


@needs_make
def test_make_takes_the_python_that_it_is_given(folder, tmp_path):
    given = programs(tmp_path / "my bin", python=python(13)) + "/python"
    assert f'"{given}" -m venv' in make(folder, "--dry-run", "test", f"PYTHON={given}").stdout
    assert f'"{given}" -m venv' in make(folder, "--dry-run", "test", PYTHON=given).stdout


@needs_make
def test_an_interrupted_installation_is_taken_up_again(folder, tmp_path):
    environment = folder / ".venv" / "bin"
    environment.mkdir(parents=True)
    answers = "*install*) [ -e network ];; *--version) [ -e pip ];; *ensurepip) touch pip;;"
    installs = f'echo "$*" >> calls; case "$*" in {answers} esac'
    programs(tmp_path / "bin", python=installs)
    shutil.copy(tmp_path / "bin" / "python", environment)
    stamp = ".venv/.installed"
    outcome = make(folder, stamp)
    assert outcome.returncode != 0 and not (folder / stamp).exists()
    (folder / "network").touch()
    assert make(folder, stamp).returncode == 0 and (folder / stamp).exists()
    assert "up to date" in make(folder, stamp).stdout
    install = "-m pip install --disable-pip-version-check -r requirements.txt"
    calls = ["-m pip --version", "-m ensurepip", install, "-m pip --version", install]
    assert (folder / "calls").read_text().splitlines() == calls


@needs_make
def test_an_environment_whose_python_has_gone_is_made_anew(folder):
    environment = folder / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(folder / "removed")
    for stamp in (".installed", ".installed-dev"):
        (environment / stamp).touch()
    outcome = make(folder, "--dry-run", "test", f"PYTHON={sys.executable}")
    assert "-m venv --clear" in outcome.stdout and "-m pip install" in outcome.stdout


def test_the_citation_names_this_version_and_the_paper():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == memvir.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] == "Learning with Memory-based Virtual Classes for Deep Metric Learning"
    assert [author["family-names"] for author in paper["authors"]] == ["Ko", "Gu", "Kim"]


def test_the_changelog_goes_from_what_is_not_released_to_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert sections[0] == ("Unreleased", "") and sections[1][0] == memvir.__version__
    assert all(date for _, date in sections[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_the_workflow_runs_what_every_change_must_pass():
    checks = read_yaml(".github/workflows/ci.yml")["jobs"]["checks"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".ci/run" in [step.get("run") for step in checks["steps"]]
    assert {"3.11", "3.12"} <= set(checks["strategy"]["matrix"]["python"])


@needs_make
def test_a_commit_is_checked_with_the_tools_of_make_lint():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = {Path(hook["entry"].split()[0]).name for hook in repository["hooks"]}
    lint = make(ROOT, "--dry-run", "--assume-old=.venv/.installed-dev", "lint", f"PYTHON={sys.executable}").stdout
    assert hooks == {line.split()[0] for line in lint.splitlines() if line.startswith(("ruff", "mypy", "lint-imports"))}
