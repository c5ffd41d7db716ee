"""The whole pipeline as DVC runs it, one after another and side by side."""

import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.stages.project import Project, params
from tests.stages.ray_cluster import Cluster, can_hide, wait_for

FOLDERS = ("results", "reports", "runs")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A project after `dvc repro`, made by one worker of pytest for all; copy it before changing anything."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "finished.lock"):
        if (shared / "finished.log").exists():
            return Project(shared / "finished")
        project = Project.create(shared / "finished", params())
        outcome = project.run("dvc", "repro")
        assert outcome.returncode == 0, outcome.stdout
        (shared / "finished.log").write_text(outcome.stdout)
    return project


def patient() -> dict:
    """The same numbers, with lines to wait for and checkpoints to continue from."""
    content = params()
    content["runtime"] |= {"progress": "plain", "checkpoint_epochs": 5}
    return content


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_dvc_repro_makes_results_tables_and_metrics(finished):
    outputs = finished.outputs("results", "reports")
    assert {"results/tiny/norm_softmax/1.json", "results/tiny/memvir_norm_softmax/1.json"} <= set(outputs)
    metrics = json.loads(outputs["reports/metrics.json"])["tiny"]
    result = json.loads(outputs["results/tiny/norm_softmax/1.json"])
    assert metrics["norm_softmax"]["map"]["mean"] == pytest.approx(100 * result["last"]["map"], abs=0.005)
    assert b"MemVir + Norm-SoftMax" in outputs["reports/tiny/tables.md"]


def test_a_second_repro_has_nothing_to_do_whatever_bytecode_python_left(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "project")
    project = Project(tmp_path / "project")
    for folder in ("memvir/models", "memvir/datasets"):
        cache = project.folder / folder / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / "left.cpython-311.pyc").write_bytes(b"bytecode")
    outcome = project.run("dvc", "repro")
    assert outcome.returncode == 0 and stages_run(outcome.stdout) == []


def test_what_changes_runs_again_and_nothing_else(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "project")
    finished = Project(tmp_path / "project")
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


def test_a_sweep_that_is_stopped_and_continued_leaves_the_bytes_of_a_sequential_repro(finished, tmp_path):
    project = Project.create(tmp_path / "project", patient())
    sweep = project.start("stages.sweep", "--jobs", "2")
    wait_for(sweep, "epoch 10/120")
    sweep.send_signal(signal.SIGINT)
    output, _ = sweep.communicate()
    assert sweep.returncode == 130 and "stopped; run the same command again to continue" in output, output
    outcome = project.run("stages.sweep", "--jobs", "2")
    assert outcome.returncode == 0 and "continuing at epoch" in outcome.stdout, outcome.stdout
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)
    assert stages_run(project.run("dvc", "repro").stdout) == []


def test_what_fails_is_named_and_the_rest_is_done(finished, tmp_path):
    project = finished.untrained_copy(tmp_path / "project")
    in_the_way = project.folder / "scratch" / "checkpoints" / "tiny" / "memvir_norm_softmax"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder should be")
    outcome = project.run("stages.sweep", "--jobs", "2")
    assert outcome.returncode == 1
    assert "epoch 120/120" not in outcome.stdout  # progress: none
    lines = outcome.stdout.splitlines()
    assert any(line.startswith("train@tiny-memvir_norm_softmax-1 failed: error: ") for line in lines)
    assert any(line.startswith("evaluate@tiny-memvir_norm_softmax-1 failed: not run, since train@") for line in lines)
    assert lines[-1] == "2 of 5 stages failed; the others are done"
    assert set(project.outputs("results")) == {"results/tiny/norm_softmax/1.json"}
    out_of_date = project.run("stages.sweep", "--plan").stdout
    assert "tiny-memvir_norm_softmax-1" in out_of_date and "tiny-norm_softmax-1" not in out_of_date


def test_when_a_node_of_a_cluster_dies_its_run_goes_on_elsewhere_to_the_same_bytes(finished, tmp_path):
    project = finished.untrained_copy(tmp_path / "project")
    project.write_params(patient())
    with Cluster() as cluster:
        second = cluster.add_node()
        sweep = project.start("stages.sweep", "--address", cluster.address)
        cluster.wait_for_run_on_second(sweep)
        cluster.kill(second)
        output, _ = sweep.communicate()
    assert sweep.returncode == 0 and "continuing at epoch" in output and "(5 of 5)" in output, output
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)


@pytest.mark.skipif(not can_hide(), reason="needs a file system view of its own for a node")
def test_a_node_without_the_folder_sends_home_checkpoints_and_results(finished, tmp_path):
    project = finished.untrained_copy(tmp_path / "project")
    project.write_params(patient())
    copies = set(Path(tempfile.gettempdir()).glob("memvir-*"))
    with Cluster() as cluster:
        cluster.add_node(hide=project.folder)
        sweep = project.start("stages.sweep", "--address", cluster.address)
        _, variant, _ = cluster.wait_for_run_on_second(sweep).split("/")
        sweep.send_signal(signal.SIGINT)
        output, _ = sweep.communicate()
        assert sweep.returncode == 130, output
        assert (project.folder / "scratch" / "checkpoints" / "tiny" / variant / "1.pt").exists()
        outcome = project.run("stages.sweep", "--address", cluster.address)
    assert outcome.returncode == 0, outcome.stdout
    assert len(set(re.findall(r"train\w* on \S+ \((\w+)\)", outcome.stdout))) == 2
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)
    assert set(Path(tempfile.gettempdir()).glob("memvir-*")) <= copies
