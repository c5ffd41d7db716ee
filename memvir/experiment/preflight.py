"""What settings and data tell about a run before anything is decoded or trained, one line each: why it cannot work, and
what is hardly meant.
"""

import logging

import pandas as pd
import torch

from memvir.errors import UserError
from memvir.experiment.settings import Run
from memvir.experiment.training import build_run_loss
from memvir.images.batches import epoch_batches
from memvir.images.index import evaluated
from memvir.libraries import has_avx2
from memvir.losses.products import ROWS
from memvir.models import build_embedder

log = logging.getLogger("memvir")


def check_run(run: Run, index: pd.DataFrame, processes: int = 1) -> None:
    """Raise UserError, naming data set and key, if the run cannot work or its figures would mean nothing; else warn.

    Args:
        index: one row per image, as `read_index` gives it.
        processes: how many share each batch.
    """
    if run.training.portable and not has_avx2():
        _warn(
            f"{run.dataset}.training.portable: this is no x86-64 processor with AVX2; the figures will differ from "
            "those of one in their last digits, and from run to run in nothing"
        )
    train, test = index[index["split"] == "train"], evaluated(index)
    for split, images in (("training", train), ("test", test)):
        if images["class_id"].nunique() == 1:
            raise UserError(
                f"{run.dataset}.data: all {len(images)} {split} images are of one class, {_first_name(images)}, with "
                "nothing to tell it from; add a second class"
            )
    _check_queries(run, test)
    batches = _check_batches(run, train, processes)
    _check_network(run, len(train), smallest_batch=min(batches))
    _check_loss(run, num_classes=train["class_id"].nunique())
    _check_epochs(run, batches)


def _check_queries(run: Run, test: pd.DataFrame) -> None:
    queries, gallery = (test[test["split"] == split] for split in ("query", "gallery"))
    lonely, what, others = "are not in the gallery", "query", "gallery"
    together = queries.empty  # each image is a query, and in the gallery for the others
    if together:
        queries = gallery = test
        lonely, what, others = "have one image only", "test", "other test"
    found = queries["class_id"].map(gallery["class_id"].value_counts()).fillna(0)
    alone = queries[found == together]  # 1: a query is in its own gallery
    if len(alone) == len(queries):
        why = "no test class has two images" if together else "no class of the queries is in the gallery"
        raise UserError(f"{run.dataset}.data: {why}, so no query has anything to find; add some")
    if len(alone):
        _warn(
            f"{run.dataset}.data: {alone['class_id'].nunique()} of {queries['class_id'].nunique()} {what} classes "
            f"{lonely}, such as {_first_name(alone)}; as queries these have nothing to find and are left out"
        )
    most, available = max(run.evaluation.recall_at), len(gallery) - together
    if most > available:
        raise UserError(
            f"{run.dataset}.evaluation.recall_at: {most} is more than the {available} {others} images that a query is "
            "compared with; use a smaller k"
        )


def _check_batches(run: Run, train: pd.DataFrame, processes: int) -> list[int]:
    """The sizes of an epoch's batches."""
    where = f"{run.dataset}.training"
    batch_size, images_per_class = run.training.batch_size, run.training.images_per_class
    if batch_size > len(train):
        raise UserError(
            f"{where}.batch_size: {batch_size} is more than the {len(train)} training images; use a smaller batch"
        )
    sizes, classes = _class_sizes(train), train["class_id"].nunique()
    small = train[sizes < images_per_class]
    if len(small) == len(train):
        raise UserError(
            f"{where}.images_per_class: {images_per_class} is more than the {sizes.max()} images of the largest "
            "training class; use a smaller number"
        )
    if len(small):
        _warn(
            f"{where}.images_per_class: {small['class_id'].nunique()} of {classes} training classes have fewer than "
            f"{images_per_class} images, such as {_first_name(small)} with {sizes[small.index[0]]}; their batches hold "
            "an image more than once"
        )
    if images_per_class > 1 and batch_size // images_per_class > classes:
        _warn(
            f"{where}.batch_size: {batch_size} at {images_per_class} images per class asks for "
            f"{batch_size // images_per_class} classes, and there are {classes}; batches hold "
            f"{classes * images_per_class} images"
        )
    batches = [len(batch) for batch in epoch_batches(train["class_id"].to_numpy(), batch_size, images_per_class, 0, 1)]
    if run.training.portable and min(batches) // processes < ROWS:
        raise UserError(
            f"{where}.portable: batch_size {batch_size} of {len(train)} training images leaves a batch of "
            f"{min(batches)}, which other processors add up otherwise; use another batch size, or write false"
        )
    if min(batches) < processes:
        raise UserError(
            f"{where}.batch_size: {batch_size} of {len(train)} training images leaves a batch of {min(batches)}, too "
            f"few for {processes} processes (runtime.processes); use another batch size"
        )
    return batches


def _check_network(run: Run, images: int, smallest_batch: int) -> None:
    """Pass an epoch's smallest batch through the network on the meta device, where nothing is computed."""
    model = run.model.model_copy(update={"pretrained": "none"})
    channels, size = 1 if run.images.channels == "grey" else 3, run.images.size
    try:
        with torch.device("meta"), torch.no_grad():
            build_embedder(model, channels, None)(torch.empty(smallest_batch, channels, size, size))
    except UserError as error:
        raise UserError(f"{run.dataset}.{error}") from None
    except ValueError:  # by torch's BatchNorm
        raise UserError(
            f"{run.dataset}.training.batch_size: {run.training.batch_size} of {images} training images leaves a batch "
            f"of {smallest_batch}, and at images.size {size} the network ends in one pixel, so that BatchNorm has "
            "nothing to average over; use another batch size, or model.freeze_batch_norm: true"
        ) from None


def _check_loss(run: Run, num_classes: int) -> None:
    """Not every wrapper takes every loss."""
    try:
        with torch.device("meta"):
            build_run_loss(run, num_classes)
    except UserError as error:
        raise UserError(f"{run.dataset}.variants.{run.variant}.{run.wrapper or 'loss'}: {error}") from None


def _check_epochs(run: Run, batches: list[int]) -> None:
    epochs, steps_per_epoch = run.training.epochs, len(batches)
    late = [epoch for epoch in run.training.lr_decay.epochs if epoch > epochs]
    if late:
        _warn(f"{run.dataset}.training.lr_decay.epochs: {late} lies beyond the last epoch of {run.variant}, {epochs}")
    if run.broadface:
        rows = (epochs - run.broadface.warm_up_epochs) * sum(batches) - batches[-1]  # the last batch comes too late
        if rows < run.broadface.queue_size:
            _warn(
                f"{run.dataset}.variants.{run.variant}.broadface.queue_size: of {run.broadface.queue_size} past "
                f"embeddings at most {rows} will be in use, as there are no more; use fewer, or more epochs"
            )
    if run.memvir is None:
        return
    where, warm_up = f"{run.dataset}.variants.{run.variant}", run.memvir.warm_up_epochs
    steps = (epochs - warm_up) * steps_per_epoch
    turn = run.memvir.step_gap + 1  # a step is used so many steps after it was stored
    if steps <= turn:
        raise UserError(
            f"{where}.memvir.warm_up_epochs: {warm_up} of {epochs} epochs leaves {steps} steps, and with step_gap "
            f"{run.memvir.step_gap} virtual classes are in use from step {turn + 1} after the warm-up; use a smaller "
            "warm_up_epochs or step_gap, or more epochs"
        )
    most = (steps - 1) // turn
    if most < run.memvir.num_steps:
        _warn(
            f"{where}.memvir.num_steps: of {run.memvir.num_steps} past steps at most {most} will be in use, as the "
            f"warm-up leaves {steps} steps and each past step takes step_gap + 1 = {turn}"
        )
    first_epoch = warm_up + 1 + turn // steps_per_epoch
    if run.snapshots and max(run.snapshots) < first_epoch:
        _warn(f"{where}.snapshots: all before epoch {first_epoch}, at whose end the first virtual classes are in use")


def _class_sizes(images: pd.DataFrame) -> pd.Series:
    """For each image, how many its class has."""
    return images.groupby("class_id")["class_id"].transform("size")


def _first_name(images: pd.DataFrame) -> str:
    return repr(images["class_name"].iloc[0])


def _warn(text: str) -> None:
    log.warning("warning: %s", text)
