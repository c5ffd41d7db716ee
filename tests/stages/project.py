"""A repository of one's own with a tiny data set: this one's code and dvc.yaml, other numbers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests import tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Project:
    folder: Path

    @classmethod
    def create(cls, folder: Path, params: dict[str, Any]) -> "Project":
        folder.mkdir()
        (folder / ".dvc").mkdir()
        for name in ("tuning", "studies"):
            (folder / name).mkdir()
            (folder / name / ".gitkeep").touch()
        for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("memvir", "stages"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
        tiny.write_images(folder / "dataset" / "tiny" / "source")
        project = cls(folder)
        project.write_params(params)
        return project

    def untrained_copy(self, folder: Path) -> "Project":
        """Another one like it, in which every run is to be made again."""
        shutil.copytree(self.folder, folder)
        for made in ("runs", "results", "logs", "scratch", ".dvc/cache"):
            shutil.rmtree(folder / made)
        return Project(folder)

    def end_with_evaluation(self) -> None:
        """Nothing is left to make of the results: each stage is a process or more, and takes seconds."""
        path = self.folder / "dvc.yaml"
        stages = YAML(typ="safe").load(path)["stages"]
        kept = ("download", "prepare", "weights", "settings", "train", "train_tsne", "evaluate")
        path.write_text(json.dumps({"stages": {name: stages[name] for name in kept}}))

    def write_params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(json.dumps(params, indent=1))

    def start(self, *command: str) -> subprocess.Popen[str]:
        """python -m COMMAND in the project, its output and errors in one pipe."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment["SHELL"] = "/bin/sh"  # the plainest that DVC may find: dash starts a command beside itself
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*command)
        output, _ = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def commit(self) -> None:
        """Everything that git does not ignore."""
        author = ["-c", "user.name=A User", "-c", "user.email=user@example.org"]
        for command in (["add", "--all"], [*author, "commit", "--quiet", "--message", "as it is"]):
            subprocess.run(["git", *command], cwd=self.folder, check=True)

    def outputs(self, *folders: str) -> dict[str, bytes]:
        files = [p for folder in folders for p in sorted((self.folder / folder).rglob("*")) if p.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


def params() -> dict[str, Any]:
    """Two variants and one seed, and the run for the t-SNE figure; long enough to be interrupted."""
    content = tiny.params(epochs=120)
    content["seeds"] = [1]
    variants = content["tiny"]["variants"]
    variants["tsne"] = {**variants["memvir_norm_softmax"], "training": {"epochs": 4}, "snapshots": [1, 2, 4]}
    return content
