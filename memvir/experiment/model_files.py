"""What a run's model files are called, and what they say of themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memvir.experiment.identity import resolved_settings
from memvir.experiment.settings import Run
from memvir.trained.file import NAME

NOT_THE_MODEL = ("evaluation", "snapshots")
"""Settings that change without the model."""


def model_metadata(
    run: Run, epoch: int, classes: Sequence[str], metrics: Mapping[str, float], source: Mapping[str, str]
) -> dict[str, Any]:
    """The metadata of `memvir.trained.file` for the run's model after an epoch.

    Args:
        classes: the training classes' names, in the order of their labels.
        metrics: of the test images after that epoch.
        source: the source.json of the weight file, empty if there is none.
    """
    return {
        **description(run),
        "classes": list(classes),
        "run": {
            "dataset": run.dataset,
            "variant": run.variant,
            "seed": run.seed,
            "epoch": epoch,
            "settings": {key: value for key, value in resolved_settings(run).items() if key not in NOT_THE_MODEL},
        },
        "metrics": dict(metrics),
        "weights": {"pretrained": run.model.pretrained, **_origin(source)},
    }


def description(run: Run) -> dict[str, Any]:
    """The architecture and preprocessing of a run's models."""
    images = run.images
    return {
        "architecture": {
            **run.model.model_dump(mode="json", exclude={"pretrained", "weights"}),
            "in_channels": 1 if images.channels == "grey" else 3,
            "precision": run.training.precision,
        },
        "preprocessing": {
            "size": images.size,
            "resize": images.test.resize,
            "channels": images.channels,
            "value_range": images.value_range,
            "mean": list(images.mean),
            "std": list(images.std),
        },
    }


def model_file(folder: Path, epoch: int, last_epoch: int) -> Path:
    """The model after an epoch, in a run's folder."""
    return folder / (NAME if epoch == last_epoch else f"models/epoch-{epoch:04d}.safetensors")


def _origin(source: Mapping[str, str]) -> dict[str, str]:
    """Of a file's path on this machine only its name."""
    found = {key: source[key] for key in ("source", "sha256", "license") if key in source}
    if "source" in found and not found["source"].startswith(("http://", "https://")):
        found["source"] = found["source"].replace("\\", "/").rpartition("/")[2]
    return found
