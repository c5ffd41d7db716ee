"""Training a run, from its files to its files."""

import contextlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memvir.errors import UserError
from memvir.experiment.checkpoint import Checkpoint, prune
from memvir.experiment.data import open_training_data
from memvir.experiment.distributed import join_world
from memvir.experiment.environment import compile_errors, made_by, set_up_device
from memvir.experiment.gpu_errors import gpu_errors
from memvir.experiment.history import to_csv
from memvir.experiment.identity import of_run, short, with_seed
from memvir.experiment.launch import lost_process
from memvir.experiment.lock import in_turn
from memvir.experiment.model_files import model_file, model_metadata
from memvir.experiment.optimizer import continues
from memvir.experiment.paths import RunFiles
from memvir.experiment.settings import Run, Runtime
from memvir.experiment.tensorboard import TensorBoardLog
from memvir.experiment.training import Trainer
from memvir.experiment.watch import Watch
from memvir.files import npz, write_json
from memvir.images.index import evaluated, read_index
from memvir.models import find_weights
from memvir.models.weights import read_source
from memvir.signals import Interrupted, stop_signals
from memvir.trained.card import model_card
from memvir.trained.file import pack

log = logging.getLogger("memvir")


def train_run(run: Run, runtime: Runtime, files: RunFiles) -> None:
    """Train a run, continuing from its checkpoint if there is one, and write `files.run` in one step at the end.

    Under torchrun the processes share every batch, and the first one writes.

    Raises UserError for what a user can put right, and Interrupted once it has saved what a signal asked to stop.
    """
    world = join_world()
    device = set_up_device(runtime)
    made = made_by(device, runtime)
    weights = find_weights(run.model, files.weights)
    identity = of_run(run, files.index, weights)
    checkpoint = Checkpoint(files.checkpoints, identity, made["environment"])
    index = read_index(files.index)
    num_classes = index.loc[index["split"] == "train", "class_id"].nunique()
    with (
        checkpoint.locked() if world.is_main else contextlib.nullcontext(),
        gpu_errors(run, num_classes),
        lost_process(world.size),
    ):
        with in_turn(files.scratch / f"{run.dataset}.lock", "decoding the same images"):
            data = open_training_data(run, runtime, files, index, device)
        trainer = Trainer(run, data, device, weights, runtime, world)
        if world.is_main:
            _prune(files, runtime)
        state = checkpoint.load(continues)
        if state is not None:
            trainer.load_state_dict(state)
            log.info("%s: continuing at epoch %d", run.name, trainer.epoch)
        board = TensorBoardLog(files.logs, run, trainer.history) if world.is_main else None
        watch = Watch(run, runtime, trainer.epoch - 1, board)
        with compile_errors(), stop_signals(watch.stop), watch.counter:
            try:
                trainer.train(checkpoint, watch)
            except Interrupted:
                if world.is_main:
                    checkpoint.flush()
                    log.info("%s: saved at epoch %d; run the same command again to continue", run.name, trainer.epoch)
                raise
        if board is None:
            return
        embeddings = trainer.embed_test_images()
        _write_run(trainer, embeddings, _descriptions(trainer, index, files), files.run)
        names = evaluated(index)["class_name"].tolist()
        board.finish({k: v for k, v in trainer.history.rows[-1].items() if k in trainer.best.values}, embeddings, names)
        times = {"seconds": round(trainer.seconds_spent, 1), "ended": time.time()}
        write_json(files.record(short(identity)), {**made, **times})
        checkpoint.finish()


def _descriptions(trainer: Trainer, index: pd.DataFrame, files: RunFiles) -> dict[int, dict[str, Any]]:
    """What the model file of each evaluated epoch says beside the weights."""
    train = index[index["split"] == "train"].drop_duplicates("class_id").sort_values("class_id")
    source = read_source(files.weights) if trainer.run.model.pretrained != "none" else {}
    rows = {int(row["epoch"]): row for row in trainer.history.rows}
    return {
        epoch: model_metadata(
            trainer.run, epoch, train["class_name"].tolist(), {name: row[name] for name in trainer.best.values}, source
        )
        for epoch, row in rows.items()
        if "recall_at_1" in row
    }


def _write_run(trainer: Trainer, embeddings: np.ndarray, descriptions: dict[int, dict[str, Any]], target: Path) -> None:
    """Write everything into a folder beside `target`, then put it in its place: no reader sees half a run."""
    last_epoch = trainer.epoch - 1
    summary = {"last_epoch": last_epoch, "best_epochs": trainer.best.epochs}
    files = {
        "history.csv": to_csv(trainer.history.rows).encode(),
        "growth.csv": to_csv(trainer.history.growth).encode(),
        "test_embeddings.npz": npz(embeddings=embeddings),
        "summary.json": json.dumps(summary, indent=2).encode(),
        "README.md": model_card(descriptions[last_epoch]).encode(),
    }
    for epoch, weights in {**trainer.best.weights, last_epoch: trainer.embedder.state_dict()}.items():
        files[model_file(Path(), epoch, last_epoch).as_posix()] = pack(weights, descriptions[epoch])
    for epoch, arrays in trainer.snapshots.items():
        files[f"snapshots/epoch-{epoch:04d}.npz"] = npz(**{key: value.numpy() for key, value in arrays.items()})
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


def _prune(files: RunFiles, runtime: Runtime) -> None:
    """Keep the checkpoints within their budget; those of the runs that the present settings ask for stay."""
    states, current = files.checkpoints.parents[2], {files.checkpoints}
    for path in files.settings.glob("*/variants/*.json"):
        with contextlib.suppress(OSError, ValueError):
            variant = json.loads(path.read_text(encoding="utf-8"))
            for seed in (states / path.parents[1].name / path.stem).glob("*/"):
                current.add(seed / f"{short(with_seed(variant, int(seed.name)))}.pt")
    prune(states, runtime.checkpoint_gigabytes * 1e9, lambda path: path in current or path.parent in current)
