"""A run's images: what it trains on and what it is evaluated on."""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from memvir.experiment.environment import loader_workers
from memvir.experiment.paths import RunFiles
from memvir.experiment.settings import Run, Runtime
from memvir.images.batches import LoadedImages, ResidentImages, TestImages, TrainImages
from memvir.images.index import evaluated
from memvir.images.pixels import Crop, open_images
from memvir.images.pixels import Images as SomeImages
from memvir.images.settings import Affine
from memvir.images.store_size import estimated_bytes
from memvir.progress import size

log = logging.getLogger("memvir")


@dataclass
class TrainingData:
    train: TrainImages
    train_labels: np.ndarray  # (training images,) from 0 to C - 1
    test: TestImages
    test_labels: np.ndarray  # (test images,)
    test_queries: np.ndarray | None = None  # (test images,) whether it is one; None: each is compared with all others


def open_training_data(
    run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, device: torch.device
) -> TrainingData:
    """The run's images, decoded once into the scratch folder; labels count from 0 in the order of class_id."""
    rows = index[index["split"] == "train"]
    labels = np.unique(rows["class_id"], return_inverse=True)[1].astype(np.int64)
    settings = run.images
    train: TrainImages
    if isinstance(settings.train, Affine):
        crop = Crop(settings.test.resize, settings.size)
        images = _open(run, runtime, files, rows, crop, "train")
        train = ResidentImages(images, labels, settings, run.seed, device)
    else:
        images = _open(run, runtime, files, rows, None, "train")
        workers = loader_workers(runtime)
        last = runtime.channels_last and not run.training.portable
        train = LoadedImages(images, labels, settings, run.seed, device, workers, last)
    return TrainingData(train, labels, *open_test_images(run, runtime, files, index, device))


def open_test_images(
    run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, device: torch.device, split: str = "test"
) -> tuple[TestImages, np.ndarray, np.ndarray | None]:
    """The images that a run is evaluated on, or another split cropped as these are; their classes; and which are
    queries, if the others are a gallery."""
    rows = evaluated(index) if split == "test" else index[index["split"] == split]
    images = _open(run, runtime, files, rows, Crop(run.images.test.resize, run.images.size), f"cropped-{split}")
    queries = (rows["split"] == "query").to_numpy()
    return TestImages(images, run.images, device), rows["class_id"].to_numpy(), queries if queries.any() else None


def _open(run: Run, runtime: Runtime, files: RunFiles, rows: pd.DataFrame, crop: Crop | None, what: str) -> SomeImages:
    """Images decoded once into the scratch folder, or at every access where that has no room for them."""
    name, channels, scratch = f"{run.dataset}-{what}", run.images.channels, None
    if runtime.pixel_store:
        needed = estimated_bytes([files.images / file for file in rows["file"]], channels, crop)
        if needed <= runtime.pixel_gigabytes * 1e9:
            scratch = files.scratch
        else:
            log.info(
                "%s: decoded once, these %d images would take about %s, more than runtime.pixel_gigabytes, %g; they "
                "are decoded whenever they are used, which takes more of the CPU",
                name,
                len(rows),
                size(needed),
                runtime.pixel_gigabytes,
            )
    return open_images(rows, files.images, channels, crop, name, scratch)
