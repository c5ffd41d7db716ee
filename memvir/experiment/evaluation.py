"""The result of a run: the metrics of the models that it left, with what made them."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memvir.errors import NotMade, UserError
from memvir.experiment.data import open_test_images
from memvir.experiment.environment import made_by, set_up_device
from memvir.experiment.identity import Identity, of_evaluation, of_run, resolved_settings, short
from memvir.experiment.model_files import description, model_file
from memvir.experiment.paths import RECORD, RunFiles
from memvir.experiment.settings import Run, Runtime
from memvir.experiment.space import embedding_space
from memvir.experiment.training import WATCHED, embed, evaluate
from memvir.files import write_json
from memvir.images.index import read_index
from memvir.models import build_embedder, find_weights
from memvir.models.embedder import PRECISIONS
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
    epochs = sorted({last_epoch, *best_epochs.values()})
    paths = {epoch: model_file(files.run, epoch, last_epoch) for epoch in epochs}
    metrics = _evaluate_models(run, runtime, files, paths, device)
    identity = of_run(run, files.index, find_weights(run.model, files.weights))
    training = _record(files, short(identity))
    content = {
        "last": metrics[last_epoch],
        # models are chosen by the metrics that training watches, of which Recall@1 speaks for the others
        "best": {
            name: metrics[best_epochs[name if name in best_epochs else "recall_at_1"]][name]
            for name in metrics[last_epoch]
        },
        "untrained": _untrained(run, runtime, files, device),
        "space": _space(run, runtime, files, paths[last_epoch], device),
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
    return _evaluate_models(run, runtime, files, {0: model}, set_up_device(runtime))[0]


def _evaluate_models(
    run: Run, runtime: Runtime, files: RunFiles, models: dict[int, Path], device: torch.device
) -> dict[int, dict[str, float]]:
    test, labels, queries = open_test_images(run, runtime, files, read_index(files.index), device)
    metrics = {}
    for key, path in models.items():
        model = read(find(path))
        for section, expected in description(run).items():
            for name, value in expected.items():
                if (found := model.metadata[section].get(name)) != value:
                    raise UserError(
                        f"{path}: not a model of {run.dataset}'s recipe: {section}.{name} is {found}, not {value}"
                    )
        embeddings = embed(model.build().to(device), test, _precision(run))
        metrics[key] = evaluate(run, embeddings, labels, queries, device, run.evaluation)
    return metrics


def _untrained(run: Run, runtime: Runtime, files: RunFiles, device: torch.device) -> dict[str, float]:
    """The metrics of what the backbone gives, pooled, before the run trains anything."""
    test, labels, queries = open_test_images(run, runtime, files, read_index(files.index), device)
    torch.manual_seed(run.seed)
    channels = 1 if run.images.channels == "grey" else 3
    embedder = build_embedder(run.model, channels, find_weights(run.model, files.weights))
    embedder.embedding = torch.nn.Identity()  # type: ignore[assignment]
    return evaluate(run, embed(embedder.to(device), test, _precision(run)), labels, queries, device, run.evaluation)


def _space(run: Run, runtime: Runtime, files: RunFiles, model: Path, device: torch.device) -> dict[str, float]:
    """What the last model makes of the classes that it has seen, and how it uses its space for the others."""
    embedder, index = read(find(model)).build().to(device), read_index(files.index)
    test, labels, _ = open_test_images(run, runtime, files, index, device)
    unseen = embedding_space(embed(embedder, test, _precision(run)), labels)
    train, labels, _ = open_test_images(run, runtime, files, index, device, split="train")
    seen = evaluate(run, embed(embedder, train, _precision(run)), labels, None, device, WATCHED)
    return {**{f"train_{name}": seen[name] for name in ("recall_at_1", "map")}, **unseen}


def write_result(path: Path, content: dict[str, Any], made_by: dict[str, Any]) -> None:
    """Write a result with what made it, unless it is there already: then what made it first stays on record."""
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if {key: value for key, value in earlier.items() if key != "made_by"} == json.loads(json.dumps(content)):
            log.info("%s: the same as before, left as it is", path)
            return
    write_json(path, {**content, "made_by": made_by})


def _precision(run: Run) -> torch.dtype:
    return PRECISIONS[run.training.precision]


def _apart_from_settings(identity: Identity) -> Identity:
    return {key: value for key, value in identity.items() if key.startswith(("code.", "index", "weights"))}


def _record(files: RunFiles, identity: str) -> dict[str, Any]:
    """What training wrote down of itself; empty where it was done elsewhere, or under another identity."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        record = json.loads((files.logs / RECORD).read_text(encoding="utf-8"))
        if record.pop("identity") == identity:
            return {key: record[key] for key in ("environment", "code")}  # times differ where results do not
    return {}
