"""The training loop of one run: the story of an epoch, and how it is interrupted and continued.

Everything with state owns its state_dict; a checkpoint is the dict of those dicts. The order of an epoch and the
augmentation of an image are functions of (seed, epoch, image), so a run that continues from a checkpoint ends in the
same bytes as one that was never interrupted.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memvir import retrieval
from memvir.errors import UserError
from memvir.experiment.checkpoint import Checkpoint
from memvir.experiment.data import TrainingData
from memvir.experiment.distributed import World
from memvir.experiment.history import BestModels, History, in_use
from memvir.experiment.optimizer import build_optimizer, rate_factor
from memvir.experiment.settings import Evaluation, Run, Runtime
from memvir.experiment.watch import Watch
from memvir.images.batches import TestImages, epoch_batches
from memvir.losses import build_loss
from memvir.models import Embedder, build_embedder
from memvir.models.embedder import PRECISIONS, embed_batch, mixed_precision
from memvir.signals import Interrupted
from memvir.wrappers import wrap
from memvir.wrappers.wrapper import LossWrapper

WATCHED = Evaluation(recall_at=[1])
"""What is evaluated while a run trains."""


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
        self.run, self.runtime, self.data, self.device, self.world = run, runtime, data, device, world
        settings = run.training
        in_channels = 1 if run.images.channels == "grey" else 3
        self.embedder: Embedder = build_embedder(run.model, in_channels, weights).to(device)
        if runtime.channels_last and device.type == "cuda":  # on a CPU the images' format is enough
            self.embedder.to(memory_format=torch.channels_last)
        replica = world.replicate(self.embedder, device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(replica) if runtime.compile else replica
        self.loss: Any = build_run_loss(run, num_classes=int(data.train_labels.max()) + 1).to(device)
        self.optimizer = build_optimizer(settings.optimizer, self.embedder, self.loss)
        self.precision = PRECISIONS[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.history = History()
        self.best = BestModels()
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.epoch, self.batch = 1, 0  # the next epoch and batch to train
        self.step = 0
        self.losses = torch.zeros(self._batches_per_epoch(), device=device)  # of this epoch's batches so far
        self.last_batch: tuple[Tensor, Tensor] | None = None  # embeddings (B, D) and labels (B,), for snapshots
        self.images_per_second = 0.0
        self.seconds, self.started = 0.0, time.monotonic()  # spent in earlier processes; when this one began

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
                raise Interrupted(watch.signal)
            if self.epoch == self.run.training.epochs:
                self._check_finite()
                self._save(checkpoint)  # before the last evaluation, so that a longer run may go on from here
            self._finish_epoch()
            watch.epoch_done(self.history.rows[-1], self.images_per_second)
            stop = self.world.any(watch.stop_requested, self.device)
            minutes = (time.monotonic() - last_save) / 60
            due = self.epoch - last_saved_epoch >= self.runtime.checkpoint_epochs
            due |= minutes >= self.runtime.checkpoint_minutes or stop or self.finished
            if due and self.epoch <= self.run.training.epochs:
                self._save(checkpoint)
                last_save, last_saved_epoch = time.monotonic(), self.epoch
            if stop and not self.finished:
                raise Interrupted(watch.signal)

    def train_epoch(self, watch: Watch) -> bool:
        """The rest of the current epoch; False if a stop was requested on the way."""
        settings = self.run.training
        self.embedder.train()
        factor = rate_factor(settings.lr_decay, self.epoch)
        for group, rate in zip(
            self.optimizer.param_groups, (settings.optimizer.lr, settings.optimizer.lr_proxies), strict=True
        ):
            group["lr"] = rate * factor
        if isinstance(self.loss, LossWrapper):
            assert self.run.wrapper_settings is not None
            self.loss.enabled = self.epoch > self.run.wrapper_settings.warm_up_epochs
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its steps are under way, not done
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
            if isinstance(self.loss, LossWrapper) and not any(in_use(self.loss).values()):
                self.best.stale_checks = 0  # early stopping waits until the wrapper is what is trained
        if self.epoch in self.run.snapshots:
            self.snapshots[self.epoch] = self._snapshot()
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.history.append(
            epoch=self.epoch,
            step=self.step,
            loss=float(self.losses[: self.batch].double().mean()),
            lr=rates[0],
            lr_proxies=rates[-1],
            **in_use(self.loss),
            **metrics,
        )
        self.epoch, self.batch = self.epoch + 1, 0

    @property
    def finished(self) -> bool:
        patience = self.run.training.early_stopping
        return self.epoch > self.run.training.epochs or (patience is not None and self.best.stale_checks >= patience)

    @property
    def seconds_spent(self) -> float:
        """On this run, in all processes that trained it one after another."""
        return self.seconds + time.monotonic() - self.started

    def embed_test_images(self) -> np.ndarray:
        """(test images, D) float32 embeddings in the order of the index, not normalised."""
        return embed(self.embedder, self.data.test, self.precision)

    def evaluate(self) -> dict[str, float]:
        """Recall@1, RP and MAP, whatever else the recipe's `evaluation` asks for: models are chosen by these alone."""
        data = self.data
        return evaluate(self.run, self.embed_test_images(), data.test_labels, data.test_queries, self.device, WATCHED)

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
        assert self.run.memvir is not None and self.last_batch is not None
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
            "scaler": self.scaler.state_dict(),
            "history": self.history.state_dict(),
            "best": self.best.state_dict(),
            "snapshots": self.snapshots,
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "losses": self.losses},
            "last_batch": self.last_batch if self.batch else None,
            "random": torch.get_rng_state(),
            "seconds": self.seconds_spent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embedder.load_state_dict(state["embedder"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._lay_out_moments()
        self.scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        self.best.load_state_dict(state["best"])
        self.snapshots = state["snapshots"]
        position = state["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.losses.copy_(position["losses"])
        if state["last_batch"] is not None:
            embeddings, labels = state["last_batch"]
            self.last_batch = embeddings.to(self.device), labels.to(self.device)
        torch.set_rng_state(state["random"])
        self.seconds = state["seconds"]

    def _lay_out_moments(self) -> None:
        """Give the optimiser's state the parameters' memory formats, by which fused kernels pair them: those of a GPU
        may be channels_last where a CPU's are not.
        """
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def build_run_loss(run: Run, num_classes: int) -> nn.Module:
    """The run's proxy loss, within what the variant puts around it."""
    loss = build_loss(run.loss.name, num_classes, run.model.embedding_dim, **run.loss.options)
    if run.wrapper is None or run.wrapper_settings is None:
        return loss
    return wrap(loss, run.wrapper, **run.wrapper_settings.model_dump(exclude={"warm_up_epochs"}))


def embed(embedder: nn.Module, images: TestImages, precision: torch.dtype) -> np.ndarray:
    """(images, D) float32 embeddings, not normalised; the embedder is left in eval mode."""
    embedder.eval()
    return torch.cat([embed_batch(embedder, batch, precision) for batch in images.batches()]).cpu().numpy()


def evaluate(
    run: Run,
    embeddings: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray | None,
    device: torch.device,
    evaluation: Evaluation,
) -> dict[str, float]:
    """The metrics of test embeddings, in [0, 1]; `queries` says which are queries, if the others are a gallery."""
    if not math.isfinite(float(np.abs(embeddings).sum())):
        raise UserError(f"{run.name}: the test embeddings are not finite; the learning rates are likely too high")
    apart: dict[str, Any] = {}
    if queries is not None:
        apart = {"query": embeddings[queries], "query_labels": labels[queries]}
        embeddings, labels = embeddings[~queries], labels[~queries]
    return retrieval.evaluate(
        embeddings, labels, tuple(evaluation.recall_at), nmi=evaluation.nmi, device=device, **apart
    )
