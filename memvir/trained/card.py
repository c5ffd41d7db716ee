"""The model card: Markdown behind the metadata that model hubs read, from nothing but a model file's own metadata."""

import json
from collections.abc import Mapping
from typing import Any

from memvir.losses import DISPLAY_NAMES
from memvir.wrappers import WRAPPERS

METRICS = {"rp": "R-precision", "map": "MAP@R", "nmi": "NMI"}


def model_card(metadata: Mapping[str, Any]) -> str:
    """The card of a model as README.md, where hubs look for it: the same metadata, the same bytes."""
    run, architecture, weights = metadata["run"], metadata["architecture"], metadata["weights"]
    name = f"{run['dataset']}/{run['variant']}/{run['seed']}"
    return f"""---
{_front_matter(metadata)}
---

# {name}

An image embedding, trained by deep metric learning: pictures of one kind get embeddings near each other, for kinds that
training has not seen too.

```python
from memvir import load_model

model = load_model("model.safetensors")
embeddings = model.embed(["a.jpg", "b.jpg"])  # (2, {architecture["embedding_dim"]}) float32, of length 1
```

## Data

Trained on the {len(metadata["classes"])} training classes of `{run["dataset"]}`, measured on its test images.

## Recipe

{_recipe(metadata)}

## Metrics

On the test images after epoch {run["epoch"]}, each a query against all others:

{_table(metadata["metrics"])}

## Weights and licence

{_origin(weights)}
"""


def metric_name(key: str) -> str:
    """recall_at_1 -> Recall@1"""
    return METRICS.get(key) or key.replace("recall_at_", "Recall@")


def _front_matter(metadata: Mapping[str, Any]) -> str:
    """YAML whose values are JSON, which YAML contains."""
    run = metadata["run"]
    name = f"{run['dataset']}/{run['variant']}/{run['seed']}"
    results = {
        "task": {"type": "image-feature-extraction", "name": "Image retrieval"},
        "dataset": {"type": run["dataset"], "name": run["dataset"], "split": "test"},
        "metrics": [
            {"type": key, "name": metric_name(key), "value": value} for key, value in metadata["metrics"].items()
        ],
    }
    content = {
        "license": metadata["weights"].get("license") or "unknown",
        "library_name": "memvir",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["deep-metric-learning", "image-retrieval", "memvir"],
        "datasets": [run["dataset"]],
        "metrics": list(metadata["metrics"]),
        "model-index": [{"name": name, "results": [results]}],
    }
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items())


def _recipe(metadata: Mapping[str, Any]) -> str:
    architecture, preprocessing = metadata["architecture"], metadata["preprocessing"]
    settings = metadata["run"]["settings"]
    network = ", ".join(f"{key}: {json.dumps(value)}" for key, value in architecture.items() if key != "backbone")
    pixels = ", ".join(f"{key}: {json.dumps(value)}" for key, value in preprocessing.items())
    lines = [f"- Network: {architecture['backbone']} ({network})", f"- Pictures: {pixels}"]
    if "loss" in settings:
        loss = {key: value for key, value in settings["loss"].items() if value is not None}
        name = loss.pop("name")
        options = ", ".join(f"{key} {v if isinstance(v, str) else format(v, 'g')}" for key, v in loss.items())
        title = DISPLAY_NAMES.get(name, name)
        lines.append(f"- Loss: {title}" + (f" ({options})" if options else ""))
    for name, wrapper in WRAPPERS.items():
        if settings.get(name):
            numbers = ", ".join(f"{key}: {json.dumps(value)}" for key, value in settings[name].items())
            lines.append(f"- {wrapper.title} ({wrapper.paper}): {numbers}")
    if "training" in settings:
        training = settings["training"]
        optimizer = ", ".join(f"{key}: {json.dumps(value)}" for key, value in training["optimizer"].items())
        lines.append(f"- Training: {training['epochs']} epochs of batches of {training['batch_size']}")
        lines.append(f"- Optimiser: {optimizer}")
    lines.append(f"- Seed: {metadata['run']['seed']}")
    return "\n".join(lines)


def _table(metrics: Mapping[str, float]) -> str:
    rows = [f"| {metric_name(key)} | {100 * value:.2f} % |" for key, value in metrics.items()]
    return "\n".join(["| Metric | Value |", "|---|---:|", *rows])


def _origin(weights: Mapping[str, str]) -> str:
    if weights["pretrained"] == "none":
        return (
            "Trained from random weights. Its licence is yours to choose, as far as the training images allow: write "
            "it into the `license` line above before you share the model."
        )
    source = weights.get("source", "a file of the user")
    digest = f" (sha256 {weights['sha256']})" if "sha256" in weights else ""
    licence = weights.get("license")
    terms = (
        f"They are under the licence {licence}, which goes for this model too."
        if licence
        else "That source states no licence with the file: find out before you share the model, and write it into the "
        "`license` line above."
    )
    return f"Training started from {weights['pretrained']} weights, {source}{digest}. {terms}"
