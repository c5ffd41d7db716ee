"""What an edit makes out of date, as `dvc status` sees it once the stage `settings` has run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from tests import tiny
from tests.stages.project import Project

BASELINE, MEMVIR, OWN_EPOCHS, TSNE = "norm_softmax-1", "memvir_norm_softmax-1", "longer-1", "tsne"
ALL_RUNS = {f"train@tiny-{name}" for name in (BASELINE, MEMVIR, OWN_EPOCHS)} | {"train_tsne@tiny"}
MEMVIR_RUNS = {f"train@tiny-{MEMVIR}", "train_tsne@tiny"}
ALL_RESULTS = {f"evaluate@tiny-{name}" for name in (BASELINE, MEMVIR, OWN_EPOCHS)}

Params = dict[str, Any]


def params() -> Params:
    content = tiny.params(epochs=2)
    content |= {"seeds": [1], "variants": ["norm_softmax", "memvir_norm_softmax", "longer"]}
    variants = content["tiny"]["variants"]
    variants["memvir_norm_softmax"]["snapshots"] = []
    variants["longer"] = {**variants["norm_softmax"], "training": {"epochs": 3}}
    variants["tsne"] = {**variants["memvir_norm_softmax"], "snapshots": [2]}
    return json.loads(json.dumps(content))  # no two variants share what an edit changes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose runs are recorded as done, though nothing was trained: DVC looks at hashes alone."""
    project = Project.create(tmp_path_factory.mktemp("again") / "project", params())
    for stage in ("download", "prepare", "weights", "settings"):
        outcome = project.run(f"stages.{stage}", "--dataset", "tiny")
        assert outcome.returncode == 0, outcome.stdout
    for variant, seed in (("norm_softmax", 1), ("memvir_norm_softmax", 1), ("longer", 1), ("tsne", 1)):
        run = project.folder / "runs" / "tiny" / variant / str(seed)
        run.mkdir(parents=True)
        (run / "summary.json").write_text("{}")
        results = project.folder / "results" / "tiny" / variant
        results.mkdir(parents=True)
        for kind in ("json", "history.csv", "growth.csv"):
            (results / f"{seed}.{kind}").write_text("{}")
    targets = ["settings@tiny", *sorted(ALL_RUNS | ALL_RESULTS)]
    outcome = project.run("dvc", "commit", "--force", *targets)
    assert outcome.returncode == 0, outcome.stdout
    return project


def out_of_date(project: Project) -> set[str]:
    outcome = project.run("stages.settings", "--dataset", "tiny")
    assert outcome.returncode == 0, outcome.stdout
    with Repo(str(project.folder)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()} & (ALL_RUNS | ALL_RESULTS)


def edit(**changes: Any) -> Callable[[Params], Params]:
    """Replace values of params.yaml by their dotted keys, in which __ stands for the dot."""

    def change(content: Params) -> Params:
        for key, value in changes.items():
            *path, last = key.split("__")
            place = content
            for part in path:
                place = place[part]
            place[last] = value
        return content

    return change


def add_a_variant(content: Params) -> Params:
    content["variants"].append("another")
    content["tiny"]["variants"]["another"] = {"loss": {"name": "CosFace"}}
    return content


def turn_round(content: Any) -> Any:
    """The same in another order of keys."""
    return {key: turn_round(content[key]) for key in reversed(content)} if isinstance(content, dict) else content


SETTINGS = {
    "the scale of a variant": (edit(tiny__variants__norm_softmax__loss__scale=20.0), {f"train@tiny-{BASELINE}"}),
    "N of a variant": (edit(tiny__variants__memvir_norm_softmax__memvir__num_steps=1), {f"train@tiny-{MEMVIR}"}),
    "the epochs of the recipe": (edit(tiny__training__epochs=4), ALL_RUNS - {f"train@tiny-{OWN_EPOCHS}"}),
    "the optimiser": (edit(tiny__training__optimizer__lr=0.002), ALL_RUNS),
    "threads": (edit(tiny__training__threads=2), ALL_RUNS),
    "normalisation": (edit(tiny__images__mean=[0.4]), ALL_RUNS),
    "the model": (edit(tiny__model__embedding_dim=9), ALL_RUNS),
    "recall_at": (edit(tiny__evaluation__recall_at=[1, 2, 4]), ALL_RESULTS),
    "nmi": (edit(tiny__evaluation__nmi=True), ALL_RESULTS),
    "runtime": (edit(runtime={"workers": 0, "progress": "plain", "scratch": "elsewhere"}), set()),
    "resources": (edit(tiny__resources={"cpus": 2}), set()),
    "reporting": (edit(reporting={"tsne_seed": 3}), set()),
    "where weights come from": (edit(tiny__model__weights={"addresses": ["https://a"], "sha256": "0" * 8}), set()),
    "another variant": (add_a_variant, set()),
    "another seed": (edit(seeds=[1, 2]), set()),
    "the order of keys": (turn_round, set()),
    "a variant of a rival": (edit(tiny__variants__rival={"loss": {"name": "arcface"}, "virtual_softmax": {}}), set()),
    "the initialisation of a loss": (
        edit(tiny__variants__norm_softmax__loss__initialisation="normal_d"),
        {f"train@tiny-{BASELINE}"},
    ),
}


@pytest.mark.parametrize(("change", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_an_edit_of_params_makes_out_of_date_what_it_changes(project: Project, change, expected) -> None:
    project.write_params(change(params()))
    try:
        assert out_of_date(project) == expected
    finally:
        project.write_params(params())


CODE = {
    "the loss": ("losses/norm_softmax.py", "return self.scale", "return 2 * self.scale", ALL_RUNS),
    "a formula that losses share": ("losses/cross_entropy.py", "self.factor * similarity", "similarity", ALL_RUNS),
    "a loss that no run has": ("losses/cosface.py", "- self.margin", "+ self.margin", set()),
    "the memory": ("memory.py", "min(turn, self.num_steps)", "max(turn, self.num_steps)", MEMVIR_RUNS),
    "what wrappers share": ("wrappers/wrapper.py", "self.enabled and self.training", "self.enabled", MEMVIR_RUNS),
    "a wrapper that no run has": ("wrappers/broadface.py", "ratio * (now - then)", "now - then", set()),
    "a backbone that no run has": ("models/bn_inception.py", "kernel // 2", "kernel // 3", set()),
    "its own backbone": ("models/convnet.py", "stride=2", "stride=3", ALL_RUNS),
    "how results are computed": (
        "retrieval",
        "CHUNK_QUERIES = 4096",
        "CHUNK_QUERIES = 4097",
        ALL_RUNS | ALL_RESULTS,
    ),
    "a docstring": ("memory.py", '"""', '"""Truly: ', set()),
    "a comment": ("experiment/training.py", "import math\n", "import math  # a comment\n", set()),
    "what only shows": ("experiment/watch.py", "images/s", "pictures/s", set()),
    "reports": ("reporting/tables.py", '"Mean"', '"Average"', set()),
}


@pytest.mark.parametrize(("place", "old", "new", "expected"), CODE.values(), ids=CODE)
def test_an_edit_of_the_code_makes_out_of_date_what_it_changes(project: Project, place, old, new, expected) -> None:
    where = project.folder / "memvir" / place
    files = sorted(where.glob("*.py")) if where.is_dir() else [where if where.exists() else where.with_suffix(".py")]
    file = next(file for file in files if old in file.read_text())
    before = file.read_text()
    file.write_text(before.replace(old, new, 1))
    try:
        assert out_of_date(project) == expected
    finally:
        file.write_text(before)


def test_the_format_that_ruff_gives_the_code_does_not_matter(project: Project) -> None:
    package = project.folder / "memvir"
    shutil.copytree(package, project.folder / "kept")
    try:
        for path in package.rglob("*.py"):
            path.write_text(path.read_text().replace("    ", "  "))
        command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "60", str(package)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RUFF_NO_CACHE": "true"})
        assert out_of_date(project) == set()
    finally:
        shutil.rmtree(package)
        (project.folder / "kept").rename(package)


def test_other_images_run_everything_again(project: Project) -> None:
    index = project.folder / "dataset" / "tiny" / "index.csv"
    before = index.read_text()
    index.write_text(before.replace("train/class_00/00.png", "train/class_00/0.png"))
    try:
        assert out_of_date(project) == ALL_RUNS | ALL_RESULTS
    finally:
        index.write_text(before)


def test_the_settings_are_readable_and_the_same_bytes_whoever_writes_them(project: Project) -> None:
    file: Path = project.folder / "settings" / "tiny" / "variants" / "norm_softmax.json"
    out_of_date(project)
    content = json.loads(file.read_text())
    assert content["training.optimizer.lr"] == 0.003 and content["weights"] == "none"
    assert not any("tmp" in str(value) or "address" in key for key, value in content.items())
