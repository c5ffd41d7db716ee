"""The training loop of one run: the story of an epoch, and how it is interrupted and continued.

Everything with state owns its state_dict; a checkpoint is the dict of those dicts. The order of an epoch and the
augmentation of an image are functions of (seed, epoch, image), so a run that continues from a checkpoint ends in the
same bytes as one that was never interrupted.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from memvir import retrieval
from memvir.checkpoint import Checkpoint
from memvir.config import Optimizer, Run, Runtime, Training
from memvir.data import TestImages, TrainImages, epoch_batches
from memvir.distributed import World
from memvir.errors import UserError
from memvir.history import BestModels, History
from memvir.losses import build_loss
from memvir.memory import MemVir
from memvir.models import Embedder, build_embedder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):
    """The run was asked to stop and its state is saved."""


class Watch(Protocol):
    """What looks on: may ask the loop to stop, and hears of every finished epoch."""

    runtime: Runtime
    stop_requested: bool

    def epoch_done(self, trainer: "Trainer") -> None: ...


@dataclass
class TrainingData:
    train: TrainImages
    train_labels: np.ndarray  # (training images,) from 0 to C - 1
    test: TestImages
    test_labels: np.ndarray  # (test images,)


class Trainer:
    """One run, from its settings to its best and last models.

    Args:
        run: the complete settings.
        data: training and test images; their tensors come out on `device`.
        device: where everything runs; `meta` runs the same code without numbers.
        weights: the pretrained weight file, or None.
        world: the processes that share the run, each with a share of every batch.
    """

    def __init__(
        self,
        run: Run,
        data: TrainingData,
        device: torch.device,
        weights: Path | None,
        runtime: Runtime,
        world: World = World(),  # noqa: B008  frozen
    ) -> None:
        torch.manual_seed(run.seed)
        self.run, self.data, self.device, self.world = run, data, device, world
        settings = run.training
        in_channels = 1 if run.images.channels == "grey" else 3
        self.embedder: Embedder = build_embedder(run.model, in_channels, weights).to(device)
        if runtime.channels_last and device.type == "cuda":
            self.embedder.to(memory_format=torch.channels_last)
        replica = world.replicate(self.embedder, device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(replica) if runtime.compile else replica
        self.loss = build_run_loss(run, num_classes=int(data.train_labels.max()) + 1).to(device)
        self.optimizer = build_optimizer(settings.optimizer, self.embedder, self.loss)
        milestones = [epoch - 1 for epoch in settings.lr_decay.epochs]  # the scheduler counts finished epochs
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, settings.lr_decay.factor)
        self.precision = PRECISIONS[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.history = History()
        self.best = BestModels()
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.epoch, self.batch = 1, 0  # the next epoch and batch to train
        self.step = 0
        self.losses = torch.zeros(self._batches_per_epoch(), device=device)  # of this epoch's batches so far
        self.images_per_second = 0.0

    # --- the loop ---

    def train(self, checkpoint: Checkpoint, watch: Watch) -> None:
        """Train to the end, or raise Interrupted once the state is saved.

        Raises UserError if the loss stops being a number; the checkpoint before that is kept.
        """
        last_save, last_saved_epoch = time.monotonic(), self.epoch
        while not self.finished:
            if not self.train_epoch(watch):
                self._check_finite()
                self._save(checkpoint)
                raise Interrupted
            self._finish_epoch()
            watch.epoch_done(self)
            stop = self.world.any(watch.stop_requested, self.device)
            minutes = (time.monotonic() - last_save) / 60
            due = self.epoch - last_saved_epoch >= watch.runtime.checkpoint_epochs
            if due or minutes >= watch.runtime.checkpoint_minutes or stop or self.finished:
                self._save(checkpoint)
                last_save, last_saved_epoch = time.monotonic(), self.epoch
            if stop and not self.finished:
                raise Interrupted

    def train_epoch(self, watch: Watch) -> bool:
        """The rest of the current epoch; False if a stop was requested on the way."""
        settings = self.run.training
        self.embedder.train()
        if isinstance(self.loss, MemVir):
            assert self.run.memvir is not None
            self.loss.enabled = self.epoch > self.run.memvir.warm_up_epochs
        batches = epoch_batches(
            self.data.train_labels, settings.batch_size, settings.images_per_class, self.run.seed, self.epoch
        )[self.batch :]
        started, seen = time.monotonic(), 0
        shards = [self.world.shard(batch) for batch in batches]
        for batch, (images, labels) in zip(batches, self.data.train.batches(shards, self.epoch), strict=True):
            self.losses[self.batch] = self.train_step(images, labels, len(batch))
            self.batch += 1
            self.step += 1
            seen += len(batch)
            self.history.record_growth(self.step, self.loss)
            if watch.stop_requested and self.world.size == 1 and self.batch < self._batches_per_epoch():
                return False  # several processes agree on stopping at the end of an epoch
        self.images_per_second = seen / max(time.monotonic() - started, 1e-9)
        return True

    def train_step(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """One optimiser step on a batch, images (B, C, S, S) and labels (B,); its loss, still on the device.

        Of several processes each has a share of the batch, whose size in all is `batch_size`.
        """
        with mixed_precision(self.device, self.precision):
            embeddings = self.forward(images)
        embeddings, labels = self.world.gather(embeddings.float(), labels, batch_size)  # (B, D), (B,)
        loss = self.loss(embeddings, labels)
        self.last_batch = embeddings.detach(), labels
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _finish_epoch(self) -> None:
        settings = self.run.training
        self._check_finite()
        metrics: dict[str, float] = {}
        if self.epoch % settings.check_epoch == 0 or self.epoch == settings.epochs:
            metrics = self.evaluate()
            self.best.update(self.epoch, metrics, self.embedder)
        if self.epoch in self.run.snapshots:
            self.snapshots[self.epoch] = self._snapshot()
        rates = [float(rate) for rate in self.scheduler.get_last_lr()]
        self.history.append(
            epoch=self.epoch,
            step=self.step,
            loss=float(self.losses[: self.batch].double().mean()),
            lr=rates[0],
            lr_proxies=rates[-1],
            num_virtual_classes=getattr(self.loss, "num_virtual_classes", 0),
            num_virtual_embeddings=getattr(self.loss, "num_virtual_embeddings", 0),
            **metrics,
        )
        self.scheduler.step()
        self.epoch, self.batch = self.epoch + 1, 0

    @property
    def finished(self) -> bool:
        patience = self.run.training.early_stopping
        return self.epoch > self.run.training.epochs or (patience is not None and self.best.stale_checks >= patience)

    def embed_test_images(self) -> np.ndarray:
        """(test images, D) float32 embeddings in the order of the index, not normalised."""
        return embed(self.embedder, self.data.test, self.precision)

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.run, self.embed_test_images(), self.data.test_labels, self.device)

    def _check_finite(self) -> None:
        finite = torch.isfinite(self.losses[: self.batch])
        if not bool(finite.all()):
            batch = int((~finite).nonzero()[0])
            raise UserError(
                f"{self.run.name}: the loss became {float(self.losses[batch])} at epoch {self.epoch}, step "
                f"{self.step - self.batch + batch + 1}; the learning rates or the loss's scale are likely too high"
                + (", or fp16 overflowed (try bf16)" if self.scaler.is_enabled() else "")
                + ". The last good checkpoint is kept"
            )

    def _snapshot(self) -> dict[str, Tensor]:
        """What the t-SNE figure shows: the batches that the last step's loss saw, and the current proxies."""
        assert isinstance(self.loss, MemVir) and self.run.memvir is not None
        steps = [(0, *self.last_batch), *(step[:3] for step in self.loss.steps_in_use())]
        return {
            "embeddings": torch.cat([embeddings.float() for _, embeddings, _ in steps]).cpu(),  # (P, D)
            "labels": torch.cat([labels for _, _, labels in steps]).cpu(),  # (P,)
            "step_offset": torch.cat([torch.full((len(labels),), offset) for offset, _, labels in steps]),  # (P,)
            "proxies": self.loss.proxies.detach().float().cpu().clone(),  # (C, D)
            "num_classes_in_use": torch.tensor(len(self.loss.proxies) + self.loss.num_virtual_classes),
            "step_gap": torch.tensor(self.run.memvir.step_gap),
        }

    def _batches_per_epoch(self) -> int:
        settings = self.run.training
        return len(epoch_batches(self.data.train_labels, settings.batch_size, settings.images_per_class, 0, 1))

    # --- state ---

    def _save(self, checkpoint: Checkpoint) -> None:
        if self.world.is_main:
            checkpoint.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "embedder": self.embedder.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history.state_dict(),
            "best": self.best.state_dict(),
            "snapshots": self.snapshots,
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "losses": self.losses},
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embedder.load_state_dict(state["embedder"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        self.best.load_state_dict(state["best"])
        self.snapshots = state["snapshots"]
        position = state["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.losses.copy_(position["losses"])
        torch.set_rng_state(state["random"])


def build_run_loss(run: Run, num_classes: int) -> nn.Module:
    """The run's proxy loss, within MemVir if the variant asks for it."""
    loss = build_loss(run.loss.name, num_classes, run.model.embedding_dim, **run.loss.options)
    if run.memvir is None:
        return loss
    dtype = getattr(torch, run.memvir.storage_dtype)
    return MemVir(loss, run.memvir.num_steps, run.memvir.step_gap, storage_dtype=dtype)


def build_optimizer(settings: Optimizer, embedder: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """One optimiser with two groups: the embedder at `lr`, the proxies at `lr_proxies`."""
    groups = [
        {"params": list(embedder.parameters()), "lr": settings.lr},
        {"params": list(loss.parameters()), "lr": settings.lr_proxies},
    ]
    decay = settings.weight_decay
    match settings.name:
        case "adam":
            return torch.optim.Adam(groups, eps=settings.eps, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(groups, eps=settings.eps, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(groups, eps=settings.eps, weight_decay=decay, momentum=settings.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=settings.lr, weight_decay=decay, momentum=settings.momentum)


def mixed_precision(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `precision`, or nothing for float32 (and on `meta`, which knows no autocast)."""
    if precision == torch.float32 or not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


@torch.inference_mode()
def embed(embedder: nn.Module, images: TestImages, precision: torch.dtype) -> np.ndarray:
    """(images, D) float32 embeddings, not normalised; the embedder is left in eval mode."""
    embedder.eval()
    parts = []
    for batch in images.batches():
        with mixed_precision(batch.device, precision):
            parts.append(embedder(batch).float())
    return torch.cat(parts).cpu().numpy()


def evaluate(run: Run, embeddings: np.ndarray, labels: np.ndarray, device: torch.device) -> dict[str, float]:
    """The run's metrics of test embeddings, in [0, 1]."""
    if not math.isfinite(float(np.abs(embeddings).sum())):
        raise UserError(f"{run.name}: the test embeddings are not finite; the learning rates are likely too high")
    return retrieval.evaluate(
        embeddings, labels, tuple(run.evaluation.recall_at), nmi=run.evaluation.nmi, device=device
    )


def check_batch_size(settings: Training, images: int, where: str) -> None:
    """UserError if a batch would hold more images than there are."""
    if settings.batch_size > images:
        raise UserError(
            f"{where}.training.batch_size: {settings.batch_size} is more than the {images} training images; "
            "use a smaller batch"
        )
