"""Models as ONNX."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from memvir import load_model
from memvir.errors import MissingExtra, UserError
from memvir.trained import onnx as export
from tests.models import make_model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": "bgr", "backbone": "bn_inception", "size": 32},
        {"channels": "rgb", "backbone": "timm/test_vit", "size": 160, "pooling": "head"},
    ],
    ids=["convnet", "bn_inception", "vit"],
)
def test_onnxruntime_gives_the_same_embeddings_for_any_number_of_pictures(tmp_path, options):
    model = load_model(make_model(tmp_path / "model.safetensors", **options))
    assert export.export_onnx(model, tmp_path / "model.onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert entry.name == "images" and result.name == "embeddings"
    assert isinstance(entry.shape[0], str) and result.shape == [entry.shape[0], model.dim]
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (200, 180, 3)).astype(np.uint8) for _ in range(7)]
    images = torch.stack([model.transform(picture) for picture in pictures]).numpy()
    found = session.run(None, {"images": images})[0]
    np.testing.assert_allclose(found, model.embed(pictures), atol=1e-5)


def test_the_file_holds_the_preprocessing_and_nothing_of_this_machine(tmp_path):
    model = load_model(make_model(tmp_path / "model.safetensors"))
    contents = []
    for name in ("a.onnx", "b.onnx"):
        export.export_onnx(model, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    props = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert props["preprocessing"] == model.metadata["preprocessing"] and props["run"]["dataset"] == "tiny"
    assert b"site-packages" not in contents[0] and b".py" not in contents[0]


def test_a_network_that_comes_out_different_is_not_written(tmp_path, monkeypatch):
    model = load_model(make_model(tmp_path / "model.safetensors"))
    monkeypatch.setattr(export, "_difference", lambda *_: float("nan"))
    with pytest.raises(UserError, match=r"model\.onnx: not written: onnxruntime's output is nan off torch's"):
        export.export_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    model = load_model(make_model(tmp_path / "model.safetensors"))
    with pytest.raises(MissingExtra, match=r'onnxscript: not installed; pip install "memvir\[export\]"'):
        export.export_onnx(model, tmp_path / "model.onnx")
