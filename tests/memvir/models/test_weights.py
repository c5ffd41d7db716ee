"""memvir.models.weights: fetched, checked, loaded to the letter, and never a program."""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memvir import download
from memvir.errors import UserError
from memvir.models import (
    BNInception,
    ConvNet,
    TimmNetwork,
    TorchvisionNetwork,
    build_embedder,
    fetch_weights,
    find_weights,
    load_weights,
)
from memvir.models.settings import Model, Weights
from memvir.models.weights import SOURCE
from tests.http_server import MisbehavingServer

REPOSITORY = Path(__file__).parents[3]


def model(backbone: str = "bn_inception", pretrained: str = "imagenet", **weights: Any) -> Model:
    return Model(
        backbone=backbone,
        pretrained=pretrained,
        weights=Weights(**{"addresses": [], **weights}) if weights else None,
        pooling="gap",
        embedding_dim=8,
        freeze_batch_norm=True,
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """What the real file holds: BN-Inception's keys, every value its own, and the classifier."""
    torch.manual_seed(1)
    state = {key: torch.rand(value.shape).to(value.dtype) for key, value in BNInception().state_dict().items()}
    return {**state, "last_linear.weight": torch.rand(1000, 1024), "last_linear.bias": torch.rand(1000)}


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def source(folder: Path) -> dict[str, str]:
    return json.loads((folder / SOURCE).read_text())


# --- loading ---


def test_every_value_of_the_file_is_loaded_and_only_the_classifier_is_dropped(
    file: Path, state: dict[str, Tensor]
) -> None:
    embedder = build_embedder(model(sha256="0" * 8), 3, file)
    loaded = embedder.backbone.state_dict()
    assert set(state) - set(loaded) == {"last_linear.weight", "last_linear.bias"}
    for key, value in loaded.items():
        assert torch.equal(value, state[key]), key


def test_a_file_in_the_format_of_2018_is_read_as_well(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    network = BNInception()
    load_weights(network, path)
    assert torch.equal(network.inception_5b_1x1.weight, state["inception_5b_1x1.weight"])


def test_networks_of_a_library_take_its_files_under_its_names_and_drop_the_classifier_alone(tmp_path: Path) -> None:
    import timm
    from torchvision.models import resnet18

    whole = resnet18(weights=None).state_dict()
    torch.save(whole, tmp_path / "resnet18.pth")
    network = TorchvisionNetwork("torchvision/resnet18", "gap")
    load_weights(network, tmp_path / "resnet18.pth")
    assert all(torch.equal(value, whole[key]) for key, value in network.network.state_dict().items())

    whole = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(whole, tmp_path / "mobile.safetensors")
    network = TimmNetwork("timm/mobilenetv3_small_050", 3, "gap")
    load_weights(network, tmp_path / "mobile.safetensors")
    loaded = network.network.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in loaded.items())
    assert whole.keys() - loaded.keys() == {"classifier.weight", "classifier.bias"}
    with pytest.raises(UserError, match=r"resnet18\.pth: has no 'conv_stem\.weight', which timm/mobilenetv3_small_050"):
        load_weights(network, tmp_path / "resnet18.pth")


def test_weights_for_colour_images_serve_grey_ones_by_their_sum(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(whole, tmp_path / "mobile.safetensors")
    network = TimmNetwork("timm/mobilenetv3_small_050", 1, "gap")
    load_weights(network, tmp_path / "mobile.safetensors")
    torch.testing.assert_close(network.network.conv_stem.weight, whole["conv_stem.weight"].sum(1, keepdim=True))


def test_a_state_dict_may_lie_where_training_scripts_put_it(tmp_path: Path) -> None:
    whole = ConvNet([2], 1).state_dict()
    for key in ("state_dict", "model"):
        torch.save({key: whole, "epoch": 3}, tmp_path / "checkpoint.pth")
        network = ConvNet([2], 1)
        load_weights(network, tmp_path / "checkpoint.pth")
        assert all(torch.equal(value, whole[name]) for name, value in network.state_dict().items())


def test_keys_as_another_code_base_writes_them_become_timms_own(tmp_path: Path) -> None:
    network = TimmNetwork("timm/vit_tiny_patch16_224", 3, "head")
    whole = {key: torch.rand_like(value) for key, value in network.network.state_dict().items()}
    torch.save({f"visual.trunk.{key}": value for key, value in whole.items()}, tmp_path / "open_clip.pth")
    load_weights(network, tmp_path / "open_clip.pth")
    assert all(torch.equal(value, whole[key]) for key, value in network.network.state_dict().items())

    torch.save({f"other.{key}": value for key, value in whole.items()}, tmp_path / "odd.pth")
    torch.save({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "short.pth")
    for name in ("odd", "short"):
        with pytest.raises(UserError, match=rf"{name}\.pth: .* weights of another network") as caught:
            load_weights(network, tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inception_3a_1x1.weight": None}, r"has no 'inception_3a_1x1\.weight', which BNInception needs"),
        ({"conv2_3x3_bn.running_var": None, "last_linear.bias": None}, r"has no 'conv2_3x3_bn\.running_var'"),
        ({"conv1_7x7_s2_bn.num_batches_tracked": None}, r"has no 'conv1_7x7_s2_bn\.num_batches_tracked'"),
        ({"conv1_7x7_s2.weight": (64, 1, 7, 7)}, r"'conv1_7x7_s2\.weight' has the shape \(64, 1, 7, 7\), .* \(64, 3,"),
        ({"conv1_7x7_s2_bn.weight": (1, 64)}, r"'conv1_7x7_s2_bn\.weight' has the shape \(1, 64\), .* \(64,\)"),
        ({"fc.weight": (10, 1024)}, r"has 'fc\.weight', which BNInception does not know"),
    ],
)
def test_the_first_key_that_differs_is_named_with_the_file(
    state: dict[str, Tensor], tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    changed = {key: value for key, value in state.items() if key not in change}
    changed |= {key: torch.zeros(shape) for key, shape in change.items() if shape is not None}
    torch.save(changed, tmp_path / "other.pth")
    network = BNInception()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"other\.pth: {message}"):
        load_weights(network, tmp_path / "other.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), "nothing half loaded"


def test_a_file_older_than_batch_norms_counters_is_accepted(state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    network = BNInception()
    load_weights(network, tmp_path / "old.pth")
    assert torch.equal(network.conv1_7x7_s2_bn.running_var, state["conv1_7x7_s2_bn.running_var"])


class Program:
    """Unpickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["pickle", "legacy", "zip"])
def test_a_malicious_pickle_is_refused_and_not_executed(
    form: str, suffix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    content = {**state, "last_linear.bias": Program(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Program(trace)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"evil\.\w+: not a file of weights that can be read safely") as caught:
        load_weights(BNInception(), path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not trace.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path.rename(path.with_suffix(".pth")), weights_only=False)
    assert trace.exists(), "the same file does run where pickles are trusted"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"PK\x03\x04 broken", b"\x80\x02", b"\x00" * 1000], ids=repr
)
def test_what_is_no_weight_file_is_an_error_of_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken{re.escape(suffix)}: not a file of weights") as caught:
        load_weights(ConvNet([1], 1), path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_an_error(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[: 10**6])
    with pytest.raises(UserError, match=r"cut\.pth: not a file of weights"):
        load_weights(BNInception(), cut)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(3)], ids=repr)
def test_tensors_in_another_form_than_a_state_dict_are_an_error(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="expected a state_dict"):
        load_weights(BNInception(), tmp_path / "odd.pth")


# --- fetching and finding ---


def test_a_local_file_is_copied_under_its_usual_name_with_a_note_of_its_source(file: Path, folder: Path) -> None:
    settings = model(sha256=sha256(file)[:9], path=str(file), addresses=["http://127.0.0.1:9/never-asked"])
    fetch_weights(settings, folder)
    name = f"bn_inception-{sha256(file)[:9]}.pth"
    assert sorted(path.name for path in folder.iterdir()) == [name, SOURCE]
    assert source(folder) == {
        "backbone": "bn_inception",
        "pretrained": "imagenet",
        "file": name,
        "source": str(file),
        "sha256": sha256(file),
    }
    assert find_weights(settings, folder) == folder / name
    assert (folder / name).read_bytes() == file.read_bytes()


def test_the_file_may_already_lie_where_it_belongs(file: Path, folder: Path) -> None:
    folder.mkdir()
    target = folder / f"bn_inception-{sha256(file)[:9]}.pth"
    shutil.copy(file, target)
    for settings in (model(sha256=sha256(file)[:9]), model(sha256=sha256(file)[:9], path=str(target))):
        fetch_weights(settings, folder)
        assert source(folder)["source"] == str(target)


@pytest.mark.parametrize("problem", ["missing", "a folder", "another file"])
def test_a_local_file_that_is_not_the_one_is_an_error_naming_file_and_key(
    problem: str, tmp_path: Path, folder: Path
) -> None:
    path = tmp_path / "mine.pth"
    if problem == "a folder":
        path.mkdir()
    elif problem == "another file":
        path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"mine\.pth") as caught:
        fetch_weights(model(sha256="52deb4733", path=str(path)), folder)
    assert "model.weights.path" in str(caught.value)
    if problem == "another file":
        assert "expected 52deb4733" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_addresses_are_tried_in_order_and_the_one_used_is_recorded(
    file: Path, folder: Path, server: MisbehavingServer
) -> None:
    content = file.read_bytes()
    wrong, right = (
        server.serve("wrong.pth", b"x" * 1000),
        server.serve("right.pth", content, cut_at=[len(content) // 2]),
    )
    settings = model(sha256=sha256(file)[:9], addresses=[server.address("missing.pth"), wrong, right])
    fetch_weights(settings, folder)
    assert source(folder)["source"] == right
    assert sha256(find_weights(settings, folder)) == sha256(file)

    asked = len(server.requests)
    fetch_weights(settings, folder)
    assert len(server.requests) == asked, "a file that is there is not downloaded again"
    assert source(folder)["source"] == right, "and where it came from is still known"


def test_when_no_address_helps_the_message_says_what_was_tried_and_what_to_do(
    folder: Path, server: MisbehavingServer
) -> None:
    missing = server.address("missing.pth")
    with pytest.raises(UserError) as caught:
        fetch_weights(model(sha256="52deb4733", addresses=[missing]), folder)
    for part in (missing, "404", str(folder / "bn_inception-52deb4733.pth"), "model.weights.path", "sha256"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "address"),
    [
        ("resnet18", r"https://download\.pytorch\.org/models/resnet18-\w+\.pth"),
        ("resnet101", r"https://download\.pytorch\.org/models/resnet101-\w+\.pth"),
        ("torchvision/mobilenet_v2", r"https://download\.pytorch\.org/models/mobilenet_v2-\w+\.pth"),
        ("timm/mobilenetv2_100", r"https://github\.com/.*/mobilenetv2_100_ra-\w+\.pth"),
        ("timm/mobilenetv2_100.ra_in1k", r"https://github\.com/.*/mobilenetv2_100_ra-\w+\.pth"),
    ],
)
def test_a_librarys_own_file_is_checked_by_the_hash_in_its_name(
    backbone: str, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def fetch(addresses: list[str], target: Path, **options: Any) -> str:
        calls.append({"addresses": addresses, "target": target, **options})
        target.write_bytes(b"weights")
        return addresses[0]

    monkeypatch.setattr(download, "fetch", fetch)
    fetch_weights(model(backbone), folder)
    (call,) = calls
    (found,) = call["addresses"]
    assert re.fullmatch(address, found)
    assert call["target"] == folder / f"{backbone.rpartition('/')[2]}-{call['digest']}.pth"
    assert call["algorithm"] == "sha256" and found.endswith(f"-{call['digest']}.pth")


def test_a_file_whose_library_gives_no_hash_is_checked_by_that_of_the_first_download_from_then_on(
    folder: Path, server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = model("timm/vit_tiny_patch16_224")
    (address,) = TimmNetwork.own_weights(settings.backbone).addresses
    hub = "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors"
    assert address == hub
    served = Weights(addresses=[server.serve("model.safetensors", b"the first")])
    monkeypatch.setattr(TimmNetwork, "own_weights", staticmethod(lambda backbone: served))
    path = folder / "vit_tiny_patch16_224.safetensors"
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224\.safetensors: the weights .* are missing"):
        find_weights(settings, folder)

    caplog.set_level("INFO")
    fetch_weights(settings, folder)
    first = sha256(path)
    assert find_weights(settings, folder) == path and source(folder)["sha256"] == first
    assert f"write model.weights.sha256: {first}" in caplog.text
    asked = len(server.requests)
    fetch_weights(settings, folder)
    assert len(server.requests) == asked and source(folder)["source"] == served.addresses[0]

    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"sha256 is .*expected {first}"):
        find_weights(settings, folder)
    server.serve("model.safetensors", b"another")
    with pytest.raises(UserError, match=rf"expected {first}"):
        fetch_weights(settings, folder)
    named = model("timm/vit_tiny_patch16_224", sha256=hashlib.sha256(b"another").hexdigest())
    fetch_weights(named, folder)
    assert find_weights(named, folder).read_bytes() == b"another", "a sha256 in params.yaml is enough to insist on"


def test_a_local_file_needs_no_hash_and_is_taken_as_it_is_each_time(tmp_path: Path, folder: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    settings = model("timm/vit_tiny_patch16_224", path=str(mine))
    for content in (b"one", b"two"):
        mine.write_bytes(content)
        fetch_weights(settings, folder)
        assert find_weights(settings, folder).read_bytes() == content
        assert source(folder)["sha256"] == sha256(mine)


def test_a_network_without_weights_of_its_own_asks_for_a_file_by_the_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no weight file for timm/vit_base_r26_s32_224.*model\.weights\.path"):
        fetch_weights(model("timm/vit_base_r26_s32_224"), folder)


def test_random_weights_leave_a_note_that_says_so(folder: Path) -> None:
    settings = model("convnet", "none")
    fetch_weights(settings, folder)
    assert source(folder) == {"backbone": "convnet", "pretrained": "none"}
    assert [path.name for path in folder.iterdir()] == [SOURCE]
    assert find_weights(settings, folder) is None


def test_a_file_of_earlier_settings_is_removed_but_never_one_that_a_person_put_there(file: Path, folder: Path) -> None:
    fetch_weights(model(sha256=sha256(file)[:8], path=str(file)), folder)
    (folder / "mine.pth").write_bytes(b"kept")
    fetch_weights(model("convnet", "none"), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.pth", SOURCE]


@pytest.mark.parametrize("note", ["", "[]", "{", '{"file": "../outside.pth", "sha256": 1}', '{"file": 3}'])
def test_a_damaged_note_is_written_anew(note: str, tmp_path: Path, folder: Path) -> None:
    folder.mkdir()
    (tmp_path / "outside.pth").write_bytes(b"kept")
    (folder / SOURCE).write_text(note)
    fetch_weights(model("convnet", "none"), folder)
    assert source(folder)["pretrained"] == "none"
    assert (tmp_path / "outside.pth").exists()


def test_a_missing_or_changed_file_is_an_error_before_it_is_opened(file: Path, folder: Path) -> None:
    settings = model(sha256=sha256(file)[:9])
    with pytest.raises(UserError, match=r"bn_inception-[0-9a-f]{9}\.pth: the weights .* are missing"):
        find_weights(settings, folder)
    folder.mkdir()
    path = folder / f"bn_inception-{sha256(file)[:9]}.pth"
    path.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match=rf"sha256 is .*expected {sha256(file)[:9]}\.\.\.; delete it"):
        find_weights(settings, folder)


def test_an_interrupted_copy_leaves_no_file(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Any, copy: Any) -> None:
        copy.write(source.read(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights(model(sha256=sha256(file)[:9], path=str(file)), folder)
    assert list(folder.iterdir()) == []


# --- the stage ---


def test_the_stage_fills_the_folder_of_the_data_set_and_its_errors_are_one_line(tmp_path: Path) -> None:
    def stage(dataset: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stages.weights", "--dataset", dataset]
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    parameters = (REPOSITORY / "params.yaml").read_text()
    assert "path: null" in parameters
    (tmp_path / "params.yaml").write_text(parameters.replace("path: null", "path: nowhere.pth"))
    done = stage("glyphs")
    assert done.returncode == 0, done.stderr
    assert source(tmp_path / "dataset" / "glyphs" / "weights")["pretrained"] == "none"
    failed = stage("cars196")
    assert failed.returncode == 1
    assert failed.stderr == "error: model.weights.path: nowhere.pth is not a file\n"
