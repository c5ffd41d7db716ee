"""What a sweep tells DVC: the same as `dvc commit`, and nothing about stages whose inputs changed while they ran.

What it takes from DVC: what is out of date, and what the cache holds of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from memvir.sweep.plan import open_pipeline
from tests import tiny

ROOT = Path(__file__).parents[3]

DVC_YAML = """
stages:
  train:
    matrix:
      seed: [1, 2, 3]
    cmd: exec python -m stages.train --dataset tiny --variant v --seed ${item.seed}
    deps: [code.py, data]
    params: ["scales.s${item.seed}"]
    outs: ["runs/${item.seed}"]
  evaluate:
    matrix:
      seed: [1, 2, 3]
    cmd: exec python -m stages.evaluate --dataset tiny --variant v --seed ${item.seed}
    deps: ["runs/${item.seed}"]
    outs:
      - results/${item.seed}.json: {cache: false}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "data").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "data" / "image").write_text("pixels")
    (tmp_path / "code.py").write_text("code")
    (tmp_path / "params.yaml").write_text("scales: {s1: 1, s2: 2, s3: 3}")
    return tmp_path


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


def run(project, *seeds: int, result: str = "result") -> None:
    """What the stages of these seeds leave."""
    for seed in seeds:
        (project / "runs" / str(seed)).mkdir(parents=True, exist_ok=True)
        (project / "runs" / str(seed) / "model").write_text(f"weights {seed} of {result}")
        (project / "results" / f"{seed}.json").write_text(f"{result} {seed}")


def out_of_date() -> list[str]:
    with open_pipeline() as pipeline, pipeline.lock:
        return list(pipeline.out_of_date())


def sweep(project, *seeds: int, meanwhile=lambda: None, **options: str) -> list[str]:
    """Run and record the stages of these seeds; what hindered that."""
    with open_pipeline() as pipeline, pipeline.lock:
        problems = []
        for group in ("train", "evaluate"):
            names = [f"{group}@{seed}" for seed in seeds]
            for name in names:
                pipeline.begin(name)
            run(project, *seeds, **options)
            meanwhile()
            problems += [pipeline.finish(name) for name in names]
        pipeline.write(all_of_them=True)
    return [problem for problem in problems if problem]


def restore() -> list[str]:
    with open_pipeline() as pipeline, pipeline.lock:
        restored = [name for name in pipeline.stages if pipeline.changed(name) and pipeline.restore(name)]
        pipeline.write(all_of_them=True)
    return restored


def test_it_records_what_dvc_commit_records(project):
    assert len(out_of_date()) == 6
    assert sweep(project, 1, 3) == []
    recorded = (project / "dvc.lock").read_bytes()
    assert sorted(out_of_date()) == ["evaluate@2", "train@2"]
    (project / "dvc.lock").unlink()
    dvc("commit", "--force", "train@1", "train@3", "evaluate@1", "evaluate@3")
    assert (project / "dvc.lock").read_bytes() == recorded


@pytest.mark.parametrize(
    ("path", "content", "not_recorded"),
    [
        ("params.yaml", "scales: {s1: 1, s2: 5, s3: 3}", {"train@2": "params.yaml"}),
        ("code.py", "other code", {f"train@{seed}": "code.py" for seed in (1, 2, 3)}),
        ("data/image", "other pixels", {f"train@{seed}": "data" for seed in (1, 2, 3)}),
    ],
)
def test_a_stage_whose_inputs_changed_while_it_ran_is_out_of_date_still(project, path, content, not_recorded):
    problems = sweep(project, 1, 2, 3, meanwhile=lambda: (project / path).write_text(content))
    changed = [
        f"not recorded, since {name} changed while it ran; it has to run again" for name in not_recorded.values()
    ]
    assert [problem for problem in problems if "runs/" not in problem] == changed
    assert {name for name in out_of_date() if name.startswith("train")} == not_recorded.keys()


def test_what_a_stage_did_not_make_is_said(project):
    assert any("does not exist" in problem for problem in sweep(project, 1, meanwhile=lambda: shutil.rmtree("runs/1")))


def model(project) -> str:
    return (project / "runs" / "2" / "model").read_text()


@pytest.fixture
def two_settings(project):
    """Seed 2 was run with a scale of 2, then with one of 5."""
    assert sweep(project, 1, 2, 3) == []
    (project / "params.yaml").write_text("scales: {s1: 1, s2: 5, s3: 3}")
    assert sweep(project, 2, result="result of scale 5") == []
    assert out_of_date() == []
    return project


def test_going_back_to_earlier_settings_restores_a_run_and_its_result(two_settings):
    (two_settings / "params.yaml").write_text("scales: {s1: 1, s2: 2, s3: 3}")
    assert restore() == ["train@2", "evaluate@2"]
    assert model(two_settings) == "weights 2 of result"
    assert (two_settings / "results" / "2.json").read_text() == "result 2"
    assert out_of_date() == []


def test_settings_that_were_never_run_restore_nothing_and_remove_nothing(two_settings):
    (two_settings / "params.yaml").write_text("scales: {s1: 1, s2: 7, s3: 3}")
    assert restore() == []
    assert model(two_settings) == "weights 2 of result of scale 5"
    assert out_of_date() == ["train@2", "evaluate@2"]


def test_what_was_deleted_is_restored_as_the_present_settings_left_it(two_settings):
    shutil.rmtree(two_settings / "runs" / "2")
    shutil.rmtree(two_settings / ".dvc" / "cache" / "runs")  # a clone has the files' cache alone
    assert restore() == ["train@2"]  # the result is in its place, and the same
    assert model(two_settings) == "weights 2 of result of scale 5"


ENDINGS = """
stages:
  download: {cmd: "python stage.py download", outs: [download]}
  first: {cmd: "python stage.py %s", deps: [download], outs: [first]}
  report: {cmd: "python stage.py report", deps: [first], outs: [report]}
  second: {cmd: "python stage.py second", deps: [download], outs: [second]}
"""
SAY = "waiting for another dvc command that is at work in this folder\n"


@pytest.fixture
def small(project):
    (project / "stage.py").write_text("import sys; open(sys.argv[1], 'w').close()")
    raw = tiny.params()
    (project / "params.yaml").write_text(json.dumps(raw))
    (project / "dvc.yaml").write_text(ENDINGS % "first")
    return project


def start() -> subprocess.Popen[str]:
    command, environment = [sys.executable, "-m", "stages.sweep"], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_one_stage_that_fails_is_named_and_the_others_run(small):
    (small / "dvc.yaml").write_text(ENDINGS % "no/such/folder")
    sweep = start()
    _, errors = sweep.communicate()
    assert sweep.returncode == 1
    assert errors.splitlines()[-1].startswith("error: 1 stage failed: first; ")
    assert (small / "second").exists() and not (small / "report").exists()
    assert out_of_date() == ["first", "report"]


def test_while_another_dvc_is_at_work_a_sweep_waits(small):
    with Repo() as other, other.lock:
        sweep = start()
        assert sweep.stderr.readline() == SAY
    assert "download done (1 of 4)" in sweep.communicate()[1] and sweep.returncode == 0
    assert out_of_date() == []


def test_data_that_was_added_to_dvc_and_changed_is_added_again(small):
    dvc("add", "data")
    (small / "dvc.yaml").write_text((ENDINGS % "first").replace("deps: [download]", "deps: [download, data]", 1))
    assert start().wait() == 0
    before = (small / "data.dvc").read_bytes()
    (small / "data" / "image").write_text("other pixels")
    sweep = start()
    assert "first done" in sweep.communicate()[1] and sweep.returncode == 0
    assert (small / "data.dvc").read_bytes() != before
    assert out_of_date() == []
