"""The examples of CONTRIBUTING.md, carried out from its text: one file and one line each."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests import tiny
from tests.stages.project import Project

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Example:
    """A section `A ... of your own`: a file, a line of a registry, and what a recipe says to have it."""

    title: str
    file: str
    code: str
    registry: str
    registry_file: str
    line: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, section: str) -> "Example":
        (code, line), (settings,) = (
            re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml")
        )
        (file,) = re.findall(r"^`(memvir/\S+\.py)`:$", section, re.MULTILINE)
        ((registry, registry_file),) = re.findall(r"^One line in `(\w+)` of \[.*\]\((\S+)\):$", section, re.MULTILINE)
        title = section.partition("\n")[0]
        return cls(title, file, code, registry, registry_file, line, YAML(typ="safe").load(settings))

    def carry_out(self, folder: Path) -> None:
        file, registry_file = folder / self.file, folder / self.registry_file
        assert not file.exists() and len(self.line.splitlines()) == 1
        file.write_text(self.code, encoding="utf-8")
        text, count = re.subn(rf"(?m)^({self.registry}\b.*{{\n)", rf"\1{self.line}", registry_file.read_text())
        assert count == 1
        registry_file.write_text(text)


EXAMPLES = [Example.of(section) for section in TEXT.split("\n## ") if re.match(r"A .* of your own\n", section)]

STAGES = """
import sys
from importlib import import_module

RUN = ["--variant", "mine", "--seed", "1"]
for stage in ("download", "prepare", "weights", "settings", "train", "evaluate"):
    sys.argv = [stage, "--dataset", "tiny", *(RUN if stage in ("train", "evaluate") else [])]
    import_module(f"stages.{stage}").main()
"""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`data` says it all; of the rest a recipe keeps what is not named."""
    both = {key: base[key] | value if key != "data" else value for key, value in changes.items()}
    return base | both


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all the examples, and a run that uses them."""
    content = tiny.params(epochs=3)
    for example in EXAMPLES:
        content["tiny"] = merged(content["tiny"], example.settings)
    content["tiny"]["variants"].setdefault("mine", content["tiny"]["variants"]["memvir_norm_softmax"])
    project = Project.create(tmp_path_factory.mktemp("contributing") / "project", content)
    for example in EXAMPLES:
        example.carry_out(project.folder)
    (project.folder / "all_stages.py").write_text(STAGES)
    outcome = project.run("all_stages")
    assert outcome.returncode == 0, outcome.stdout
    return project.folder


def test_a_run_of_the_examples_ends_in_a_result(trained):
    result = json.loads((trained / "results" / "tiny" / "mine" / "1.json").read_text())
    assert result["last_epoch"] == 3 and 0 <= result["last"]["map"] <= 1
    used = {section: settings for example in EXAMPLES for section, settings in example.settings.items()}
    used |= used["variants"]["mine"]
    for section in used.keys() - {"variants", "loss"}:
        resolved = result["settings"][section]  # of `data` its source alone
        assert {key: used[section][key] for key in used[section].keys() & resolved.keys()}.items() <= resolved.items()
    assert result["settings"]["loss"] == {"name": "scaled_softmax", "temperature": 0.1}


def test_what_computes_in_the_examples_is_part_of_the_runs_identity(trained):
    """Images are part of it by their bytes, wherever they come from."""
    identity = json.loads((trained / "settings" / "tiny" / "variants" / "mine.json").read_text())
    parts = [key.removeprefix("code.") for key in identity if key.startswith("code.")]
    for example in EXAMPLES:
        module = example.file.removeprefix("memvir/").removesuffix(".py").replace("/", ".")
        within = any(f"{module}.".startswith(f"{part}.") for part in parts)
        assert within != module.startswith("images.sources."), module


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_examples_have_the_style_of_the_project(example):
    for command in (["check"], ["format", "--check"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", example.file, "-"]
        outcome = subprocess.run(arguments, input=example.code, cwd=ROOT, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stdout
