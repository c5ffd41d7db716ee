"""One run from its files to its files: train it, or evaluate the models that it left."""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pandas as pd
import torch

from memvir.checkpoint import Checkpoint
from memvir.config import Affine, Run, Runtime
from memvir.data import LoadedImages, ResidentImages, TestImages, TrainImages
from memvir.datasets import read_index
from memvir.distributed import join_world
from memvir.environment import describe_environment, fingerprint, loader_workers, set_up_device
from memvir.errors import UserError
from memvir.files import write_json
from memvir.history import save_model, to_csv
from memvir.models import build_embedder
from memvir.pixels import Crop, open_images
from memvir.progress import Progress
from memvir.tensorboard import TensorBoardLog
from memvir.training import PRECISIONS, Interrupted, Trainer, TrainingData, check_batch_size, embed, evaluate

log = logging.getLogger("memvir")


@dataclass(frozen=True)
class RunFiles:
    """Where a run finds and leaves things."""

    index: Path
    """index.csv: one row per image."""
    images: Path
    """The folder that index.csv's files are relative to."""
    weights: Path
    """The folder with the pretrained weight file, if the recipe has one."""
    run: Path
    """Models, history, embeddings: what training leaves."""
    logs: Path
    """TensorBoard and the record of times, not tracked."""
    scratch: Path
    """Decoded pixels and checkpoints."""


def train_run(run: Run, runtime: Runtime, files: RunFiles) -> None:
    """Train a run, continuing from its checkpoint if there is one, and write `files.run` in one step at the end.

    Under torchrun the processes share every batch, and the first one writes.

    Raises UserError for what a user can put right. On SIGINT or SIGTERM saves and exits with 128 + the signal.
    """
    started = time.time()
    world = join_world()
    device = set_up_device(runtime)
    environment = describe_environment(run, device, runtime, files.index)
    weights = _weight_file(run, files)
    path = files.scratch / "checkpoints" / run.dataset / run.variant / f"{run.seed}.pt"
    checkpoint = Checkpoint(path, fingerprint(run, environment, weights))
    with checkpoint.locked() if world.is_main else contextlib.nullcontext():
        index = read_index(files.index)
        trainer = Trainer(run, open_training_data(run, runtime, files, index, device), device, weights, runtime, world)
        state = checkpoint.load()
        if state is not None:
            trainer.load_state_dict(state)
            log.info("%s: continuing at epoch %d", run.name, trainer.epoch)
        board = TensorBoardLog(files.logs, run, trainer.history) if world.is_main else None
        with Progress(run.name, run.training.epochs, runtime, board) as progress:
            try:
                trainer.train(checkpoint, progress)
            except Interrupted:
                if world.is_main:
                    log.info("%s: saved at epoch %d; run the same command again to continue", run.name, trainer.epoch)
                sys.exit(128 + (progress.signal or signal.SIGTERM))
        if board is None:
            return
        embeddings = trainer.embed_test_images()
        _write_run(trainer, embeddings, environment, files.run)
        names = index.loc[index["split"] == "test", "class_name"].tolist()
        board.finish({k: v for k, v in trainer.history.rows[-1].items() if k in trainer.best.values}, embeddings, names)
        write_json(files.logs / "run.json", {"started": started, "ended": time.time(), "git_commit": _git_commit()})
        checkpoint.remove()


def evaluate_run(run: Run, runtime: Runtime, files: RunFiles, result: Path) -> None:
    """Evaluate a run's last model and, metric by metric, its best one; write `result`.

    Raises UserError if the run has not been trained.
    """
    device = set_up_device(runtime)
    try:
        summary = json.loads((files.run / "summary.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{files.run}: this run has not been trained; run `dvc repro`") from None
    epochs = sorted({summary["last_epoch"], *summary["best_epochs"].values()})
    metrics = _evaluate_models(run, runtime, files, {e: _model_file(files.run, e) for e in epochs}, device)
    content = {
        "last": metrics[summary["last_epoch"]],
        "best": {name: metrics[epoch][name] for name, epoch in summary["best_epochs"].items()},
        "last_epoch": summary["last_epoch"],
        "best_epochs": summary["best_epochs"],
        "settings": run.model_dump(mode="json"),
        "environment": describe_environment(run, device, runtime, files.index),
    }
    write_json(result, content)


def evaluate_model(run: Run, runtime: Runtime, files: RunFiles, model: Path) -> dict[str, float]:
    """The metrics of a saved model of the run's recipe, in [0, 1]. Raises UserError if the file is not one."""
    return _evaluate_models(run, runtime, files, {0: model}, set_up_device(runtime))[0]


def _evaluate_models(
    run: Run, runtime: Runtime, files: RunFiles, models: dict[int, Path], device: torch.device
) -> dict[int, dict[str, float]]:
    test, labels = _test_images(run, runtime, files, read_index(files.index), device)
    in_channels = 1 if run.images.channels == "grey" else 3
    embedder = build_embedder(run.model.model_copy(update={"pretrained": "none"}), in_channels, None).to(device)
    metrics = {}
    for key, path in models.items():
        try:
            embedder.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        except (RuntimeError, UnpicklingError, EOFError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a model of {run.dataset}'s recipe ({reason})") from None
        metrics[key] = evaluate(run, embed(embedder, test, PRECISIONS[run.training.precision]), labels, device)
    return metrics


def open_training_data(
    run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, device: torch.device
) -> TrainingData:
    """The run's images, decoded once into the scratch folder; labels count from 0 in the order of class_id."""
    rows = index[index["split"] == "train"]
    check_batch_size(run.training, len(rows), run.dataset)
    labels = np.unique(rows["class_id"], return_inverse=True)[1].astype(np.int64)
    settings = run.images
    scratch = files.scratch if runtime.pixel_store else None
    train: TrainImages
    if isinstance(settings.train, Affine):
        crop = Crop(settings.test.resize, settings.size)
        images = open_images(rows, files.images, settings.channels, crop, f"{run.dataset}-train", scratch)
        train = ResidentImages(images, labels, settings, run.seed, device)
    else:
        images = open_images(rows, files.images, settings.channels, None, f"{run.dataset}-train", scratch)
        workers = loader_workers(runtime)
        last = runtime.channels_last and device.type == "cuda"
        train = LoadedImages(images, labels, settings, run.seed, device, workers, last)
    return TrainingData(train, labels, *_test_images(run, runtime, files, index, device))


def _test_images(
    run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, device: torch.device
) -> tuple[TestImages, np.ndarray]:
    rows = index[index["split"] == "test"]
    crop = Crop(run.images.test.resize, run.images.size)
    scratch = files.scratch if runtime.pixel_store else None
    images = open_images(rows, files.images, run.images.channels, crop, f"{run.dataset}-test", scratch)
    return TestImages(images, run.images, device), rows["class_id"].to_numpy()


def _write_run(trainer: Trainer, embeddings: np.ndarray, environment: dict, target: Path) -> None:
    """Write everything into a folder beside `target`, then put it in its place: no reader sees half a run."""
    last_epoch = trainer.epoch - 1
    summary = {"last_epoch": last_epoch, "best_epochs": trainer.best.epochs, "environment": environment}
    files = {
        "history.csv": to_csv(trainer.history.rows).encode(),
        "growth.csv": to_csv(trainer.history.growth).encode(),
        "test_embeddings.npz": _npz({"embeddings": embeddings}),
        "summary.json": json.dumps(summary, indent=2).encode(),
    }
    for epoch, weights in {**trainer.best.weights, last_epoch: trainer.embedder.state_dict()}.items():
        files[f"models/epoch-{epoch:04d}.pt"] = save_model(weights)
    for epoch, arrays in trainer.snapshots.items():
        files[f"snapshots/epoch-{epoch:04d}.npz"] = _npz({key: value.numpy() for key, value in arrays.items()})
    new, old = (target.with_name(f".{target.name}.{age}") for age in ("new", "old"))
    for leftover in (new, old):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        size = sum(map(len, files.values()))
        raise UserError(
            f"{target}: {error.strerror}; the run's models and history need {size / 1e6:.2f} MB: free some space and "
            "run the same command again, nothing is trained twice"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _model_file(folder: Path, epoch: int) -> Path:
    return folder / "models" / f"epoch-{epoch:04d}.pt"


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _weight_file(run: Run, files: RunFiles) -> Path | None:
    if run.model.pretrained == "none":
        return None
    from memvir.models import find_weights

    return find_weights(run.model, files.weights)


def _git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None
