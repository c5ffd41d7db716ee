"""The whole pipeline as DVC runs it, one after another and side by side."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from dvc.repo import Repo
from filelock import FileLock

from tests.memvir.sweep.ray_cluster import Cluster, can_hide, wait_for
from tests.stages.project import Project, params

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


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


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
    for folder in ("memvir/models", "memvir/images"):
        cache = project.folder / folder / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / "left.cpython-311.pyc").write_bytes(b"bytecode")
    outcome = project.run("dvc", "repro")
    assert outcome.returncode == 0 and stages_run(outcome.stdout) == []


def test_going_back_to_earlier_settings_takes_the_runs_from_the_cache(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "project")
    project = Project(tmp_path / "project")
    changed = params()
    changed["tiny"]["variants"]["norm_softmax"]["loss"]["scale"] = 20.0
    project.write_params(changed)
    train = "train@tiny-norm_softmax-1"
    assert stages_run(project.run("dvc", "repro", train).stdout) == ["settings@tiny", train]
    assert project.outputs("runs") != finished.outputs("runs")
    project.write_params(params())
    assert stages_run(project.run("dvc", "repro", train).stdout) == ["settings@tiny"]
    assert project.outputs("runs") == finished.outputs("runs")


def test_an_experiment_in_another_folder_and_a_clone_download_nothing_again(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "project")
    project = Project(tmp_path / "project")
    assert project.run("dvc", "add", "dataset/tiny/source").returncode == 0
    project.commit()
    assert tracked(project, "dataset") == ["dataset/tiny/.gitignore", "dataset/tiny/source.dvc"]
    scale = "tiny.variants.norm_softmax.loss.scale=20"
    train = "train@tiny-norm_softmax-1"
    outcome = project.run("dvc", "exp", "run", "--temp", "--set-param", scale, train)
    assert outcome.returncode == 0, outcome.stdout
    assert stages_run(outcome.stdout) == ["prepare@tiny", "settings@tiny", train]

    assert project.run("dvc", "remote", "add", "--default", "shelf", str(tmp_path / "shelf")).returncode == 0
    project.commit()
    assert project.run("dvc", "push").returncode == 0
    subprocess.run(["git", "clone", "--quiet", project.folder, tmp_path / "clone"], check=True)
    clone = Project(tmp_path / "clone")
    outcome = clone.run("dvc", "pull", train)
    assert outcome.returncode == 0, outcome.stdout
    assert clone.outputs("runs") == finished.outputs("runs/tiny/norm_softmax/1"), "one model alone"
    outcome = clone.run("dvc", "pull")
    assert outcome.returncode == 0, outcome.stdout
    assert stages_run(clone.run("dvc", "repro").stdout) == ["prepare@tiny"]
    assert clone.outputs(*FOLDERS) == finished.outputs(*FOLDERS)


def tracked(project: Project, folder: str) -> list[str]:
    command = ["git", "ls-files", folder]
    return subprocess.run(command, cwd=project.folder, check=True, capture_output=True, text=True).stdout.split()


def test_git_and_dvc_agree_on_what_is_ignored_below_dataset(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "project")
    project = Project(tmp_path / "project")
    ignored = ["index.csv", "download/", "images/", "weights/", "source/car_ims.tgz", "source/train/"]
    seen = ["", ".gitignore", "source.dvc", "source/", "source/annotation.csv", "source/car_ims.tgz.dvc"]
    with Repo(project.folder) as repo:
        for name in [*ignored, *seen]:
            path = f"dataset/mine/{name}"
            by_git = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=project.folder).returncode == 0
            assert (by_git, repo.scm.is_ignored(f"{project.folder}/{path}")) == (name in ignored, name in ignored), path


def test_a_sweep_that_is_stopped_and_killed_and_continued_leaves_the_bytes_of_a_sequential_repro(finished, tmp_path):
    project = Project.create(tmp_path / "project", patient())
    for number, moment, code in ((signal.SIGINT, "epoch 10/", 130), (signal.SIGKILL, "epoch 60/", -signal.SIGKILL)):
        sweep = project.start("stages.sweep", "--jobs", "2")
        wait_for(sweep, moment)
        sweep.send_signal(number)
        output, _ = sweep.communicate()
        assert sweep.returncode == code
        if number == signal.SIGINT:
            assert output.splitlines()[-1] == "interrupted by SIGINT; run the same command again to continue"
    outcome = project.run("stages.sweep")
    assert outcome.returncode == 0 and "continuing at epoch" in outcome.stdout, outcome.stdout
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)
    assert stages_run(project.run("dvc", "repro").stdout) == []
    assert project.run("stages.sweep").stdout == "everything is up to date\n"


def test_when_dvc_is_told_to_stop_the_run_at_work_saves_and_ends(finished, tmp_path):
    project = finished.untrained_copy(tmp_path / "project")
    content = patient()
    content["tiny"]["training"]["epochs"] = 100_000  # not over before it is stopped, on any machine
    project.write_params(content)
    command = ("dvc", "repro", "train@tiny-norm_softmax-1")
    repro = project.start(*command)
    wait_for(repro, "epoch 10/")
    repro.terminate()
    output, _ = repro.communicate()  # the run has its pipe, so to its end
    assert "saved at epoch" in output and "Traceback" not in output
    repro = project.start(*command)
    wait_for(repro, "continuing at epoch")
    repro.terminate()
    repro.communicate()


def test_a_second_sweep_says_that_another_is_at_work(finished):
    with FileLock(finished.folder / ".dvc" / "tmp" / "sweep.lock"):
        outcome = finished.run("stages.sweep")
    assert outcome.returncode == 1
    assert outcome.stdout.splitlines()[-1] == (
        "error: .dvc/tmp/sweep.lock: another process is at a sweep of this folder; wait for it or stop it"
    )


def test_what_fails_is_named_and_the_rest_is_done(finished, tmp_path):
    project = finished.untrained_copy(tmp_path / "project")
    in_the_way = project.folder / "scratch" / "checkpoints" / "tiny" / "memvir_norm_softmax"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder should be")
    outcome = project.run("stages.sweep")
    assert outcome.returncode == 1
    assert "epoch 120/120" not in outcome.stdout  # progress: none
    lines = outcome.stdout.splitlines()
    failing = "train@tiny-memvir_norm_softmax-1"
    assert any(line.startswith(f"{failing} failed: error: ") for line in lines)
    assert lines[-1] == f"error: 1 stage failed: {failing}; everything that does not depend on this is done"
    assert {Path(name).parent.name for name in project.outputs("results")} == {"norm_softmax"}
    out_of_date = project.run("stages.sweep", "--plan").stdout
    assert f"evaluate@tiny-memvir_norm_softmax-1 after {failing}" in out_of_date
    assert "tiny-norm_softmax-1" not in out_of_date.replace("after", "\n")


def test_when_a_node_of_a_cluster_dies_its_run_goes_on_elsewhere_to_the_same_bytes(finished, tmp_path, cluster):
    project = finished.untrained_copy(tmp_path / "project")
    project.end_with_evaluation()
    project.write_params(patient())
    second = cluster.add_node()
    sweep = project.start("stages.sweep", "--address", cluster.address)
    cluster.wait_for_run_on_second(sweep)
    cluster.kill(second)
    output, _ = sweep.communicate()
    assert sweep.returncode == 0 and "continuing at epoch" in output, output
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)


@pytest.mark.skipif(not can_hide(), reason="needs a file system view of its own for a node")
def test_a_node_without_the_folder_sends_home_checkpoints_and_results(finished, tmp_path, cluster):
    project = finished.untrained_copy(tmp_path / "project")
    project.end_with_evaluation()
    project.write_params(patient())
    copies = set(Path(tempfile.gettempdir()).glob("memvir-*"))
    node = cluster.add_node(hide=project.folder)
    sweep = project.start("stages.sweep", "--address", cluster.address)
    _, variant, _ = cluster.wait_for_run_on_second(sweep).split("/")
    sweep.send_signal(signal.SIGINT)
    output, _ = sweep.communicate()
    assert sweep.returncode == 130, output
    assert list((project.folder / "scratch" / "checkpoints" / "tiny" / variant / "1").glob("*.pt"))
    outcome = project.run("stages.sweep", "--address", cluster.address)
    cluster.kill(node)
    assert outcome.returncode == 0, outcome.stdout
    assert len(set(re.findall(r"train\w* on \S+ \((\w+)\)", outcome.stdout))) == 2
    assert project.outputs(*FOLDERS) == finished.outputs(*FOLDERS)
    assert set(Path(tempfile.gettempdir()).glob("memvir-*")) <= copies
