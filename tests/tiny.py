"""A data set and a recipe small enough to train in a second, for tests of whole stages."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16


def write_images(source: Path, classes: int = 6, per_class: int = 8, side: int = SIDE) -> None:
    """source/{train,test}/CLASS/*.png: each class a pattern of its own, each image with its own noise."""
    random = np.random.default_rng(0)
    for split, first in (("train", 0), ("test", classes)):
        for label in range(first, first + classes):
            pattern = random.integers(0, 256, (side, side))
            folder = source / split / f"class_{label:02d}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                noisy = np.clip(pattern + random.normal(0, 60, pattern.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{number:02d}.png")


def recipe(**training: Any) -> dict[str, Any]:
    return {
        "data": {"source": "folder"},
        "images": {
            "size": SIDE,
            "channels": "grey",
            "value_range": 1,
            "mean": [0.5],
            "std": [0.5],
            "train": {"kind": "affine", "rotate": 10, "scale": [0.9, 1.1], "shear": 5, "shift": 0.05},
            "test": {"resize": SIDE},
        },
        "model": {
            "backbone": "convnet",
            "widths": [4, 8],
            "pretrained": "none",
            "pooling": "gap",
            "embedding_dim": 8,
            "freeze_batch_norm": False,
        },
        "training": {
            "epochs": 6,
            "check_epoch": 2,
            "batch_size": 10,  # 48 images: the last batch holds 8
            "optimizer": {"name": "adam", "lr": 0.003, "lr_proxies": 0.01, "weight_decay": 0.0001},
            "lr_decay": {"epochs": [5]},
            "threads": 1,
            **training,
        },
        "evaluation": {"recall_at": [1, 2]},
        "variants": {
            "norm_softmax": {"loss": {"name": "Norm-SoftMax", "scale": 23.0}},
            "memvir_norm_softmax": {
                "loss": {"name": "Norm-SoftMax", "scale": 23.0},
                "memvir": {"num_steps": 2, "step_gap": 1, "warm_up_epochs": 1},
                "snapshots": [1, 3],
            },
        },
    }


def params(**training: Any) -> dict[str, Any]:
    return {
        "datasets": ["tiny"],
        "variants": ["norm_softmax", "memvir_norm_softmax"],
        "seeds": [1, 2],
        "runtime": {"progress": "none", "device": "cpu"},
        "reporting": {"tsne_perplexity": 5.0, "tsne_points": 100, "tsne_seed": 0, "queries": 1, "neighbours": 3},
        "tiny": recipe(**training),
    }
