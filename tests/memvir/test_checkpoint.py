"""A checkpoint is whole, the one before it, or none; never something else."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memvir.checkpoint import Checkpoint
from memvir.errors import UserError

FINGERPRINT = {"training.epochs": "3", "code": "abc"}


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path / "run.pt", FINGERPRINT)


def test_what_is_saved_is_loaded(checkpoint):
    assert checkpoint.load() is None
    checkpoint.save({"weights": torch.arange(3.0), "epoch": 2})
    state = checkpoint.load()
    assert torch.equal(state["weights"], torch.arange(3.0)) and state["epoch"] == 2


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), how=st.sampled_from(["truncate", "flip", "empty"]))
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(checkpoint, caplog, where, how):
    checkpoint.remove()
    checkpoint.save({"epoch": 1})
    checkpoint.save({"epoch": 2})
    content = bytearray(checkpoint.path.read_bytes())
    place = min(int(where * len(content)), len(content) - 1)
    if how == "flip":
        content[place] ^= 0x10
    checkpoint.path.write_bytes({"truncate": content[:place], "flip": content, "empty": b""}[how])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load() == {"epoch": 1}
    assert f"{checkpoint.path}: damaged" in caplog.text


def test_two_damaged_checkpoints_are_a_fresh_start_and_said(checkpoint, caplog):
    checkpoint.save({"epoch": 1})
    checkpoint.save({"epoch": 2})
    checkpoint.path.write_bytes(b"x")
    checkpoint.previous.write_bytes(b"y")
    assert checkpoint.load() is None
    assert "starting afresh" in caplog.text


def test_other_settings_start_afresh_and_say_which(checkpoint, caplog):
    checkpoint.save({"epoch": 1})
    other = Checkpoint(checkpoint.path, {**FINGERPRINT, "training.epochs": "4"})
    assert other.load() is None
    assert "training.epochs: 3 -> 4" in caplog.text


def test_a_kill_between_the_two_renames_leaves_the_checkpoint_before(checkpoint):
    checkpoint.save({"epoch": 1})
    os.replace(checkpoint.path, checkpoint.previous)
    assert checkpoint.load() == {"epoch": 1}


def test_a_failed_write_keeps_what_there_was(checkpoint, monkeypatch):
    checkpoint.save({"epoch": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"run\.pt: No space left on device; a checkpoint needs .* MB"):
        checkpoint.save({"epoch": 2})
    assert checkpoint.load() == {"epoch": 1}
    assert not list(checkpoint.path.parent.glob(".*part"))


def test_a_second_process_on_the_same_run_says_so_and_a_dead_ones_lock_is_taken_over(checkpoint):
    code = (
        "import sys; from pathlib import Path; from memvir.checkpoint import Checkpoint\n"
        f"with Checkpoint(Path({str(checkpoint.path)!r}), {{}}).locked(): print('held', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process"), checkpoint.locked():
        pass
    holder.kill()
    holder.wait()
    with checkpoint.locked():
        pass


def test_a_pickle_with_code_in_a_checkpoint_is_not_executed(checkpoint, tmp_path):
    import hashlib
    import pickle

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    content = pickle.dumps(Attack())
    checkpoint.path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load()
    assert not (tmp_path / "executed").exists()
