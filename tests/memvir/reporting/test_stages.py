"""The reporting stages one after another, on runs that were made up rather than trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memvir.images.index import IndexRow, write_index
from memvir.params import parse_params
from stages import curves, metrics, neighbours, report, show, table4, tables, tsne
from tests import tiny
from tests.memvir.reporting.test_figures import GROWTHS, HISTORIES, files_of, write_snapshot

CLASSES, PER_CLASS = 6, 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    content = tiny.params()
    variants = content["tiny"]["variants"]
    variants["tsne"] = variants["memvir_norm_softmax"]
    (folder / "params.yaml").write_text(json.dumps(content))
    params = parse_params(content)
    random = np.random.default_rng(0)
    for variant, name in (("norm_softmax", "plain"), ("memvir_norm_softmax", "memvir")):
        for seed in (1, 2):
            run = folder / "runs" / "tiny" / variant / str(seed)
            run.mkdir(parents=True)
            np.savez(run / "test_embeddings.npz", embeddings=random.normal(size=(CLASSES * PER_CLASS, 4)))
            values = dict(zip(("recall_at_1", "recall_at_2", "rp", "map"), random.random(4).tolist(), strict=True))
            result = {
                "last": values,
                "best": values,
                "last_epoch": 8,
                "best_epochs": dict.fromkeys(values, 8),
                "settings": params.settings_of("tiny", variant),
                "made_by": {"training": {"environment": {"torch": "2.14.1"}}},
            }
            path = folder / "results" / "tiny" / variant / f"{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
            HISTORIES[name, 1].to_csv(path.with_suffix(".history.csv"), index=False)
            GROWTHS[name, 1].to_csv(path.with_suffix(".growth.csv"), index=False)
    write_snapshot(folder / "runs" / "tiny" / "tsne" / "1" / "snapshots" / "epoch-0001.npz", steps=2)
    tiny.write_images(folder / "dataset" / "tiny" / "images", CLASSES, PER_CLASS)
    images = folder / "dataset" / "tiny" / "images"
    rows = [
        IndexRow(
            path.parts[-3], int(path.parts[-2][-2:]), path.parts[-2], path.relative_to(images).as_posix(), "0" * 32
        )
        for path in sorted(images.rglob("*.png"))
    ]
    write_index(folder / "dataset" / "tiny" / "index.csv", rows)
    return folder


def run(stage, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", *arguments])
    stage.main()


def make_reports(monkeypatch, figures=(curves, tsne, neighbours)) -> dict[str, bytes]:
    for stage in (tables, *figures, report):
        run(stage, monkeypatch, "--dataset", "tiny")
    run(metrics, monkeypatch)
    run(table4, monkeypatch)
    return files_of(Path("reports"))


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_the_stages_make_a_report_that_a_clone_of_its_commit_makes_byte_for_byte(
    workspace, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(workspace)
    git("init", "-q")
    first = make_reports(monkeypatch, figures=())
    assert b"no earlier report" in first["tiny/index.html"]
    stored = json.loads(first["metrics.json"])
    assert set(stored["tiny"]["memvir_norm_softmax"]["map"]) == {"mean", "std", "diff"}
    assert set(stored["tiny"]["norm_softmax"]["map"]) == {"mean", "std"}
    git("add", "-A")
    git("commit", "-qm", "first")

    result = Path("results/tiny/norm_softmax/1.json")
    result.write_text(result.read_text().replace('"torch": "2.14.1"', '"torch": "9.9"'))
    second = make_reports(monkeypatch)
    assert {"metrics.json", "tiny/index.html", "tiny/tables.md", "tiny/tsne.png", "tiny/neighbours.svg"} <= set(second)
    assert b"no earlier report" not in second["tiny/index.html"] and b"9.9" in second["tiny/index.html"]
    git("add", "-A")
    git("commit", "-qm", "second")
    git("clone", "-q", ".", str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    assert make_reports(monkeypatch) == second

    run(show, monkeypatch)
    shown = capsys.readouterr().out
    for words in ("Recall@1 (%)", "RP (%)", "MAP (%)", "Mean", "Diff.", "Std.", "reports/tiny/index.html"):
        assert words in shown
    assert max(len(line) for line in shown.splitlines() if line.startswith(("Loss", "---", "MemVir +  "))) <= 100


def test_without_git_a_report_has_no_predecessor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.previous_content(Path("reports/tiny/summary.json"), {}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.previous_content(Path("reports/tiny/summary.json"), {}) is None
