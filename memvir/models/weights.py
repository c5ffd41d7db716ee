"""Pretrained weights as files: fetched once, checked by hash, loaded without running code and with every key accounted
for. Nothing here falls back to random weights.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from memvir.config import Model, Weights
from memvir.errors import UserError
from memvir.files import atomic_write, file_hash, write_json
from memvir.models.backbone import Backbone

SOURCE = "source.json"
"""Beside the weight file: where it came from and its sha256; or that the recipe starts from random weights."""


def fetch_weights(model: Model, folder: Path) -> None:
    """Put the weight file of `model` into `folder`, with source.json; for `pretrained: none` only source.json.

    A file that is there already and has the right sha256 is kept; one that an earlier model needed is removed.

    Raises UserError if neither `weights.path` nor any address gives a file with the right sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _read_source(folder)
    weights = _wanted(model)
    content: dict[str, str] = {"backbone": model.backbone, "pretrained": model.pretrained}
    if weights is not None:
        target = folder / _file_name(model, weights)
        used = _obtain(weights, target)
        content |= {"file": target.name, "source": used, "sha256": file_hash(target, "sha256")}
        if used == str(target) and earlier.get("sha256") == content["sha256"]:
            content["source"] = earlier.get("source", used)  # it was there already: what the earlier call said holds
    # only what an earlier call put here, never what a person did
    if "file" in earlier and earlier["file"] != content.get("file"):
        (folder / Path(earlier["file"]).name).unlink(missing_ok=True)
    write_json(folder / SOURCE, content)


def find_weights(model: Model, folder: Path) -> Path | None:
    """The weight file that `fetch_weights` put into `folder`, its sha256 checked again; None for `pretrained: none`.

    Raises UserError if it is missing or another file.
    """
    weights = _wanted(model)
    if weights is None:
        return None
    path = folder / _file_name(model, weights)
    if not path.is_file():
        raise UserError(f"{path}: the weights of {model.backbone} are missing; run `dvc repro` to fetch them")
    _check_hash(path, weights, "delete it and run `dvc repro` to fetch it again")
    return path


def load_weights(backbone: Backbone, path: Path) -> None:
    """Copy a weight file into `backbone`.

    The file's keys and shapes must be those of the backbone, apart from `backbone.unused_keys` (the classifier), which
    are dropped. One more thing is let pass: a file without any BatchNorm counter (num_batches_tracked), as PyTorch
    before 0.4.1 wrote it, because nothing reads the counter when BatchNorm averages with a fixed momentum.

    Raises UserError naming the file and the first key that differs, or if the file is no weight file. A pickle that
    would run code is refused unread.
    """
    found = _read(path)
    found = {key: value for key, value in found.items() if not key.startswith(backbone.unused_keys)}
    expected = backbone.state_dict()
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}
    if not counters & found.keys():
        found |= {key: expected[key] for key in counters}
    name = type(backbone).__name__
    for key, value in expected.items():
        if key not in found:
            raise UserError(f"{path}: has no {key!r}, which {name} needs; these are weights of another network")
        if found[key].shape != value.shape:
            raise UserError(
                f"{path}: {key!r} has the shape {tuple(found[key].shape)}, but {name} needs {tuple(value.shape)}; "
                "these are weights of another network"
            )
    for key in found:
        if key not in expected:
            raise UserError(f"{path}: has {key!r}, which {name} does not know; these are weights of another network")
    backbone.load_state_dict(found)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such weight file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = " ".join(str(error).split()).removeprefix("Weights only load failed.")
        raise UserError(f"{path}: not a file of weights that can be read safely ({reason[:200].strip()})") from None
    if not isinstance(content, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in content.items()
    ):
        raise UserError(f"{path}: not a file of weights: expected a state_dict, names with their tensors")
    return content


def _wanted(model: Model) -> Weights | None:
    """The weight file of a model: the one it names, else torchvision's."""
    if model.pretrained == "none":
        return None
    return model.weights or _torchvision_weights(model.backbone)


def _torchvision_weights(backbone: str) -> Weights:
    """IMAGENET1K_V1, what `pretrained=True` meant when metric learning's figures for ResNets were published."""
    from torchvision import models  # late: see memvir.models.resnet

    address = models.get_model_weights(backbone)["IMAGENET1K_V1"].url
    match = re.fullmatch(r".*-([0-9a-f]{8,64})\.pth", address)
    assert match, f"torchvision's file names carry the start of their sha256, but {address} does not"
    return Weights(addresses=[address], sha256=match[1])


def _file_name(model: Model, weights: Weights) -> str:
    """bn_inception-52deb4733.pth, resnet50-0676ba61.pth: as these files are called where they come from."""
    return f"{model.backbone}-{weights.sha256[:9]}.pth"


def _obtain(weights: Weights, target: Path) -> str:
    """Make `target` the weight file; returns the path or address that it came from, or str(target) if it was there."""
    if weights.path is None:
        from memvir.download import fetch  # late: loading weights needs no network

        try:
            return fetch(weights.addresses, target, algorithm="sha256", digest=weights.sha256, what=target.name)
        except UserError as error:
            raise UserError(
                f"{error}. If you can get the file elsewhere, save it as {target}, or write where it is into "
                f"params.yaml as model.weights.path; its sha256 starts with {weights.sha256}"
            ) from None
    path = Path(weights.path).expanduser()
    if not path.is_file():
        raise UserError(f"model.weights.path: {path} is not a file")
    _check_hash(path, weights, "set model.weights.path to the right file")
    if not (target.exists() and path.samefile(target)):
        with path.open("rb") as source, atomic_write(target) as copy:
            shutil.copyfileobj(source, copy)
    return weights.path


def _check_hash(path: Path, weights: Weights, action: str) -> None:
    found = file_hash(path, "sha256")
    if not found.startswith(weights.sha256):
        raise UserError(
            f"{path}: its sha256 is {found[: max(16, len(weights.sha256))]}..., expected {weights.sha256}...; {action}"
        )


def _read_source(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(value, str) for value in content.values())
    return content if whole else {}
