"""A run of seconds by the product's own Trainer, on images made on the spot."""

import numpy as np
import torch

from memvir.experiment.data import TrainingData
from memvir.experiment.distributed import World
from memvir.experiment.settings import Runtime
from memvir.experiment.training import Trainer
from memvir.images.batches import LoadedImages, TestImages
from memvir.params import parse_params

CLASSES, PER_CLASS, SIDE = 8, 24, 32


def make_trainer(
    device: torch.device, precision: str = "fp32", world: World | None = None, freeze_batch_norm: bool = False
) -> Trainer:
    recipe = {
        "data": {"source": "folder"},
        "images": {
            "size": SIDE,
            "channels": "rgb",
            "value_range": 1,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.3, 0.3, 0.3],
            "train": {"kind": "random_resized_crop", "scale": [0.5, 1.0], "ratio": [0.75, 1.33], "flip": 0.5},
            "test": {"resize": SIDE},
        },
        "model": {
            "backbone": "convnet",
            "widths": [16, 32],
            "pretrained": "none",
            "pooling": "gap",
            "embedding_dim": 32,
            "freeze_batch_norm": freeze_batch_norm,
        },
        "training": {
            "epochs": 6,
            "check_epoch": 6,
            "batch_size": 32,
            "optimizer": {"name": "adam", "lr": 1e-3, "lr_proxies": 1e-2, "weight_decay": 1e-4, "eps": 1e-4},
            "lr_decay": {"epochs": []},
            "precision": precision,
            "threads": 1,
        },
        "evaluation": {"recall_at": [1]},
        "variants": {
            "memvir": {
                "loss": {"name": "Norm-SoftMax", "scale": 10.0},
                "memvir": {"num_steps": 2, "step_gap": 1, "warm_up_epochs": 0},
                "snapshots": [6],
            }
        },
    }
    params = parse_params({"datasets": ["check"], "variants": ["memvir"], "seeds": [1], "check": recipe})
    run = params.run("check", "memvir", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (CLASSES * PER_CLASS, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    train = LoadedImages(pixels, labels, run.images, run.seed, device, workers=0, channels_last=True)
    data = TrainingData(train, labels, TestImages(pixels, run.images, device), labels)
    return Trainer(run, data, device, None, Runtime(checkpoint_epochs=1), world or World())


class Watch:
    """Stops nothing; a checkpoint is due after every epoch."""

    stop_requested = False

    def epoch_done(self, row: dict[str, float], images_per_second: float) -> None:
        pass
