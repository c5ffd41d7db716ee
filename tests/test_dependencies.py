"""What is imported is declared, and what is declared is imported; and rooms import those below them alone."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from memvir.extras import EXTRAS

ROOT = Path(__file__).parents[1]
OURS = {"memvir", "stages", "benchmarks", "tests"}
USED_BY_OTHERS = {
    "onnxscript",  # torch.onnx writes with it
    "tensorboard",  # torch.utils.tensorboard writes with it
    "pytest-xdist",  # make test
    "mypy",  # make lint
    "import-linter",
    "ruff",
}


def imported(*folders: str) -> set[str]:
    """The packages, as an index calls them, that the modules below these folders import at any place, or use unseen."""
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
    providers = packages_distributions()
    top = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OURS
    return {canonicalize_name(name) for module in top for name in providers[module]} | USED_BY_OTHERS


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def in_extra(extra: str) -> dict[str, Requirement]:
    return by_name(project()["optional-dependencies"][extra])


def in_pyproject() -> dict[str, Requirement]:
    """What the library and its extras declare."""
    extras = project()["optional-dependencies"].values()
    return by_name([line for lines in (project()["dependencies"], *extras) for line in lines])


def in_file(name: str) -> dict[str, Requirement]:
    """A requirements file and those that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = by_name([line for line in lines if line and not line.startswith("-r ")])
    for line in lines:
        if line.startswith("-r "):
            found |= in_file(line.removeprefix("-r "))
    return found


def by_name(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def for_here(requirements: dict[str, Requirement]) -> set[str]:
    return {
        name for name, requirement in requirements.items() if not requirement.marker or requirement.marker.evaluate()
    }


def test_the_library_declares_what_it_imports_and_nothing_else():
    sweep = {"dvc", "ray", "rich"}  # memvir.sweep belongs to the pipeline, whose packages requirements.txt names
    assert imported("memvir") - sweep == for_here(in_pyproject()) | USED_BY_OTHERS


def test_the_pipeline_pins_what_the_library_declares_and_what_a_sweep_needs_on_one_machine():
    assert in_file("requirements.txt").keys() == (in_pyproject().keys() - in_extra("export")) | {"dvc", "rich"}


def test_a_missing_extra_is_told_by_the_packages_that_the_library_declares():
    providers = packages_distributions()
    for extra, modules in EXTRAS.items():
        told = {canonicalize_name(name) for module in modules for name in providers[module.split(".")[0]]}
        assert told >= in_extra(extra).keys(), extra


def test_the_pipeline_and_its_tests_pin_what_they_import_and_nothing_else():
    assert imported("memvir", "stages") - in_extra("export").keys() == (
        for_here(in_file("requirements-cluster.txt")) | USED_BY_OTHERS - in_extra("export").keys()
    )
    everything = imported("memvir", "stages", "benchmarks", "tests")
    assert everything == for_here(in_file("requirements-dev.txt")) | USED_BY_OTHERS


def test_every_pin_is_exact_and_within_the_range_that_the_library_declares():
    ranges = in_pyproject()
    for name, pinned in in_file("requirements-dev.txt").items():
        (version,) = pinned.specifier
        assert version.operator == "==", name
        assert name not in ranges or ranges[name].specifier.contains(version.version), name


def test_the_rooms_of_the_house_keep_the_contracts_of_pyproject():
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    outcome = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout
