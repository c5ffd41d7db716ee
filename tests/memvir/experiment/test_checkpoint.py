"""A checkpoint is whole, the one before it, or none; never something else."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memvir.errors import UserError
from memvir.experiment.checkpoint import Checkpoint, prune
from memvir.experiment.lock import in_turn

IDENTITY = {"training.epochs": "3", "code": "abc"}


class AtOnce(Checkpoint):
    """Waits for the thread that writes."""

    def save(self, state):
        super().save(state)
        self.flush()


@pytest.fixture
def checkpoint(tmp_path):
    return AtOnce(tmp_path / "run", IDENTITY)


def test_training_goes_on_while_a_thread_writes_what_there_was(tmp_path, monkeypatch):
    checkpoint, weights, go = Checkpoint(tmp_path / "run", IDENTITY), torch.zeros(3), threading.Event()
    really = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (go.wait(), really(file)))
    rows = [{"epoch": 1, "weights": (weights,)}]
    checkpoint.save({"rows": rows, "weights": weights[1:]})
    weights += 1
    rows[0]["epoch"] = 2
    assert not checkpoint.path.exists()
    go.set()
    checkpoint.flush()
    state = checkpoint.load()
    assert torch.equal(state["weights"], torch.zeros(2)) and state["rows"][0]["epoch"] == 1
    assert torch.equal(state["rows"][0]["weights"][0], torch.zeros(3))


def test_before_a_run_is_let_go_its_last_state_is_on_the_disk(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    with checkpoint.locked():
        checkpoint.save({"epoch": 1})
        checkpoint.save({"epoch": 2})
    assert AtOnce(tmp_path / "run", IDENTITY).load() == {"epoch": 2} and checkpoint.previous.exists()


def test_what_goes_wrong_while_writing_ends_the_run_with_one_line_and_is_said_in_any_case(
    tmp_path, monkeypatch, caplog
):
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"), checkpoint.locked():
        checkpoint.save({"epoch": 1})
    other = Checkpoint(tmp_path / "other", IDENTITY)
    with pytest.raises(KeyError, match="another fault"), other.locked():
        other.save({"epoch": 1})
        raise KeyError("another fault")
    assert "No space left on device" in caplog.text


def test_what_is_saved_is_loaded(checkpoint):
    assert checkpoint.load() is None
    checkpoint.save({"weights": torch.arange(3.0), "epoch": 2})
    state = checkpoint.load()
    assert torch.equal(state["weights"], torch.arange(3.0)) and state["epoch"] == 2


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), how=st.sampled_from(["truncate", "flip", "empty"]))
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(checkpoint, caplog, where, how):
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


def test_under_other_settings_a_run_starts_afresh_says_which_and_leaves_the_checkpoint_alone(checkpoint, caplog):
    checkpoint.save({"epoch": 1})
    checkpoint.save({"epoch": 200})
    other = AtOnce(checkpoint.folder, {**IDENTITY, "training.epochs": "4"})
    assert other.load() is None
    assert "(training.epochs: 3 -> 4)" in caplog.text and "starting afresh" in caplog.text
    assert caplog.text.count("\n") == 1
    other.save({"epoch": 1})
    other.save({"epoch": 2})
    caplog.clear()
    assert checkpoint.load() == {"epoch": 200} and other.load() == {"epoch": 2}
    assert not caplog.text
    checkpoint.path.unlink()
    assert checkpoint.load() == {"epoch": 1}


def test_of_several_earlier_checkpoints_the_latest_intact_one_is_mentioned(checkpoint, caplog):
    for age, epochs in ((30, "7"), (20, "8"), (10, "9")):
        earlier = AtOnce(checkpoint.folder, {**IDENTITY, "training.epochs": epochs})
        earlier.save({})
        os.utime(earlier.path, (1e9 - age, 1e9 - age))
    earlier.path.write_bytes(b"x")
    assert checkpoint.load() is None
    assert "training.epochs: 8 -> 3" in caplog.text and caplog.text.count("\n") == 1


def test_the_order_of_an_identity_does_not_matter(checkpoint):
    assert AtOnce(checkpoint.folder, dict(reversed(IDENTITY.items()))).path == checkpoint.path


def test_the_last_state_of_a_finished_run_stays_and_the_one_before_goes(checkpoint):
    checkpoint.save({"epoch": 1})
    checkpoint.save({"epoch": 2})
    checkpoint.finish()
    assert list(checkpoint.folder.iterdir()) == [checkpoint.path] and checkpoint.load() == {"epoch": 2}


def test_a_run_goes_on_from_the_furthest_state_of_another_that_it_continues(checkpoint, caplog):
    for epochs, step in (("1", 10), ("2", 20), ("9", 90)):
        other = AtOnce(checkpoint.folder, {**IDENTITY, "training.epochs": epochs})
        other.save({"position": {"step": step}})
    with caplog.at_level(logging.INFO):
        state = checkpoint.load(lambda old, new, state: int(old["training.epochs"]) < int(new["training.epochs"]))
    assert state == {"position": {"step": 20}} and "goes on from there (training.epochs: 2 -> 3)" in caplog.text


def test_another_machine_is_said_once_and_no_reason_to_start_again(checkpoint, caplog):
    AtOnce(checkpoint.folder, IDENTITY, {"device": "GPU A", "torch": "2.14.1"}).save({"epoch": 1})
    here = AtOnce(checkpoint.folder, IDENTITY, {"device": "GPU B", "torch": "2.14.1"})
    assert here.load() == {"epoch": 1}
    assert caplog.text.count("\n") == 1 and "continued elsewhere (device: GPU A -> GPU B)" in caplog.text


def test_beyond_their_budget_the_oldest_checkpoints_go_and_the_present_ones_never(tmp_path):
    files = [tmp_path / "d" / f"{number}.pt" for number in range(4)]
    files[0].parent.mkdir()
    for age, file in enumerate(files):
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 + age, 1e9 + age))
    prune(tmp_path, 400, lambda path: False)
    assert all(file.exists() for file in files)
    prune(tmp_path, 250, lambda path: path == files[0])
    assert [file.exists() for file in files] == [True, False, False, True]
    prune(tmp_path, 0, lambda path: path == files[0])
    assert [file.exists() for file in files] == [True, False, False, False]


def test_a_kill_between_the_two_renames_leaves_the_checkpoint_before(checkpoint):
    checkpoint.save({"epoch": 1})
    os.replace(checkpoint.path, checkpoint.previous)
    assert checkpoint.load() == {"epoch": 1}


def test_a_failed_write_keeps_what_there_was(checkpoint, monkeypatch):
    checkpoint.save({"epoch": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"run/\w{12}\.pt: No space left on device; a checkpoint needs .* MB"):
        checkpoint.save({"epoch": 2})
    assert checkpoint.load() == {"epoch": 1}
    assert not list(checkpoint.path.parent.glob(".*part"))


def test_a_second_process_on_the_same_run_says_so_and_a_dead_ones_lock_is_taken_over(checkpoint):
    code = (
        "import sys; from pathlib import Path; from memvir.experiment.checkpoint import Checkpoint\n"
        f"with Checkpoint(Path({str(checkpoint.folder)!r}), {{}}).locked(): print('held', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[3]
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
    checkpoint.folder.mkdir()
    checkpoint.path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load()
    assert not (tmp_path / "executed").exists()


def test_runs_that_start_together_prune_together(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.pt").write_bytes(bytes(100))
    prune(tmp_path, 0, lambda path: path.unlink(missing_ok=True))  # another process is faster each time
    assert not list(tmp_path.glob("*.pt"))
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")  # listed, and not there when asked for its size
    prune(tmp_path, 0, lambda path: False)


def test_work_that_is_only_slower_at_once_is_done_in_turn_but_not_waited_for_for_ever(tmp_path, caplog):
    path, other = tmp_path / "scratch" / "lock", FileLock(tmp_path / "scratch" / "lock")
    with in_turn(path, "decoding"), pytest.raises(Timeout):
        other.acquire(timeout=0)
    with other, caplog.at_level("INFO", "memvir"), in_turn(path, "decoding", seconds=0):
        assert other.is_locked
    assert caplog.messages == [f"{path}: waiting for another process that is decoding"]
    other.acquire(timeout=0)
    other.release()
