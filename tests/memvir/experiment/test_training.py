"""The loop without files: every variant on every kind of device, several processes as one, and golden losses."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memvir.experiment.data import TrainingData
from memvir.experiment.settings import Run, Runtime
from memvir.experiment.training import Trainer, evaluate
from memvir.images.batches import TestImages
from memvir.memory import MemVir
from memvir.params import Params, load_params, parse_params
from tests import tiny
from tests.forked import forked

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PAPER = ["norm_softmax", "memvir_norm_softmax", "proxy_nca", "memvir_proxy_nca"]
GOLDEN = [
    12.010452,
    7.211251,
    4.958006,
    6.443319,
    7.827163,
    7.290470,
    3.401642,
    7.025240,
    5.168737,
    6.671463,
    5.295722,
    5.675337,
    5.138846,
    5.431641,
    4.880141,
]


class Noise:
    """Random training images, a function of the epoch; the interface of TrainImages."""

    def __init__(self, run: Run, labels: np.ndarray, device: torch.device) -> None:
        self.shape = (1 if run.images.channels == "grey" else 3, run.images.size, run.images.size)
        self.labels = torch.from_numpy(labels).to(device)
        self.device = device

    def batches(self, batches, epoch):
        images = torch.randn(len(self.labels), *self.shape, generator=torch.Generator().manual_seed(epoch))
        for batch in batches:
            chosen = torch.from_numpy(batch)
            yield images[chosen].to(self.device), self.labels[chosen.to(self.device)]


class Quiet:
    stop_requested = False


def make_trainer(run: Run, classes=6, per_class=8, device=CPU, **options) -> Trainer:
    labels = np.repeat(np.arange(classes), per_class)
    pixels = np.random.default_rng(0).integers(0, 256, (12, run.images.size, run.images.size), dtype=np.uint8)
    test = TestImages(pixels, run.images, device)
    data = TrainingData(Noise(run, labels, device), labels, test, np.repeat(np.arange(3), 4))
    return Trainer(run, data, device, None, Runtime(), **options)


def tiny_params(**training) -> Params:
    return parse_params(tiny.params(**training))


def test_the_loss_curve_is_the_one_it_always_was():
    """A merge rule: whoever changes these numbers changes every result. Recorded from this code's first version."""
    trainer = make_trainer(tiny_params().run("tiny", "memvir_norm_softmax", 1))
    losses = []
    for _ in range(3):
        trainer.train_epoch(Quiet())
        losses += trainer.losses.tolist()
        trainer._finish_epoch()
    assert trainer.loss.num_virtual_classes == 12
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


def test_a_baseline_and_its_memvir_variant_start_alike_and_differ_once_virtual_classes_are_in_use():
    params = tiny_params()
    baseline, memvir = (make_trainer(params.run("tiny", v, 1)) for v in params.variants)
    for trainer in (baseline, memvir):
        for _ in range(2):
            trainer.train_epoch(Quiet())
            trainer._finish_epoch()
    first, second = (trainer.history.rows for trainer in (baseline, memvir))
    assert first[0]["loss"] == second[0]["loss"]  # the warm-up epoch
    assert first[1]["loss"] < second[1]["loss"]  # more classes to tell apart


RIVALS: dict = {
    "proxy_synthesis": {"loss": {"name": "proxy_anchor"}, "proxy_synthesis": {"mu": 0.5}},
    "virtual_softmax": {"loss": {"name": "softmax"}, "virtual_softmax": {}},
    "broadface": {"loss": {"name": "arcface"}, "broadface": {"queue_size": 15, "warm_up_epochs": 1}},
}


def paper_runs() -> list[Run]:
    params = load_params(ROOT / "params.yaml")
    runs = [params.run(d, v, 1) for d in ("glyphs", "cars196") for v in params.recipes[d].variants]
    raw = copy.deepcopy(tiny.params())
    for loss in ("softmax", "cosface", "arcface", "proxy_anchor"):
        raw["tiny"]["variants"][loss] = {"loss": {"name": loss}}
        raw["tiny"]["variants"][f"memvir_{loss}"] = {
            "loss": {"name": loss},
            "memvir": {"num_steps": 2, "step_gap": 1, "warm_up_epochs": 0},
        }
    raw["tiny"]["variants"] |= RIVALS
    other = parse_params(raw)
    return runs + [other.run("tiny", v, 1) for v in other.recipes["tiny"].variants]


@pytest.mark.parametrize("run", paper_runs(), ids=lambda run: f"{run.dataset}-{run.variant}")
def test_a_training_step_of_every_variant_runs_without_numbers(run):
    """On torch's meta device a hard-coded device or a host synchronisation is an error."""
    meta = torch.device("meta")
    run = run.model_copy(update={"model": run.model.model_copy(update={"pretrained": "none"})})
    trainer = make_trainer(run, classes=98, per_class=2, device=meta)
    channels = 1 if run.images.channels == "grey" else 3
    batch, size = run.training.batch_size, run.images.size
    images = torch.empty(batch, channels, size, size, device=meta)
    labels = torch.empty(batch, dtype=torch.long, device=meta)
    trainer.embedder.train()
    steps = run.memvir.step_gap + 2 if run.memvir and size < 100 else 2
    for _ in range(steps):
        loss = trainer.train_step(images, labels, batch)
    assert loss.shape == () and loss.device == meta
    if isinstance(trainer.loss, MemVir) and size < 100:
        assert trainer.loss.num_virtual_classes == 98


@pytest.mark.parametrize("variant", [*PAPER, "proxy_synthesis_norm_softmax", "broadface_norm_softmax"])
@forked
def test_a_training_step_of_the_papers_size_runs_in_mixed_precision_without_numbers(variant, monkeypatch):
    """The meta device knows no autocast; fake tensors do, and a host synchronisation is an error to them as well."""
    run = load_params(ROOT / "params.yaml").run("cars196", variant, 1)
    model, training = run.model.model_copy(update={"pretrained": "none"}), run.training
    memvir = run.memvir.model_copy(update={"step_gap": 1}) if run.memvir else None
    training = training.model_copy(update={"precision": "bf16"})
    run = run.model_copy(update={"model": model, "memvir": memvir, "training": training})
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)  # fake tensors are where they are
    with FakeTensorMode():
        trainer = make_trainer(run, classes=98, per_class=2)
        trainer.embedder.train()
        images, labels = torch.empty(128, 3, 224, 224), torch.empty(128, dtype=torch.long)
        seen = []
        trainer.embedder.backbone.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
        for _ in range(3 if memvir else 2):
            loss = trainer.train_step(images, labels, 128)
    if memvir:
        assert trainer.loss.num_virtual_classes == 98
    assert loss.shape == () and loss.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("variant", PAPER)
def test_a_training_step_of_the_papers_variants_runs_on_the_cpu_at_full_size(variant):
    run = load_params(ROOT / "params.yaml").run("cars196", variant, 1)
    run = run.model_copy(update={"model": run.model.model_copy(update={"pretrained": "none"})})
    trainer = make_trainer(run, classes=98, per_class=1)
    trainer.embedder.train()
    before = {name: value.clone() for name, value in trainer.embedder.named_parameters()}
    loss = trainer.train_step(torch.randn(2, 3, 224, 224) * 50, torch.tensor([3, 97]), 2)
    assert torch.isfinite(loss)
    changed = [not torch.equal(value, before[name]) for name, value in trainer.embedder.named_parameters()]
    assert all(changed)
    assert not any(m.training for m in trainer.embedder.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_state_whose_moments_lie_channels_last_as_on_a_gpu_goes_on_to_the_same_weights(optimizer):
    settings = {"name": optimizer, "lr": 0.003, "lr_proxies": 0.01, "weight_decay": 0.0001}
    settings |= {"momentum": 0.9} if optimizer == "sgd" else {}
    run = tiny_params(optimizer=settings).run("tiny", "memvir_norm_softmax", 1)
    trainer = make_trainer(run)
    trainer.train_epoch(Quiet())
    state = copy.deepcopy(trainer.state_dict())
    elsewhere = copy.deepcopy(state)
    for moments in elsewhere["optimizer"]["state"].values():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.ndim == 4:
                moments[name] = value.to(memory_format=torch.channels_last)
    found = []
    for saved in (state, elsewhere):
        trainer = make_trainer(run)
        trainer.load_state_dict(saved)
        trainer.epoch, trainer.batch = 2, 0
        trainer.train_epoch(Quiet())
        found.append(trainer.embedder.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_what_a_state_holds_is_used_where_the_run_is():
    run = tiny_params().run("tiny", "memvir_norm_softmax", 1)
    trainer = make_trainer(run)
    trainer.train_epoch(Quiet())
    saved = trainer.state_dict()
    assert saved["last_batch"] is not None
    trainer = make_trainer(run, device=torch.device("meta"))
    trainer.load_state_dict(saved)
    held = [*trainer.last_batch, *(value for state in trainer.optimizer.state.values() for value in state.values())]
    assert {value.device.type for value in held if value.ndim} == {"meta"}


def test_optimizers_give_the_proxies_their_own_learning_rate():
    trainer = make_trainer(tiny_params().run("tiny", "norm_softmax", 1))
    backbone, proxies = trainer.optimizer.param_groups
    assert (backbone["lr"], proxies["lr"]) == (0.003, 0.01)
    assert [p.shape for p in proxies["params"]] == [(6, 8)]
    assert backbone["weight_decay"] == proxies["weight_decay"] == 0.0001


PROCESS = """
import sys, torch
from memvir.experiment.distributed import join_world
from tests.memvir.experiment.test_training import EPOCHS, make_trainer, runs_of_several_processes, train
torch.set_num_threads(1)
world, (target, *other) = join_world(), sys.argv[1:]
trained = {}
for run in runs_of_several_processes():
    trained |= train(make_trainer(run, world=world), run.name)
    if other:
        trainer = make_trainer(run, world=world)
        trainer.load_state_dict(torch.load(other[0])[f"{run.name}: state"])
        trained |= train(trainer, run.name + ", continued")
if world.is_main:
    torch.save(trained, target)
"""
EPOCHS = 3


def runs_of_several_processes() -> list[Run]:
    raw = tiny.params()
    raw["tiny"]["variants"] |= RIVALS
    raw["tiny"]["model"]["freeze_batch_norm"] = True
    raw["tiny"]["training"]["optimizer"] = {"name": "sgd", "lr": 0.05, "lr_proxies": 0.05, "weight_decay": 0.0001}
    params = parse_params(raw)
    runs = [params.run("tiny", variant, 1) for variant in ("memvir_norm_softmax", *RIVALS)]
    for changes in ({"images_per_class": 2}, {"precision": "fp16"}, {"precision": "bf16"}):
        training = runs[0].training.model_copy(update=changes)
        runs.append(runs[0].model_copy(update={"training": training, "variant": next(iter(changes.values()))}))
    return [run.model_copy(update={"variant": str(run.variant)}) for run in runs]


def train(trainer: Trainer, name: str) -> dict:
    """To the end; the state after the first epoch is kept."""
    kept = {}
    while trainer.epoch <= EPOCHS:
        trainer.train_epoch(Quiet())
        trainer._finish_epoch()
        if trainer.epoch == 2:
            kept[f"{name}: state"] = copy.deepcopy(trainer.state_dict())
    rows = trainer.history.rows
    kept |= {f"{name}: {key}": torch.tensor([row[key] for row in rows]) for key in ("loss", "num_virtual_classes")}
    kept |= {f"{name}: stale checks": torch.tensor(trainer.best.stale_checks)}
    kept |= {f"{name}: proxies": trainer.loss.proxies.detach()}
    return kept | {f"{name}: {key}": value for key, value in trainer.embedder.state_dict().items()}


def test_two_processes_train_as_one_and_go_on_from_each_others_states(tmp_path):
    """48 images in batches of 10: the last batch holds 8, and batches of 10 make shards of 5."""
    script, first = tmp_path / "process.py", tmp_path / "1.pt"
    script.write_text(PROCESS)
    results = []
    for processes in (1, 2):
        target = tmp_path / f"{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), str(script), str(target)]
        command += [str(first)] if processes > 1 else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr
        results.append(torch.load(target))
    one, two = results
    for run in runs_of_several_processes():
        trainer = make_trainer(run)  # one process goes on from what two have saved
        trainer.load_state_dict(two[f"{run.name}: state"])
        two |= train(trainer, f"{run.name}, continued by one")
    compared = 0
    for key, value in two.items():
        name, _, what = key.partition(": ")
        expected = one.get(f"{name.partition(', ')[0]}: {what}")
        if what != "state":
            fp16 = name.partition("/")[2].startswith(("fp16", "bf16"))
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if fp16 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(value, expected, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
            compared += 1
    assert compared > 12 * len(runs_of_several_processes())


def test_early_stopping_and_growth_count_from_when_a_wrapper_is_in_use():
    raw = tiny.params(epochs=9, check_epoch=1)
    raw["tiny"]["variants"] |= RIVALS
    raw["tiny"]["variants"]["proxy_synthesis"]["proxy_synthesis"]["warm_up_epochs"] = 2
    params = parse_params(raw)
    growth = {}
    for variant in RIVALS:
        trainer = make_trainer(params.run("tiny", variant, 1))
        for _ in range(3):
            trainer.best.stale_checks = 5
            trainer.train_epoch(Quiet())
            trainer._finish_epoch()
            waits = trainer.best.stale_checks == 0
            better = trainer.best.epochs["recall_at_1"] == trainer.epoch - 1
            warm_up = trainer.run.wrapper_settings.warm_up_epochs
            assert waits == (trainer.epoch - 1 <= warm_up or better)
        growth[variant] = [tuple(row.values()) for row in trainer.history.growth]
    assert growth == {
        "proxy_synthesis": [(0, 0, 0), (11, 5, 5)],
        "virtual_softmax": [(0, 0, 0), (1, 10, 0)],
        "broadface": [(0, 0, 0), (7, 0, 10), (8, 0, 15)],
    }


def test_queries_are_evaluated_against_their_gallery_and_not_against_each_other():
    run = tiny_params().run("tiny", "norm_softmax", 1)
    random = np.random.default_rng(0)
    gallery, query = random.normal(size=(8, 4)), random.normal(size=(6, 4))
    gallery_labels, query_labels = np.arange(8) % 4, np.arange(6) % 3
    both, labels, is_query = (
        np.concatenate([query, gallery]),
        np.append(query_labels, gallery_labels),
        np.arange(14) < 6,
    )
    found = evaluate(run, both, labels, is_query, CPU, run.evaluation)
    lengths = np.linalg.norm(gallery, axis=1)
    nearest = [gallery_labels[np.argsort(-(gallery @ one) / lengths)] for one in query]
    hits = np.array([ranked == label for ranked, label in zip(nearest, query_labels, strict=True)])  # (6, 8)
    assert found["recall_at_1"] == hits[:, 0].mean() and found["recall_at_2"] == hits[:, :2].any(axis=1).mean()
    assert found["rp"] == hits[:, :2].mean(), "each class has two images in the gallery"
    assert found["map"] == pytest.approx(np.mean([(h[0] + h[1] * (h[0] + h[1]) / 2) / 2 for h in hits.astype(float)]))
