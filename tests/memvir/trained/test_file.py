"""The model file: all of it or one line that says what is missing."""

import json
import pickle
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from memvir.errors import UserError
from memvir.trained.file import KEY, find, pack, read
from tests.models import make_model, metadata, settings


@pytest.fixture
def path(tmp_path):
    return make_model(tmp_path / "model.safetensors")


def rewrite(path, change) -> None:
    """Let `change` act on the metadata and weights of a model file."""
    with safetensors.safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[KEY])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = change(content, weights) or content
    path.write_bytes(safetensors.torch.save(weights, {KEY: json.dumps(content)}))


def test_a_model_comes_back_with_its_weights_and_all_that_was_said_of_it(path):
    run = settings()
    file = read(path)
    assert {key: file.metadata[key] for key in metadata(run)} == metadata(run)
    assert file.preprocessing.crop == (16, 16) and file.preprocessing.std == [0.3]
    embedder = file.build()
    assert not embedder.training
    assert all(torch.equal(embedder.state_dict()[name], tensor) for name, tensor in file.weights.items())


def test_the_same_model_is_the_same_bytes_in_every_process(path, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.models import make_model; "
        "sys.stdout.buffer.write(make_model(Path(sys.argv[1])).read_bytes())"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout == path.read_bytes()


def test_the_file_says_nothing_of_this_machine_and_of_the_time(path):
    text = json.dumps(read(path).metadata)
    assert "/" not in text.replace("convnet", "") and "torch" not in text and "threads" in text


def test_weights_on_the_device_layout_of_a_gpu_are_written_as_plain_ones():
    weights = {"w": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)}
    plain = {"w": weights["w"].contiguous()}
    assert pack(weights, {}) == pack(plain, {})


@pytest.mark.parametrize("bytes_left", [0, 7, 100, -50])
def test_a_file_cut_short_is_named(path, bytes_left):
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file .*; get the file again$"):
        read(path)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('hostile code ran')",))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_under_the_name_of_a_model_is_left_unread(path, kind):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"weight": Hostile()}, path)
    with pytest.raises(UserError, match="it is a pickle or a zip, which was left unread"):
        read(path)


def test_weights_without_metadata_are_no_model(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"model\.safetensors: has no 'memvir' in its metadata"):
        read(path)


def test_a_newer_format_says_what_to_upgrade(path):
    rewrite(path, lambda content, _: {**content, "format": 2, "run": "of another shape"})
    with pytest.raises(UserError, match=r"is of format 2, and this version of memvir reads up to 1; pip install --upg"):
        read(path)


@pytest.mark.parametrize(
    "key",
    ["format", "classes", "metrics", "run", "run.seed", "preprocessing.std", "architecture.in_channels", "weights"],
)
def test_a_missing_key_is_named(path, key):
    def remove(content, _):
        *sections, last = key.split(".")
        for section in sections:
            content = content[section]
        del content[last]

    rewrite(path, remove)
    with pytest.raises(UserError, match=rf"model\.safetensors: has no {key} in its metadata; "):
        read(path)


def test_a_missing_option_of_the_backbone_is_named(path):
    rewrite(path, lambda content, _: content["architecture"].pop("widths") and None)
    with pytest.raises(UserError, match=r"has no architecture\.widths in its metadata"):
        read(path).build()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture.embedding_dim", 10**12),
        ("architecture.embedding_dim", True),
        ("architecture.in_channels", 3),
        ("architecture.pooling", "mean"),
        ("architecture.precision", "fp8"),
        ("preprocessing.size", 0),
        ("preprocessing.resize", 8),
        ("preprocessing.channels", "hsv"),
        ("preprocessing.mean", [0.5, 0.5]),
        ("preprocessing.mean", [float("nan")]),
        ("preprocessing.std", [0]),
        ("preprocessing.std", "0.5"),
        ("preprocessing.value_range", 2),
    ],
)
def test_an_impossible_value_is_named(path, key, value):
    section, name = key.split(".")
    rewrite(path, lambda content, _: content[section].update({name: value}))
    with pytest.raises(UserError, match=rf"model\.safetensors: {key}: "):
        read(path)


@pytest.mark.parametrize(("key", "value"), [("backbone", "transformer"), ("widths", ["a"]), ("widths", [-1])])
def test_a_network_that_cannot_be_built_says_why(path, key, value):
    rewrite(path, lambda content, _: content["architecture"].update({key: value}))
    with pytest.raises(UserError, match=r"model\.safetensors: architecture: memvir cannot build it \("):
        read(path).build()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("embedding.bias"), r"Missing key\(s\) in state_dict: \"embedding\.bias\""),
        (lambda weights: weights.update(more=torch.ones(1)), r"Unexpected key\(s\) in state_dict: \"more\""),
        (lambda weights: weights.update({"embedding.bias": torch.ones(9)}), r"size mismatch for embedding\.bias"),
    ],
)
def test_weights_of_another_network_are_named(path, change, reason):
    rewrite(path, lambda content, weights: change(weights) is None and None)
    with pytest.raises(UserError, match=rf"its weights are not those of its architecture \({reason}"):
        read(path).build()


def test_metadata_that_are_no_json_are_named(path):
    path.write_bytes(safetensors.torch.save({}, {KEY: "{"}))
    with pytest.raises(UserError, match="the metadata 'memvir' is not JSON"):
        read(path)
    path.write_bytes(safetensors.torch.save({}, {KEY: "[1]"}))
    with pytest.raises(UserError, match="has no format in its metadata"):
        read(path)


def test_a_folder_is_searched_for_its_model(path, tmp_path):
    assert find(tmp_path) == find(path) == path
    path.unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors; give the folder of a finished run"):
        find(tmp_path)
    with pytest.raises(UserError, match="there is no such model file"):
        find(path)
