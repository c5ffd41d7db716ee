"""The whole pipeline as DVC runs it, one after another and side by side."""

import importlib.util
import json

import pytest

from tests.stages.project import Project, params


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("sequential") / "project", params())
    outcome = project.run("dvc", "repro")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return project


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_dvc_repro_makes_results_tables_and_metrics(finished):
    outputs = finished.outputs("results", "reports")
    assert {"results/tiny/norm_softmax/1.json", "results/tiny/memvir_norm_softmax/1.json"} <= set(outputs)
    metrics = json.loads(outputs["reports/metrics.json"])["tiny"]
    result = json.loads(outputs["results/tiny/norm_softmax/1.json"])
    assert metrics["norm_softmax"]["map"]["mean"] == pytest.approx(100 * result["last"]["map"], abs=0.005)
    assert b"MemVir + Norm-SoftMax" in outputs["reports/tiny/tables.md"]


def test_a_second_repro_has_nothing_to_do(finished):
    outcome = finished.run("dvc", "repro")
    assert outcome.returncode == 0 and stages_run(outcome.stdout) == []


def test_what_changes_runs_again_and_nothing_else(finished):
    before = finished.outputs("runs/tiny/memvir_norm_softmax", "results/tiny/memvir_norm_softmax")
    changed = params()
    changed["runtime"] |= {"workers": 0, "checkpoint_epochs": 3}
    finished.write_params(changed)
    assert stages_run(finished.run("dvc", "repro", "--dry").stdout) == []
    changed["tiny"]["variants"]["norm_softmax"]["loss"]["scale"] = 20.0
    finished.write_params(changed)
    first = [s for s in stages_run(finished.run("dvc", "repro", "--dry").stdout) if s.startswith(("train", "eval"))]
    assert first == ["train@tiny-norm_softmax-1", "evaluate@tiny-norm_softmax-1"]
    finished.write_params(params())
    assert stages_run(finished.run("dvc", "repro", "--dry").stdout) == []
    assert finished.outputs("runs/tiny/memvir_norm_softmax", "results/tiny/memvir_norm_softmax") == before


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="a sweep needs Ray")
def test_a_sweep_leaves_the_bytes_of_a_sequential_repro_and_nothing_to_do(finished, tmp_path):
    project = Project(tmp_path / "project", params())
    outcome = project.run("stages.sweep", "--jobs", "2")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "epoch 6/6" not in outcome.stderr  # progress: none
    assert "(5 of 5)" in outcome.stderr
    folders = ("results", "reports", "runs")
    assert project.outputs(*folders) == finished.outputs(*folders)
    assert stages_run(project.run("dvc", "repro").stdout) == []
