"""A trained model as an ONNX file, checked against torch before it is written."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memvir.errors import UserError
from memvir.extras import require
from memvir.files import atomic_write
from memvir.trained.model import TrainedModel

TOLERANCE = 1e-5
CHECKED_BATCHES = (1, 2, 5)


class Normalised(nn.Module):
    """forward: network input (B, C, S, S) -> embeddings (B, D) of length 1."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(self.embedder(images))


def export_onnx(model: TrainedModel, path: Path) -> float:
    """Write the network as ONNX: `images` (batch, C, S, S) float32, as `transform` gives them, to unit `embeddings`.

    The metadata holds the preprocessing, as JSON, and what else the model's file says. Returns the largest difference
    between onnxruntime's embeddings and torch's, over batches of several sizes.

    Raises:
        MissingExtra: the packages of memvir[export] are not installed.
        UserError: that difference is more than 1e-5, or the network has parts that ONNX does not know.
    """
    require("export")
    network = Normalised(model.embedder.cpu()).eval()
    images = _random_images(model, 2)
    # what the exporter says of itself (of packages that it could do with, of versions) helps nobody here
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model.file.path}: torch cannot write this network as ONNX ({reason})") from error
    assert program is not None
    content = _with_metadata(program.model_proto, model)
    difference = _difference(network, content, model)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path}: not written: onnxruntime's output is {difference:.1e} off torch's, more than {TOLERANCE:.0e}; "
            "try other versions of memvir[export]"
        )
    with atomic_write(path) as file:
        file.write(content)
    return difference


def _with_metadata(proto: Any, model: TrainedModel) -> bytes:
    """The file's bytes: with the model's metadata, without the exporter's notes, which name folders of this machine."""
    import onnx

    for graph in [proto.graph, *proto.functions]:
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
    keys = ("architecture", "preprocessing", "classes", "run", "metrics", "weights")
    onnx.helper.set_model_props(proto, {key: json.dumps(model.metadata[key], ensure_ascii=False) for key in keys})
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


def _difference(network: nn.Module, content: bytes, model: TrainedModel) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in CHECKED_BATCHES:
        images = _random_images(model, size)
        with torch.inference_mode():
            expected = network(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest


def _random_images(model: TrainedModel, count: int) -> Tensor:
    """Noise as network input: the crop of as many random pictures."""
    random, settings = np.random.default_rng(count), model.preprocessing
    shape = (settings.size, settings.size, *(() if settings.channels == "grey" else (3,)))
    return torch.stack([model.transform(random.integers(0, 256, shape).astype(np.uint8)) for _ in range(count)])
