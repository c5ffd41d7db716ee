"""The result of a run: the metrics of the models that it left, with what made them."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from memvir.errors import NotMade, UserError
from memvir.experiment.data import open_test_images
from memvir.experiment.environment import made_by, set_up_device
from memvir.experiment.identity import Identity, of_evaluation, of_run, resolved_settings, short
from memvir.experiment.model_files import description, model_file
from memvir.experiment.paths import RunFiles
from memvir.experiment.settings import Run, Runtime
from memvir.experiment.space import embedding_space
from memvir.experiment.training import WATCHED, embed, evaluate
from memvir.files import write_json
from memvir.images.batches import TestImages
from memvir.images.index import read_index
from memvir.models import build_embedder, find_weights
from memvir.models.embedder import PRECISIONS, embed_batch
from memvir.trained.file import find, read

log = logging.getLogger("memvir")


def evaluate_run(run: Run, runtime: Runtime, files: RunFiles, result: Path) -> None:
    """Evaluate a run's last model and, metric by metric, its best one; write `result`.

    Raises UserError if the run has not been trained, or is damaged.
    """
    device = set_up_device(runtime)
    try:
        summary = json.loads((files.run / "summary.json").read_text())
        last_epoch, best_epochs = int(summary["last_epoch"]), dict[str, int](summary["best_epochs"])
        most = pd.read_csv(files.run / "growth.csv")[["num_virtual_classes", "num_virtual_embeddings"]].max()
    except FileNotFoundError:
        raise NotMade(f"{files.run}: this run has not been trained") from None
    except (ValueError, KeyError, TypeError):
        raise NotMade(f"{files.run}: summary.json or growth.csv is damaged; delete the folder") from None
    index = read_index(files.index)
    models: dict[int | str, nn.Module] = {"untrained": _untrained(run, files)}
    for epoch in sorted({last_epoch, *best_epochs.values()}):
        models[epoch] = _built(run, model_file(files.run, epoch, last_epoch))
    test, labels, queries = open_test_images(run, runtime, files, index, device)
    embeddings = _embed_with(models, test, run, device)
    metrics = {key: evaluate(run, found, labels, queries, device, run.evaluation) for key, found in embeddings.items()}
    identity = of_run(run, files.index, find_weights(run.model, files.weights))
    training = _record(files, short(identity))
    content = {
        "last": metrics[last_epoch],
        # models are chosen by the metrics that training watches, of which Recall@1 speaks for the others
        "best": {
            name: metrics[best_epochs[name if name in best_epochs else "recall_at_1"]][name]
            for name in metrics[last_epoch]
        },
        "untrained": metrics["untrained"],
        "space": {
            **_on_training_classes(run, runtime, files, index, models[last_epoch], device),
            **embedding_space(embeddings[last_epoch], labels),
        },
        "last_epoch": last_epoch,
        "best_epochs": best_epochs,
        "most_virtual_classes": int(most["num_virtual_classes"]),
        "most_virtual_embeddings": int(most["num_virtual_embeddings"]),
        "settings": resolved_settings(run),
        "identity": {
            "run": short(identity),
            "evaluation": short(of_evaluation(run.evaluation)),
            **_apart_from_settings(identity),
        },
    }
    write_result(result, content, {"training": training, "evaluation": made_by(device, runtime)})


def evaluate_model(run: Run, runtime: Runtime, files: RunFiles, model: Path) -> dict[str, float]:
    """The metrics of a saved model of the run's recipe, in [0, 1]. Raises UserError if the file is not one."""
    device = set_up_device(runtime)
    test, labels, queries = open_test_images(run, runtime, files, read_index(files.index), device)
    embeddings = embed(_built(run, model).to(device), test, PRECISIONS[run.training.precision])
    return evaluate(run, embeddings, labels, queries, device, run.evaluation)


def _built(run: Run, path: Path) -> nn.Module:
    """The network of a model file. Raises UserError if it is not one of the run's recipe."""
    model = read(find(path))
    for section, expected in description(run).items():
        for name, value in expected.items():
            if (found := model.metadata[section].get(name)) != value:
                raise UserError(
                    f"{path}: not a model of {run.dataset}'s recipe: {section}.{name} is {found}, not {value}"
                )
    return model.build()


def _untrained(run: Run, files: RunFiles) -> nn.Module:
    """What gives the backbone's pooled features before the run trains anything."""
    torch.manual_seed(run.seed)
    channels = 1 if run.images.channels == "grey" else 3
    embedder = build_embedder(run.model, channels, find_weights(run.model, files.weights))
    embedder.embedding = nn.Identity()  # type: ignore[assignment]
    return embedder


def _embed_with(
    models: Mapping[Any, nn.Module], images: TestImages, run: Run, device: torch.device
) -> dict[Any, np.ndarray]:
    """The float32 embeddings (images, D) of each model, in one pass over the images: decoding them may take longer."""
    parts: dict[Any, list[torch.Tensor]] = {key: [] for key in models}
    for model in models.values():
        model.to(device).eval()
    for batch in images.batches():
        for key, model in models.items():
            parts[key].append(embed_batch(model, batch, PRECISIONS[run.training.precision]))
    return {key: torch.cat(found).cpu().numpy() for key, found in parts.items()}


def _on_training_classes(
    run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, model: nn.Module, device: torch.device
) -> dict[str, float]:
    """The metrics of a model on the classes that it has seen."""
    train, labels, _ = open_test_images(run, runtime, files, index, device, split="train")
    embeddings = embed(model, train, PRECISIONS[run.training.precision])
    seen = evaluate(run, embeddings, labels, None, device, WATCHED)
    return {f"train_{name}": seen[name] for name in ("recall_at_1", "map")}


def write_result(path: Path, content: dict[str, Any], made_by: dict[str, Any]) -> None:
    """Write a result with what made it, unless it is there already: then what made it first stays on record."""
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if {key: value for key, value in earlier.items() if key != "made_by"} == json.loads(json.dumps(content)):
            log.info("%s: the same as before, left as it is", path)
            return
    write_json(path, {**content, "made_by": made_by})


def _apart_from_settings(identity: Identity) -> Identity:
    return {key: value for key, value in identity.items() if key.startswith(("code.", "index", "weights"))}


def _record(files: RunFiles, identity: str) -> dict[str, Any]:
    """What training wrote down of itself; empty where it was done elsewhere, or under another identity."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        record = json.loads(files.record(identity).read_text(encoding="utf-8"))
        return {key: record[key] for key in ("environment", "code")}  # times differ where results do not
    return {}
