"""The file of a trained model: its weights as safetensors, which runs no code, and beside them what it takes to use it.

The metadata is one JSON text under the key `memvir`, because safetensors writes several keys in another order each
time. So the same model is the same bytes. It holds

    format          1, raised when a reader has to know more
    architecture    what `ModelFile.build` takes: backbone and its options, pooling, embedding_dim, ...
    preprocessing   how a picture becomes the network's input
    classes         the names of the training classes, in the order of their labels
    run             data set, variant, seed, epoch and settings that it came from
    metrics         of the run's test images, in [0, 1]
    weights         what it started from: pretrained, and the source, sha256 and licence of that file

and neither time nor machine.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import safetensors
import safetensors.torch
from torch import Tensor

from memvir.errors import UserError
from memvir.images.pixels import Channels, Crop
from memvir.models import Embedder, build_embedder
from memvir.models.embedder import POOLINGS, PRECISIONS

FORMAT = 1
KEY = "memvir"
NAME = "model.safetensors"
"""What a run's folder calls the model of its last epoch."""

KEYS: dict[str, type | dict[str, type]] = {
    "architecture": {
        "backbone": str,
        "pooling": str,
        "embedding_dim": int,
        "freeze_batch_norm": bool,
        "in_channels": int,
        "precision": str,
    },
    "preprocessing": {
        "size": int,
        "resize": int,
        "channels": str,
        "value_range": int,
        "mean": list,
        "std": list,
    },
    "classes": list,
    "run": {"dataset": str, "variant": str, "seed": int, "epoch": int, "settings": dict},
    "metrics": dict,
    "weights": {"pretrained": str},
}
"""What must be there; more may be."""


@dataclass(frozen=True)
class Preprocessing:
    """The deterministic crop of a test image, and what its pixel values become."""

    size: int
    resize: int
    channels: Channels
    value_range: int
    mean: list[float]
    std: list[float]

    @property
    def crop(self) -> Crop:
        return Crop(self.resize, self.size)


@dataclass(frozen=True)
class ModelFile:
    path: Path
    metadata: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def preprocessing(self) -> Preprocessing:
        fields = Preprocessing.__dataclass_fields__
        return Preprocessing(**{key: self.metadata["preprocessing"][key] for key in fields})

    def build(self) -> Embedder:
        """The network on the CPU, in eval mode. Raises UserError if the weights are not those of the architecture."""
        options = {**self.metadata["architecture"], "pretrained": "none", "weights": None}
        settings = SimpleNamespace(**options)
        try:
            embedder = build_embedder(cast(Any, settings), options["in_channels"], None)
        except AttributeError as error:
            if error.obj is not settings:
                raise
            raise UserError(_missing(self.path, f"architecture.{error.name}")) from None
        except Exception as error:  # whatever a network raises over options that are none
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.path}: architecture: memvir cannot build it ({type(error).__name__}: {reason}); "
                "use the version of memvir that wrote the file, or a newer one"
            ) from None
        try:
            embedder.float().load_state_dict(self.weights)  # float32 whatever torch's default type is
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(": ")[2] or str(error)
            raise UserError(
                f"{self.path}: its weights are not those of its architecture ({reason[:300]}); get the file again"
            ) from None
        return embedder.eval()


def pack(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The content of a model file: the same for the same weights and metadata."""
    text = json.dumps({"format": FORMAT, **metadata}, ensure_ascii=False, allow_nan=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return safetensors.torch.save(tensors, {KEY: text})


def find(path: Path) -> Path:
    """The model file at a path: itself, or a run folder's. Raises UserError if there is none."""
    if path.is_dir():
        if not (path / NAME).is_file():
            raise UserError(f"{path}: holds no {NAME}; give the folder of a finished run, or a model file")
        return path / NAME
    if not path.is_file():
        raise UserError(f"{path}: there is no such model file; give a model file or the folder of a finished run")
    return path


def read(path: Path) -> ModelFile:
    """Read a model file and check that all is there. Raises UserError naming the file, and the key if one is wrong."""
    weights: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            for name in file.keys():  # noqa: SIM118  not a dict
                weights[name] = file.get_tensor(name)
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what torch raises over types that it does not know
        with path.open("rb") as file:
            is_pickle = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        why = "it is a pickle or a zip, which was left unread" if is_pickle else " ".join(str(error).split())
        raise UserError(f"{path}: not a whole safetensors file ({why}); get the file again") from None
    if text is None:
        raise UserError(
            f"{path}: has no {KEY!r} in its metadata, so its weights have no architecture; give a model file that a "
            "run of memvir left"
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the metadata {KEY!r} is not JSON; get the file again") from None
    check(path, metadata)
    return ModelFile(path, metadata, weights)


def check(path: Path, metadata: Any) -> None:
    """UserError unless the metadata have every key, of the right type and within its range."""
    if not isinstance(metadata, dict) or type(metadata.get("format")) is not int:
        raise UserError(_missing(path, "format"))
    if metadata["format"] > FORMAT:
        raise UserError(
            f"{path}: is of format {metadata['format']}, and this version of memvir reads up to {FORMAT}; "
            "pip install --upgrade memvir"
        )
    for section, kinds in KEYS.items():
        content = _of_type(path, metadata, section, kinds if isinstance(kinds, type) else dict)
        for key, kind in kinds.items() if isinstance(kinds, dict) else ():
            _of_type(path, content, key, kind, f"{section}.")
    architecture, preprocessing = metadata["architecture"], metadata["preprocessing"]
    channels = 1 if preprocessing["channels"] == "grey" else 3
    good = {
        "architecture.pooling": architecture["pooling"] in POOLINGS,
        "architecture.precision": architecture["precision"] in PRECISIONS,
        "architecture.embedding_dim": 1 <= architecture["embedding_dim"] <= 65536,
        "preprocessing.channels": preprocessing["channels"] in ("grey", "rgb", "bgr"),
        "architecture.in_channels": architecture["in_channels"] == channels,
        "preprocessing.size": 1 <= preprocessing["size"] <= 4096,
        "preprocessing.resize": preprocessing["size"] <= preprocessing["resize"] <= 4096,
        "preprocessing.value_range": preprocessing["value_range"] in (1, 255),
        "preprocessing.mean": _numbers(preprocessing["mean"], channels),
        "preprocessing.std": _numbers(preprocessing["std"], channels) and min(preprocessing["std"]) > 0,
        "classes": all(isinstance(name, str) for name in metadata["classes"]),
    }
    for name, fine in good.items():
        if not fine:
            section, _, key = name.partition(".")
            value = metadata[section][key] if key else metadata[section]
            raise UserError(f"{path}: {name}: {str(value)[:80]!r} is not possible; get the file again")


def _of_type(path: Path, content: Mapping[str, Any], key: str, kind: type, prefix: str = "") -> Any:
    if key not in content:
        raise UserError(_missing(path, prefix + key))
    if type(content[key]) is not kind:  # True is an int, but not here
        raise UserError(
            f"{path}: {prefix}{key}: {str(content[key])[:80]!r} is not of type {kind.__name__}; get the file again"
        )
    return content[key]


def _numbers(values: list[Any], count: int) -> bool:
    return len(values) == count and all(type(v) in (int, float) and math.isfinite(v) for v in values)


def _missing(path: Path, key: str) -> str:
    return f"{path}: has no {key} in its metadata; get the file again, or train the model again"
