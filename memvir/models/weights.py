"""Pretrained weights as files: fetched once, checked by hash, loaded without running code and with every key accounted
for. Nothing here falls back to random weights.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from memvir.errors import NotMade, UserError
from memvir.files import atomic_write, file_hash, write_json
from memvir.models import backbone_class

if TYPE_CHECKING:  # torch takes seconds, and most calls of the stage need no weights
    from torch import Tensor

    from memvir.models.backbone import Backbone
    from memvir.models.settings import Model, Weights

log = logging.getLogger("memvir")

SOURCE = "source.json"
"""Beside the weight file: where it came from and its sha256; or that the recipe starts from random weights."""


def fetch_weights(model: "Model", folder: Path) -> None:
    """Put the weight file of `model` into `folder`, with source.json; for `pretrained: none` only source.json.

    A file that is there already and has the right sha256 is kept; one that an earlier model needed is removed. Where
    neither settings nor library give a sha256, that of the first download is noted, and later ones must have it.

    Raises UserError if neither `weights.path` nor any address gives a file with the right sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_source(folder)
    weights = _wanted(model)
    content: dict[str, str] = {"backbone": model.backbone, "pretrained": model.pretrained}
    if weights is not None:
        target = folder / _file_name(model, weights)
        checked = weights.sha256 is not None or weights.path is not None
        if not checked and earlier.get("source") in weights.addresses:
            weights = weights.model_copy(update={"sha256": earlier.get("sha256")})
        used = _obtain(weights, target)
        content |= {"file": target.name, "source": used, "sha256": file_hash(target, "sha256")}
        if weights.license:
            content["license"] = weights.license
        if used == str(target) and earlier.get("sha256") == content["sha256"]:
            content["source"] = earlier.get("source", used)  # it was there already: what the earlier call said holds
        if weights.sha256 is None and weights.path is None:
            log.info(
                "%s: its source gives no checksum; to insist on this file, write model.weights.sha256: %s",
                target,
                content["sha256"],
            )
    # only what an earlier call put here, never what a person did
    if "file" in earlier and earlier["file"] != content.get("file"):
        (folder / Path(earlier["file"]).name).unlink(missing_ok=True)
    write_json(folder / SOURCE, content)


def find_weights(model: "Model", folder: Path) -> Path | None:
    """The weight file that `fetch_weights` put into `folder`, its sha256 checked again; None for `pretrained: none`.

    Raises UserError if it is missing or another file.
    """
    weights = _wanted(model)
    if weights is None:
        return None
    path = folder / _file_name(model, weights)
    expected = weights.sha256 or read_source(folder).get("sha256")
    if not path.is_file() or expected is None:
        raise NotMade(f"{path}: the weights of {model.backbone} are missing")
    _check_hash(path, expected, "delete it and fetch the weights again")
    return path


def load_weights(backbone: "Backbone", path: Path) -> None:
    """Copy a weight file into `backbone`.

    The file's keys and shapes must be those of the backbone, apart from `backbone.unused_keys` (the classifier), which
    are dropped; `backbone.adapt` may rename some first. One more thing is let pass: a file without any BatchNorm
    counter (num_batches_tracked), as PyTorch before 0.4.1 wrote it, because nothing reads the counter when BatchNorm
    averages with a fixed momentum.

    Raises UserError naming the file and the first key that differs, or if the file is no weight file. A pickle that
    would run code is refused unread.
    """
    name, content = backbone.title, read_weights(path)
    try:
        found = backbone.adapt(content)
    except Exception as error:  # written for files of this network
        reason = " ".join(repr(error).split())[:200]
        raise UserError(f"{path}: these are weights of another network than {name} ({reason})") from None
    expected = backbone.holder().state_dict()
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}
    if not counters & found.keys():
        found |= {key: expected[key] for key in counters}
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
    backbone.holder().load_state_dict(found)


def read_weights(path: Path) -> "dict[str, Tensor]":
    """A saved state_dict, on the CPU. Raises UserError for any other file, and one that would run code stays unread."""
    import torch

    content: Any
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file of weights; name one of the files in it")
    if not path.is_file():
        raise UserError(f"{path}: there is no such weight file")
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load

                content = load(file.read())
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged or hostile file can fail in any way, and torch's advice is to trust it
            raise UserError(
                f"{path}: not a file of weights that can be read safely; expected a state_dict as torch.save writes "
                "it, or a .safetensors file"
            ) from None
    for key in ("state_dict", "model"):  # where training scripts put it
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(v, torch.Tensor) and isinstance(k, str) for k, v in content.items()
    ):
        raise UserError(f"{path}: not a file of weights: expected a state_dict, names with their tensors")
    return content


def _wanted(model: "Model") -> "Weights | None":
    """The weight file of a model: the one it names, else that of the backbone's library."""
    if model.pretrained == "none":
        return None
    named = model.weights
    if named is not None and (named.path or named.addresses):
        return named
    own = backbone_class(model.backbone).own_weights(model.backbone)
    said = {"sha256": named.sha256, "license": named.license} if named is not None else {}
    return own.model_copy(update={key: value for key, value in said.items() if value})


def _file_name(model: "Model", weights: "Weights") -> str:
    """bn_inception-52deb4733.pth, resnet50-0676ba61.pth: as these files are called where they come from."""
    name = model.backbone.rpartition("/")[2]
    sources = [weights.path.name] if weights.path else [urlsplit(address).path for address in weights.addresses]
    suffix = ".safetensors" if any(source.endswith(".safetensors") for source in sources) else ".pth"
    return f"{name}-{weights.sha256[:9]}{suffix}" if weights.sha256 else f"{name}{suffix}"


def _obtain(weights: "Weights", target: Path) -> str:
    """Make `target` the weight file; returns the path or address that it came from, or str(target) if it was there."""
    if weights.path is None:
        from memvir.download import fetch  # late: loading weights needs no network

        try:
            return fetch(weights.addresses, target, algorithm="sha256", digest=weights.sha256, what=target.name)
        except UserError as error:
            known = weights.sha256 is not None
            raise UserError(
                f"{error}. If you can get the file elsewhere, {f'save it as {target}, or ' if known else ''}name "
                "its place under model.weights.path" + (f"; its sha256 starts with {weights.sha256}" if known else "")
            ) from None
    path = weights.path
    if not path.is_file():
        raise UserError(f"model.weights.path: {path} is not a file")
    _check_hash(path, weights.sha256 or "", "set model.weights.path to the right file")
    if not (target.exists() and path.samefile(target)):
        with path.open("rb") as source, atomic_write(target) as copy:
            shutil.copyfileobj(source, copy)
    return str(weights.path)


def _check_hash(path: Path, expected: str, action: str) -> None:
    """Raises UserError unless the file's sha256 starts with `expected`."""
    found = file_hash(path, "sha256")
    if not found.startswith(expected):
        raise UserError(f"{path}: its sha256 is {found[: max(16, len(expected))]}..., expected {expected}...; {action}")


def read_source(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(value, str) for value in content.values())
    return content if whole else {}
