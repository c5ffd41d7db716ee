"""A disk that is full: one line that names path and space, and after freeing some the same bytes as ever."""

import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.stages.workspace import Workspace


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of so many kilobytes; called again, it changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes: int, at: Path = folder) -> Path:
        option = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kilobytes}k", "tmpfs", str(at)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(at)
        return at

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(mounted[0])], check=True)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "work").prepared()


@pytest.fixture
def expected(tmp_path):
    undisturbed = Workspace(tmp_path / "undisturbed").prepared()
    assert undisturbed.train().code == 0 and undisturbed.evaluate().code == 0
    return undisturbed.outputs()


def use_scratch(workspace: Workspace, scratch: Path) -> None:
    params = tiny.params()
    params["runtime"] |= {"scratch": str(scratch), "checkpoint_epochs": 1}
    workspace.write_params(params)


def test_without_room_for_the_decoded_images_a_run_says_so_before_it_starts(workspace, small_disk):
    use_scratch(workspace, small_disk(4))
    outcome = workspace.train()
    assert outcome.code == 1 and outcome.output.count("\n") == 1
    assert "/disk/pixels/tiny-train-" in outcome.output and "GB free" in outcome.output


def test_without_room_for_a_checkpoint_a_run_stops_and_later_ends_in_the_same_bytes(workspace, small_disk, expected):
    disk = small_disk(100)
    use_scratch(workspace, disk)
    outcome = workspace.train()
    assert outcome.code == 1 and outcome.output.count("\n") == 1, outcome.output
    assert "No space left on device; a checkpoint needs 0.0" in outcome.output
    assert "MB: free some space" in outcome.output
    small_disk(2000)
    assert (outcome := workspace.train()).code == 0, outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == expected


@pytest.mark.parametrize("folder", ["runs", "results"])
def test_without_room_for_results_a_stage_stops_and_later_ends_in_the_same_bytes(
    workspace, small_disk, expected, folder
):
    (workspace.folder / folder).mkdir()
    disk = small_disk(4, workspace.folder / folder)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(4096))
    first, then = (workspace.train(), workspace.evaluate())
    failed = first if folder == "runs" else then
    assert failed.code == 1 and failed.output.count("\n") == 1, failed.output
    assert f"error: {folder}/tiny/memvir_norm_softmax" in failed.output and "No space left" in failed.output
    small_disk(2000, workspace.folder / folder)
    ballast.unlink()
    assert (outcome := workspace.train()).code == 0, outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == expected
