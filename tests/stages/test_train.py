"""Whole runs on tiny data: the same bytes however often, with whatever workers, and however interrupted."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from memvir.experiment import paths
from tests import tiny
from tests.stages.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "work").prepared()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outputs of a run that nothing happened to."""
    workspace = Workspace(tmp_path_factory.mktemp("undisturbed") / "work").prepared()
    assert (outcome := workspace.train()).code == 0, outcome.output
    assert (outcome := workspace.evaluate()).code == 0, outcome.output
    return workspace.outputs()


def act_at(target: str, call: int, act) -> None:
    """From now on, the `call`-th call of a function of a module (or of its class) first calls `act`."""
    import importlib

    module, *attributes, name = target.split(":")
    place = importlib.import_module(module)
    for attribute in attributes:
        place = getattr(place, attribute)
    original, calls = getattr(place, name), iter(range(1, 10**9))

    def wrapped(*arguments, **options):
        if next(calls) == call:
            act()
        return original(*arguments, **options)

    setattr(place, name, wrapped)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_leaves_history_models_and_results(undisturbed):
    run, folder = "memvir_norm_softmax/1", "runs/tiny/memvir_norm_softmax/1"
    result = json.loads(undisturbed[f"results/tiny/{run}.json"])
    assert set(result["last"]) == set(result["best"]) == {"recall_at_1", "recall_at_2", "rp", "map"}
    assert all(0 <= result["last"][m] <= result["best"][m] <= 1 for m in ("recall_at_1", "rp", "map"))
    assert result["most_virtual_classes"] == 12
    assert result["settings"]["loss"]["scale"] == 23.0 and result["settings"]["training"]["threads"] == 1
    assert {f"{folder}/{name}" for name in ("model.safetensors", "README.md")} < undisturbed.keys()
    for epoch in {*result["best_epochs"].values()} - {6}:
        assert f"{folder}/models/epoch-{epoch:04d}.safetensors" in undisturbed
    assert f"{folder}/snapshots/epoch-0003.npz" in undisturbed
    history = pd.read_csv(pd.io.common.BytesIO(undisturbed[f"{folder}/history.csv"]))
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6] and history["step"].tolist() == [5, 10, 15, 20, 25, 30]
    assert history["recall_at_1"].notna().tolist() == [False, True] * 3
    assert history["lr"].round(6).tolist() == [0.003] * 4 + [0.0003] * 2
    # the best of each watched metric is that of the history, and the evaluated models give it again
    assert result["best_epochs"].keys() == {"recall_at_1", "rp", "map"}
    for metric, epoch in result["best_epochs"].items():
        assert result["best"][metric] == history[metric].max()
        assert history.loc[history["epoch"] == epoch, metric].item() == result["best"][metric]
    # (N, M) = (2, 1): epoch 1 warms up, storing starts at step 6, so steps 8 and 10 bring 6 classes each
    growth = pd.read_csv(pd.io.common.BytesIO(undisturbed[f"{folder}/growth.csv"]))
    assert growth[["step", "num_virtual_classes"]].to_numpy().tolist() == [[0, 0], [8, 6], [10, 12]]


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("memvir.experiment.training:Trainer:train_step", 3),  # before any checkpoint
        ("memvir.experiment.training:Trainer:train_step", 18),  # within epoch 4
        ("memvir.experiment.training:Trainer:evaluate", 2),
        ("memvir.experiment.checkpoint:torch:save", 2),
        ("os:fsync", 3),  # a checkpoint's temporary file is complete, not yet renamed
        ("os:replace", 2),  # the checkpoint before has its new name, the new one not yet
        ("memvir.experiment.runs:pack", 1),
        ("os:rename", 1),  # everything written, nothing in its place
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(workspace, undisturbed, target, call):
    params = tiny.params()
    params["runtime"]["checkpoint_epochs"] = 2
    workspace.write_params(params)
    assert workspace.train(before=lambda: act_at(target, call, kill)).code == -signal.SIGKILL
    assert (outcome := workspace.train()).code == 0, outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_told_to_stop_saves_says_how_to_go_on_and_ends_in_the_same_bytes(workspace, undisturbed, number, code):
    def stop():
        os.kill(os.getpid(), number)

    # in the middle of an epoch, at its last step, and during an evaluation; each goes on where the one before stopped
    for target, call in (("train_step", 3), ("train_step", 7), ("evaluate", 1)):
        outcome = workspace.train(
            before=lambda t=target, c=call: act_at(f"memvir.experiment.training:Trainer:{t}", c, stop)
        )
        assert outcome.code == code and "run the same command again to continue" in outcome.output
        assert "runs" not in os.listdir(workspace.folder)
    outcome = workspace.train()
    assert outcome.code == 0 and "continuing at epoch" in outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == undisturbed


def test_a_stopped_runs_tensorboard_has_every_epoch_once(workspace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    workspace.train(before=lambda: act_at("memvir.experiment.training:Trainer:train_step", 18, stop))
    assert workspace.train().code == 0
    events = EventAccumulator(str(workspace.folder / paths.log_folder("tiny", "memvir_norm_softmax", 1)))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"training/loss", "training/lr", "test/map", "memory/num_virtual_classes"} <= set(tags)
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("test/recall_at_1")] == [2, 4, 6]


def test_a_checkpoint_of_other_settings_is_not_continued(workspace):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    workspace.train(before=lambda: act_at("memvir.experiment.training:Trainer:train_step", 8, stop))
    params = tiny.params()
    params["tiny"]["training"]["weight_decay"] = None
    del params["tiny"]["training"]["weight_decay"]
    params["tiny"]["training"]["optimizer"]["lr"] = 0.002
    workspace.write_params(params)
    outcome = workspace.train()
    assert outcome.code == 0
    assert "training.optimizer.lr: 0.003 -> 0.002" in outcome.output and "starting afresh" in outcome.output
    assert "continuing" not in outcome.output


def test_the_pixel_store_and_how_often_checkpoints_are_written_change_nothing(workspace, undisturbed):
    params = tiny.params()
    params["runtime"] |= {"pixel_gigabytes": 0.0, "checkpoint_epochs": 1, "workers": 2, "progress": "plain"}
    workspace.write_params(params)
    outcome = workspace.train()
    assert outcome.code == 0
    told = "tiny-train: decoded once, these 48 images would take about 12.3 kB, more than runtime.pixel_gigabytes, 0; "
    assert told in outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == undisturbed


def test_two_seeds_differ_and_a_seed_repeats(workspace, undisturbed):
    for seed in (1, 2):
        assert workspace.train(seed=seed).code == 0
    one, two = (workspace.outputs(f"runs/tiny/memvir_norm_softmax/{seed}") for seed in (1, 2))
    assert set(one.items()) < set(undisturbed.items())
    history = "runs/tiny/memvir_norm_softmax/{}/history.csv"
    assert one[history.format(1)] != two[history.format(2)]


def test_a_diverged_run_says_where_keeps_its_checkpoint_and_the_previous_result(workspace):
    assert workspace.train("norm_softmax").code == 0
    before = workspace.outputs()
    params = tiny.params(optimizer={"name": "sgd", "lr": 1e9, "lr_proxies": 1e9, "weight_decay": 1e9})
    workspace.write_params(params)
    outcome = workspace.train("norm_softmax")
    assert outcome.code == 1
    assert "tiny/norm_softmax/1: the loss became nan at epoch 1, step" in outcome.output
    assert "Traceback" not in outcome.output
    assert workspace.outputs() == before


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path):
    still = {"name": "sgd", "lr": 1e-30, "lr_proxies": 1e-30, "weight_decay": 0.0}
    workspace = Workspace(tmp_path / "work", early_stopping=2, check_epoch=1, optimizer=still).prepared()
    params = tiny.params(early_stopping=2, check_epoch=1, optimizer=still)
    params["tiny"]["model"]["freeze_batch_norm"] = True
    workspace.write_params(params)
    assert (outcome := workspace.train("norm_softmax")).code == 0, outcome.output
    history = pd.read_csv(workspace.folder / "runs/tiny/norm_softmax/1/history.csv")
    assert history["epoch"].tolist() == [1, 2, 3]


def test_early_stopping_of_memvir_waits_until_virtual_classes_are_in_use(tmp_path):
    still = {"name": "sgd", "lr": 1e-30, "lr_proxies": 1e-30, "weight_decay": 0.0}
    workspace = Workspace(tmp_path / "work").prepared()
    params = tiny.params(early_stopping=2, check_epoch=1, optimizer=still, epochs=20)
    params["tiny"]["model"]["freeze_batch_norm"] = True
    memvir = params["tiny"]["variants"]["memvir_norm_softmax"]["memvir"]
    memvir |= {"warm_up_epochs": 6, "step_gap": 5}  # 5 steps an epoch: the first virtual class comes in epoch 8
    workspace.write_params(params)
    assert (outcome := workspace.train()).code == 0, outcome.output
    history = pd.read_csv(workspace.folder / "runs/tiny/memvir_norm_softmax/1/history.csv")
    assert history["epoch"].tolist() == list(range(1, 10))
    assert history["num_virtual_classes"].tolist() == [0] * 7 + [6, 12]
    assert workspace.evaluate().code == 0
    result = json.loads((workspace.folder / "results/tiny/memvir_norm_softmax/1.json").read_text())
    assert result["last_epoch"] == 9 and result["most_virtual_classes"] == 12


def test_a_run_that_ends_under_other_settings_leaves_the_stopped_one_to_be_continued(workspace, undisturbed):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    workspace.train(before=lambda: act_at("memvir.experiment.training:Trainer:train_step", 18, stop))
    workspace.write_params(tiny.params(epochs=3))
    outcome = workspace.train()
    assert outcome.code == 0 and "training.epochs: 6 -> 3" in outcome.output
    assert "continuing" not in outcome.output
    workspace.write_params(tiny.params())
    outcome = workspace.train()
    assert outcome.code == 0 and "continuing at epoch 4" in outcome.output
    assert workspace.evaluate().code == 0
    assert workspace.outputs() == undisturbed


def test_a_run_goes_on_when_nobody_reads_its_progress_any_more(workspace):
    params = tiny.params()
    params["runtime"]["progress"] = "plain"
    workspace.write_params(params)

    def leave():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stderr = os.fdopen(writer, "w", buffering=1)

    assert workspace.train(before=leave).code == 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_optimizer_and_precision_trains(tmp_path, optimizer, precision):
    settings = {"name": optimizer, "lr": 0.001, "lr_proxies": 0.001, "weight_decay": 0.0001}
    workspace = Workspace(tmp_path / "work", optimizer=settings, precision=precision, images_per_class=2, epochs=2)
    params = tiny.params(optimizer=settings, precision=precision, images_per_class=2, epochs=2)
    params["tiny"]["variants"]["memvir_norm_softmax"].pop("snapshots")
    workspace.write_params(params)
    workspace.prepared()
    assert (outcome := workspace.train()).code == 0, outcome.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--variant", "norm", "--seed", "1"),
            "error: 'norm' is not a variant of tiny; there are: norm_softmax, memvir_",
        ),
        (
            ("--variant", "norm_softmax", "--seed", "1", "--dataset", "cars"),
            "error: 'cars' is not a recipe for data set",
        ),
    ],
)
def test_an_unknown_name_is_one_line_that_lists_the_choices(workspace, arguments, message):
    outcome = workspace.run("train", *arguments)
    assert outcome.code == 1 and outcome.output.startswith(message) and outcome.output.count("\n") == 1


def test_a_batch_larger_than_the_data_set_is_one_line(workspace):
    workspace.write_params(tiny.params(batch_size=50))
    outcome = workspace.train("norm_softmax")
    assert outcome.code == 1 and outcome.output.count("\n") == 1
    assert "error: tiny.training.batch_size: 50 is more than the 48 training images" in outcome.output


def test_what_data_and_settings_tell_is_said_before_anything_is_decoded(workspace):
    params = tiny.params()
    params["tiny"]["evaluation"]["recall_at"] = [1, 48]
    workspace.write_params(params)
    outcome = workspace.train("norm_softmax")
    assert outcome.code == 1 and outcome.output.count("\n") == 1
    assert outcome.output.startswith("error: tiny.evaluation.recall_at: 48 is more than the 47")
    assert not (workspace.folder / "scratch").exists()


@pytest.mark.parametrize("damaged", ["summary.json", "growth.csv"])
def test_evaluating_a_damaged_run_says_so(workspace, damaged):
    assert workspace.train("norm_softmax").code == 0
    (workspace.folder / "runs/tiny/norm_softmax/1" / damaged).write_text("{}")
    outcome = workspace.evaluate("norm_softmax")
    assert outcome.code == 1 and outcome.output.count("\n") == 1
    assert "runs/tiny/norm_softmax/1: summary.json or growth.csv is damaged" in outcome.output


def test_scratch_may_lie_in_the_home_folder(workspace, monkeypatch):
    monkeypatch.setenv("HOME", str(workspace.folder / "home"))
    params = tiny.params()
    params["runtime"]["scratch"] = "~/scratch"
    workspace.write_params(params)
    assert workspace.train("norm_softmax").code == 0
    assert (workspace.folder / "home" / "scratch" / "pixels").is_dir()
    assert not (workspace.folder / "~").exists()


def test_evaluating_an_untrained_run_says_so(workspace):
    outcome = workspace.evaluate()
    assert outcome.code == 1 and "has not been trained" in outcome.output and outcome.output.count("\n") == 1


def test_a_saved_model_is_evaluated_alone(workspace):
    assert workspace.train().code == 0 and workspace.evaluate().code == 0
    before = workspace.outputs()
    model = "runs/tiny/memvir_norm_softmax/1/model.safetensors"
    run = ("--variant", "memvir_norm_softmax", "--seed", "1", "--model")
    outcome = workspace.run("evaluate", *run, model)
    assert json.loads(outcome.output) == json.loads(before["results/tiny/memvir_norm_softmax/1.json"])["last"]
    assert workspace.outputs() == before
    (workspace.folder / "notes.txt").write_text("hello, these are notes\n")
    torch.save({"weight": torch.ones(1)}, workspace.folder / "other.pt")
    for file in ("params.yaml", "notes.txt", "other.pt", "runs", "missing.safetensors"):
        outcome = workspace.run("evaluate", *run, file)
        assert outcome.code == 1 and outcome.output.startswith(f"error: {file}: "), outcome.output
        assert outcome.output.count("\n") == 1, outcome.output
    params = tiny.params()
    params["tiny"]["model"]["widths"] = [4, 9]
    workspace.write_params(params)
    outcome = workspace.run("evaluate", *run, model)
    assert outcome.code == 1 and outcome.output.count("\n") == 1
    assert "not a model of tiny's recipe: architecture.widths is [4, 8], not [4, 9]" in outcome.output


def photographs() -> dict:
    """A recipe for images that a loader process crops."""
    params = tiny.params()
    params["runtime"] |= {"workers": 1}
    train = {"kind": "random_resized_crop", "scale": [0.3, 1.0], "ratio": [0.75, 1.33], "flip": 0.5}
    params["tiny"]["images"] |= {"size": 96, "train": train, "test": {"resize": 96}}
    return params


def test_little_shared_memory_ends_a_run_in_one_line_that_suggests_workers_0(workspace):
    def shrink() -> None:
        new_mounts = 0x00020000
        mount = "mount --make-rprivate / && mount -t tmpfs -o size=100k tmpfs /dev/shm"
        if ctypes.CDLL(None).unshare(new_mounts) or subprocess.run(["sh", "-c", mount], capture_output=True).returncode:
            os._exit(77)

    workspace.write_params(photographs())
    outcome = workspace.train(before=shrink)
    if outcome.code == 77:
        pytest.skip("mounting a small file system needs root")
    assert outcome.code == 1 and outcome.output.count("\n") == 1, outcome.output
    assert outcome.output.startswith("error: runtime.workers: ") and "`workers: 0`" in outcome.output


def test_compiling_without_a_compiler_ends_a_run_in_one_line_that_suggests_not_to(workspace, tmp_path):
    def remove_compiler() -> None:
        from torch._inductor import config

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
        config.cpp.cxx = (None, str(tmp_path / "none"))

    params = tiny.params()
    params["runtime"]["compile"] = True
    workspace.write_params(params)
    outcome = workspace.train(before=remove_compiler)
    assert outcome.code == 1 and outcome.output.count("\n") == 1, outcome.output
    assert outcome.output.startswith("error: runtime.compile: ") and "`compile: false`" in outcome.output


@pytest.mark.parametrize("decay", [[], [8]], ids=["constant rates", "a decay that is still to come"])
def test_a_longer_run_continues_a_finished_one_to_the_bytes_of_an_uninterrupted_one(tmp_path, decay):
    outputs = []
    for lengths in ([9], [5, 9]):  # of 5 epochs the last is evaluated out of turn, which the longer run must not show
        workspace = Workspace(tmp_path / f"{len(lengths)}").prepared()
        for epochs in lengths:
            workspace.write_params(tiny.params(epochs=epochs, lr_decay={"epochs": decay}))
            outcome = workspace.train()
            assert outcome.code == 0, outcome.output
        assert ("continuing at epoch 5" in outcome.output) == (len(lengths) == 2), outcome.output
        assert workspace.evaluate().code == 0
        outputs.append(workspace.outputs())
    assert outputs[0] == outputs[1]


def test_a_longer_run_under_another_schedule_says_why_it_starts_afresh(workspace):
    workspace.write_params(tiny.params(epochs=5, lr_decay={"epochs": []}))
    assert workspace.train().code == 0
    workspace.write_params(tiny.params(epochs=8, lr_decay={"epochs": [3]}))
    outcome = workspace.train()
    assert outcome.code == 0 and "continuing" not in outcome.output
    assert "cannot be continued (training.epochs: 5 -> 8; training.lr_decay.epochs: [] -> [3])" in outcome.output


def test_a_finished_run_that_was_lost_is_finished_again_without_training(workspace, undisturbed):
    for _ in range(2):
        outcome = workspace.train()
        assert outcome.code == 0
        shutil.rmtree(workspace.folder / "runs")
    assert "continuing at epoch 6" in outcome.output
    assert workspace.train().code == 0 and workspace.evaluate().code == 0
    assert workspace.outputs() == undisturbed


def test_the_same_result_stays_as_it_is_with_what_made_it_first(workspace):
    assert workspace.train().code == 0 and workspace.evaluate().code == 0
    file = workspace.folder / "results" / "tiny" / "memvir_norm_softmax" / "1.json"
    content = json.loads(file.read_text())
    assert content["made_by"]["training"]["environment"]["processor"]
    content["made_by"]["training"]["environment"]["processor"] = "another"
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    assert workspace.evaluate().code == 0 and file.read_bytes() == before
    content["last"]["map"] /= 2
    file.write_text(json.dumps(content))
    assert workspace.evaluate().code == 0
    assert json.loads(file.read_text())["made_by"]["training"]["environment"]["processor"] != "another"


def test_recall_at_other_k_is_evaluated_without_training(workspace):
    assert workspace.train().code == 0
    params = tiny.params()
    params["tiny"]["evaluation"] |= {"recall_at": [1, 4, 8], "nmi": True}
    workspace.write_params(params)
    assert workspace.evaluate().code == 0
    result = json.loads((workspace.folder / "results" / "tiny" / "memvir_norm_softmax" / "1.json").read_text())
    metrics = {"recall_at_1", "recall_at_4", "recall_at_8", "rp", "map", "nmi"}
    assert set(result["last"]) == set(result["best"]) == metrics
