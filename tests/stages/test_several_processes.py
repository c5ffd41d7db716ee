"""A run of two processes as a user meets it: stopped, bereft of one of them, and continued."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.stages.workspace import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    params = tiny.params(epochs=200, check_epoch=200)
    params["tiny"]["model"]["freeze_batch_norm"] = True
    params["runtime"] = {**params.get("runtime", {}), "processes": 2, "checkpoint_epochs": 1}
    made = Workspace(tmp_path / "work")
    made.write_params(params)
    return made.prepared()


def start(workspace: Workspace) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.train", "--dataset", "tiny", "--variant", "memvir_norm_softmax"]
    return subprocess.Popen(
        [*command, "--seed", "1"],
        cwd=workspace.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_a_new_checkpoint(workspace: Workspace, run: subprocess.Popen) -> None:
    known = {path: path.stat().st_mtime_ns for path in workspace.folder.rglob("checkpoints/**/*.pt")}
    while all(path.stat().st_mtime_ns == known.get(path) for path in workspace.folder.rglob("checkpoints/**/*.pt")):
        assert run.poll() is None, run.communicate()[0]
        select.select([], [], [], 0.02)  # the processes need the cores


def wrong_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("error", "Traceback", "[rank", "W1", "E1"))]


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process by what Linux says of it")
def test_a_killed_process_and_a_signal_are_one_line_each_and_the_run_goes_on(workspace):
    run = start(workspace)
    wait_for_a_new_checkpoint(workspace, run)
    (second,) = [child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == "1"]
    second.kill()
    output = run.communicate()[0]
    assert run.returncode == 1, output
    *others, last = wrong_lines(output)
    assert last.startswith("error: process 1 of the 2 of this run was killed (SIGKILL, perhaps for want of memory)"), (
        output
    )
    assert all(line.startswith("error: another process of this run has gone (") for line in others)

    run = start(workspace)
    wait_for_a_new_checkpoint(workspace, run)
    run.send_signal(signal.SIGTERM)
    output = run.communicate()[0]
    assert run.returncode == 128 + signal.SIGTERM, output
    assert "continuing at epoch" in output and "saved at epoch" in output and not wrong_lines(output), output
