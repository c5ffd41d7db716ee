"""What a sweep tells DVC: the same as `dvc commit`, and nothing about stages whose inputs changed while they ran."""

import subprocess
import sys

import pytest
from dvc.repo import Repo, lock_repo

from memvir.errors import UserError
from stages.plan import ask_dvc, tell_dvc
from stages.sweep import Record

DVC_YAML = """
stages:
  train:
    matrix:
      seed: [1, 2, 3]
    cmd: python -m stages.train --dataset tiny --variant v --seed ${item.seed}
    deps: [code.py, data]
    params: ["scales.s${item.seed}"]
    outs: ["runs/${item.seed}"]
  evaluate:
    matrix:
      seed: [1, 2, 3]
    cmd: python -m stages.evaluate --dataset tiny --variant v --seed ${item.seed}
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


def run(project, *seeds: int) -> None:
    for seed in seeds:
        (project / "runs" / str(seed)).mkdir(parents=True)
        (project / "runs" / str(seed) / "model").write_text(f"weights {seed}")
        (project / "results" / f"{seed}.json").write_text(f"result {seed}")


def test_it_records_what_dvc_commit_records(project):
    stages, out_of_date = ask_dvc()
    assert len(stages) == len(out_of_date) == 6
    run(project, 1, 3)
    done = [stage for stage in stages if stage.option("seed") in ("1", "3")]
    assert tell_dvc(done) == {}
    recorded = (project / "dvc.lock").read_bytes()
    assert sorted(ask_dvc()[1]) == ["evaluate@2", "train@2"]
    (project / "dvc.lock").unlink()
    dvc("commit", "--force", *[stage.name for stage in done])
    assert (project / "dvc.lock").read_bytes() == recorded


def test_while_another_dvc_is_at_work_what_is_done_waits(project):
    stages, _ = ask_dvc()
    run(project, 1, 2)
    first, second = (stage for stage in stages if stage.name in ("train@1", "train@2"))
    record = Record(display=None)
    with Repo() as other, lock_repo(other):
        record.add(first)
        with pytest.raises(UserError, match=r"Unable to acquire lock.* dvc commit --force train@1$"):
            record.close()
    record.add(second)
    record.close()
    assert not {"train@1", "train@2"} & set(ask_dvc()[1])


@pytest.mark.parametrize(
    ("path", "content", "not_recorded"),
    [
        ("params.yaml", "scales: {s1: 1, s2: 5, s3: 3}", {"train@2": ["params.yaml"]}),
        ("code.py", "other code", {f"train@{seed}": ["code.py"] for seed in (1, 2, 3)}),
        ("data/image", "other pixels", {f"train@{seed}": ["data"] for seed in (1, 2, 3)}),
    ],
)
def test_a_stage_whose_inputs_changed_while_it_ran_is_out_of_date_still(project, path, content, not_recorded):
    stages, _ = ask_dvc()
    (project / path).write_text(content)
    run(project, 1, 2, 3)
    assert tell_dvc(stages) == not_recorded
    assert {name for name in ask_dvc()[1] if name.startswith("train")} == not_recorded.keys()
