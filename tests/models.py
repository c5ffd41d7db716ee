"""Model files without training: any backbone with random weights."""

from pathlib import Path
from typing import Any

import torch

from memvir.experiment.model_files import model_metadata
from memvir.experiment.settings import Run
from memvir.models import build_embedder
from memvir.params import parse_params
from memvir.trained.file import pack
from tests import tiny


def settings(backbone: str = "convnet", channels: str = "grey", size: int = 16, **model: Any) -> Run:
    """A run of the tiny recipe with another network or other images."""
    params = tiny.params()
    recipe = params["tiny"]
    colours = 1 if channels == "grey" else 3
    recipe["images"] |= {"size": size, "channels": channels, "test": {"resize": size + 4 if colours == 3 else size}}
    recipe["images"] |= {"mean": [0.4, 0.5, 0.6][:colours], "std": [0.3, 0.2, 0.25][:colours]}
    recipe["model"] |= {"backbone": backbone, **model}
    return parse_params(params).run("tiny", "norm_softmax", 1)


def metadata(run: Run) -> dict[str, Any]:
    return model_metadata(run, 6, ["first", "second"], {"recall_at_1": 0.5, "rp": 0.25, "map": 0.125}, {})


def make_model(path: Path, **options: Any) -> Path:
    """Write the file of such a run's model; the same weights each time."""
    run = settings(**options)
    torch.manual_seed(0)
    embedder = build_embedder(run.model, 1 if run.images.channels == "grey" else 3, None)
    path.write_bytes(pack(embedder.state_dict(), metadata(run)))
    return path
