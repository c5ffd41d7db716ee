"""params.yaml becomes a valid configuration, or one line that names the key."""

import copy
import functools
import json
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memvir.errors import UserError
from memvir.models import BACKBONES
from memvir.params import load_params, parse_params
from tests import tiny

PARAMS = Path(__file__).parents[3] / "params.yaml"


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(tiny.params())
    *parents, last = path.split(".")
    place = raw
    for key in parents:
        place = place[key]
    place[last] = value
    return raw


def test_the_repositorys_params_are_valid():
    assert load_params(PARAMS).datasets == ["glyphs"]


def test_cars196_has_the_papers_numbers():
    # docs/METHOD.md, section 3
    params = load_params(PARAMS)
    published = {
        "norm_softmax": (130, 5, [50], 23.0, None),
        "memvir_norm_softmax": (2000, 10, [], 23.0, (45, 10, 40)),
        "proxy_nca": (130, 5, [50], 12.0, None),
        "memvir_proxy_nca": (2000, 10, [], 12.0, (20, 25, 40)),
    }
    for variant, (epochs, check_epoch, decay, scale, memvir) in published.items():
        run = params.run("cars196", variant, 1)
        assert (run.training.epochs, run.training.check_epoch) == (epochs, check_epoch)
        assert run.training.lr_decay.epochs == decay and run.training.lr_decay.factor == 0.1
        assert run.loss.name == variant.removeprefix("memvir_") and run.loss.scale == scale
        found = run.memvir and (run.memvir.num_steps, run.memvir.step_gap, run.memvir.warm_up_epochs)
        assert found == memvir
        optimizer = run.training.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.lr_proxies) == ("adam", 1e-4, 1e-2)
        assert (optimizer.eps, optimizer.weight_decay) == (0.01, 1e-4)
        assert (run.training.batch_size, run.training.images_per_class, run.training.precision) == (128, 1, "fp32")
        assert (run.model.backbone, run.model.pretrained, run.model.pooling) == ("bn_inception", "imagenet", "gap")
        assert run.model.embedding_dim == 512 and run.model.freeze_batch_norm
        assert (run.images.channels, run.images.value_range) == ("bgr", 255)
        assert (run.images.mean, run.images.std) == ([104, 117, 128], [1, 1, 1])
        assert (run.images.size, run.images.test.resize) == (224, 256)
        assert run.images.train.kind == "random_resized_crop"
        assert (run.images.train.scale, run.images.train.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
        assert run.images.train.flip == 0.5
        assert run.evaluation.recall_at == [1, 2, 4, 8]


def test_proxy_synthesis_on_cars196_has_its_published_numbers():
    params = load_params(PARAMS)
    for loss in ("norm_softmax", "proxy_nca"):
        run, baseline = (params.run("cars196", f"{prefix}{loss}", 1) for prefix in ("proxy_synthesis_", ""))
        assert run.loss.options == {"scale": baseline.loss.scale, "initialisation": "uniform_d"}
        assert (run.proxy_synthesis.alpha, run.proxy_synthesis.mu, run.proxy_synthesis.warm_up_epochs) == (0.4, 1.0, 0)
        assert run.training == baseline.training and run.training.epochs == 130


@pytest.mark.parametrize("dataset", ["cars196", "rivals"])
def test_every_rival_is_a_variant_of_the_same_titles_and_baseline(dataset):
    recipe = load_params(PARAMS).recipe(dataset)
    titles = {
        "memvir": "MemVir + Norm-SoftMax",
        "proxy_synthesis": "Proxy Synthesis + Norm-SoftMax",
        "virtual_softmax": "Virtual Softmax + Norm-SoftMax",
        "broadface": "BroadFace + Norm-SoftMax",
    }
    for wrapper, title in titles.items():
        variant = f"{wrapper}_norm_softmax"
        assert recipe.variants[variant].wrapper == wrapper
        assert recipe.variants[variant].display_name == title
        assert recipe.baseline_of(variant) == "norm_softmax"
    assert recipe.baseline_of("norm_softmax") is None


def test_a_baseline_of_the_same_options_goes_before_the_first_of_the_same_loss():
    raw = tiny.params()
    variants = raw["tiny"]["variants"]
    variants["other"] = {"loss": {"name": "Norm-SoftMax", "scale": 9.0}}
    variants["between"] = {"loss": {"name": "Norm-SoftMax", "scale": 9.0}, "virtual_softmax": {}}
    variants["neither"] = {"loss": {"name": "Norm-SoftMax"}, "virtual_softmax": {}}
    variants["alone"] = {"loss": {"name": "SoftMax"}, "virtual_softmax": {}}
    recipe = parse_params(raw).recipe("tiny")
    names = ("memvir_norm_softmax", "between", "neither", "alone")
    assert [recipe.baseline_of(name) for name in names] == ["norm_softmax", "other", "norm_softmax", None]


def test_a_variants_training_overrides_the_recipes():
    raw = tiny.params()
    raw["tiny"]["variants"]["norm_softmax"]["training"] = {"epochs": 9, "optimizer": {"lr": 0.5}}
    run = parse_params(raw).run("tiny", "norm_softmax", 1)
    assert run.training.epochs == 9 and run.training.optimizer.lr == 0.5
    assert run.training.optimizer.lr_proxies == 0.01
    assert parse_params(raw).run("tiny", "memvir_norm_softmax", 1).training.epochs == 6


@pytest.mark.parametrize("spelling", ["Norm_SoftMax", "NormSoftmax", "norm softmax", "NORM-SOFTMAX"])
def test_every_spelling_of_a_loss_is_accepted(spelling):
    raw = changed("tiny.variants.norm_softmax.loss.name", spelling)
    assert parse_params(raw).run("tiny", "norm_softmax", 1).loss.name == "norm_softmax"


def test_a_loss_has_the_options_that_were_chosen_and_its_own_defaults_for_null():
    loss = {"name": "CosFace", "scale": None, "margin": 0, "initialisation": "normal_d"}
    run = parse_params(changed("tiny.variants.norm_softmax.loss", loss)).run("tiny", "norm_softmax", 1)
    assert run.loss.options == {"margin": 0.0, "initialisation": "normal_d"}
    assert run.model_dump()["loss"] == {"name": "cosface", "margin": 0.0, "initialisation": "normal_d"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sedes", [1], r"^sedes: unknown key; did you mean seeds\?"),
        ("tiny.training.epoch", 3, r"^tiny\.training\.epoch: unknown key; did you mean"),
        ("tiny.training.epochs", "ten", r"^tiny\.training\.epochs: .*found 'ten'"),
        ("tiny.training.epochs", True, r"^tiny\.training\.epochs: "),
        ("tiny.training.epochs", 0, r"^tiny\.training\.epochs: .*greater than or equal to 1"),
        ("tiny.training.optimizer.lr", float("nan"), r"^tiny\.training\.optimizer\.lr: .*finite"),
        ("tiny.training.optimizer.lr", -1, r"^tiny\.training\.optimizer\.lr: "),
        ("tiny.data", {"source": "glyphs"}, r"^tiny\.data\.images_per_class: missing"),
        (
            "tiny.data",
            {"source": "nowhere"},
            r"^tiny\.data\.source: expected one of glyphs, cars196, cub200, sop, inshop, grocery, folder, found",
        ),
        ("tiny.images.mean", [1, 2, 3], r"^tiny\.images: mean needs 1"),
        ("tiny.images.train.scale", [1.1, 0.9], r"^tiny\.images\.train\.scale: .*wrong way round"),
        (
            "tiny.variants.memvir_norm_softmax.memvir.num_steps",
            -1,
            r"^tiny\.variants\.memvir_norm_softmax\.memvir\.num_",
        ),
        (
            "tiny.variants.memvir_norm_softmax.memvir.step_gap",
            -1,
            r"^tiny\.variants\.memvir_norm_softmax\.memvir\.step_",
        ),
        ("tiny.variants.memvir_norm_softmax.memvir.warm_up_epochs", 6, r"warm_up_epochs: 6 leaves no epoch"),
        (
            "tiny.variants.memvir_norm_softmax.broadface",
            {"queue_size": 3},
            r"memvir_norm_softmax: memvir and broadface exclude each other; keep one",
        ),
        ("tiny.variants.norm_softmax.broadface", {}, r"norm_softmax\.broadface\.queue_size: missing"),
        ("tiny.variants.norm_softmax.broadface", {"queue_size": 0}, r"queue_size: .*greater than or equal to 1"),
        (
            "tiny.variants.norm_softmax.proxy_synthesis",
            {"mu": 1.1},
            r"proxy_synthesis\.mu: .*less than or equal to 1",
        ),
        ("tiny.variants.norm_softmax.proxy_synthesis", {"alpha": 0}, r"\.proxy_synthesis\.alpha: .*greater than 0"),
        ("tiny.variants.norm_softmax.virtual_softmax", {"scale": 1}, r"\.virtual_softmax\.scale: unknown key"),
        (
            "tiny.variants.norm_softmax.virtual_softmax",
            {"warm_up_epochs": 6},
            r"virtual_softmax\.warm_up_epochs: 6 leaves no epoch for Virtual Softmax out of 6",
        ),
        ("tiny.variants.memvir_norm_softmax.memvir.num_stps", 2, r"num_stps: unknown key; did you mean num_steps\?"),
        ("tiny.variants.norm_softmax.snapshot", [1], r"snapshot: unknown key; did you mean snapshots\?"),
        ("tiny.variants.norm_softmax.brodface", {"queue_size": 3}, r"brodface: unknown key; did you mean broadface\?"),
        ("tiny.variants.memvir_norm_softmax.snapshots", [7], r"snapshots: epoch 7 is beyond"),
        (
            "tiny.variants.norm_softmax.loss.name",
            "tripplet",
            r"loss\.name: unknown loss 'tripplet'; there are: Norm-Soft",
        ),
        ("tiny.variants.norm_softmax.loss.margin", 0.1, r"norm_softmax\.loss: margin is not an option of norm_softmax"),
        (
            "tiny.variants.norm_softmax.loss.sclae",
            3,
            r"sclae is not .*\(scale, initialisation\); did you mean scale\?$",
        ),
        ("tiny.variants.norm_softmax.loss", {"name": "softmax", 3: 4}, r"loss: 3 is not an option of softmax"),
        ("tiny.variants.norm_softmax.loss.scale", 0, r"^tiny\.variants\.norm_softmax\.loss\.scale: .*greater than 0"),
        ("tiny.variants.norm_softmax.loss.scale", "a", r"norm_softmax\.loss\.scale: input should be a valid number"),
        ("tiny.variants.norm_softmax.loss.initialisation", "x", r"loss\.initialisation: input should be 'uniform_c', "),
        ("tiny.variants.norm_softmax.training", {"epochs": "x"}, r"^tiny\.variants\.norm_softmax\.training\.epochs: "),
        ("datasets", ["cars"], r"'cars' is not a recipe for data set; there are: tiny"),
        ("variants", ["norm_softmix"], r"'norm_softmix' is not a variant of tiny; there are: norm_softmax, memvir_"),
        ("seeds", [1, 1], r"^seeds: .*twice"),
        ("seeds", [], r"^seeds: "),
        ("seeds", [2**32], r"^seeds\.0: .*less than 4294967296"),
        ("variants", ["norm_softmax", "tsne"], r"^variants: tsne is the run of the t-SNE figure"),
        ("tiny.variants.tsne", {"loss": {"name": "softmax"}}, r"^tiny\.variants\.tsne\.snapshots: missing"),
        ("item", {}, r"^item: the pipeline needs this name"),
        ("key", {}, r"^key: the pipeline needs this name"),
        ("recipes", {}, r"^recipes\.data: missing"),
        ("tiny.variants.recipes", {"loss": 3}, r"^tiny\.variants\.recipes\.loss: "),
        (
            "runtime.workers",
            1.5,
            r"^runtime\.workers: input should be 'auto', or input should be .*integer.*found 1\.5$",
        ),
        ("runtime.scratch", "", r"^runtime\.scratch: expected a path, found ''"),
        ("runtime.scratch", 3, r"^runtime\.scratch: expected a path, found 3"),
        ("runtime.scratch", "a\0b", r"^runtime\.scratch: expected a path"),
        ("runtime.scratch", "~no-such-user/x", r"^runtime\.scratch: ~no-such-user/x: there is no such user"),
        ("runtime.device", "gpu", r"^runtime\.device: "),
        ("tiny.model.pretrained", "imagenet", r"^tiny\.model: there are no ImageNet weights for convnet"),
        ("tiny.training.images_per_class", 4, r"^tiny\.training: batch_size \(10\) must be a multiple"),
        ("tiny.evaluation.recall_at", [2, 4], r"^tiny\.evaluation\.recall_at: .*hold 1"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(path, value, message):
    with pytest.raises(UserError) as error:
        parse_params(changed(path, value))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 1\na: 2", "- 1", "", "a: !!python/object:os.system x", "\t", "? {}\n: 1", "2: 3", "a: &a [*a]"],
)
def test_a_file_that_is_not_a_configuration_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_params(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text().replace("lr: 0.0032", "lr: 3.2e-3"))
    assert load_params(path).recipes["glyphs"].training.optimizer.lr == 0.0032


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999])
def test_the_seed_of_a_run_is_checked_like_those_of_the_file(seed):
    with pytest.raises(UserError, match=rf"^seed: .*found {seed}$"):
        parse_params(tiny.params()).run("tiny", "norm_softmax", seed)
    assert parse_params(tiny.params()).run("tiny", "norm_softmax", 2**32 - 1).seed == 2**32 - 1


def test_every_path_of_the_file_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert parse_params(changed("runtime.scratch", "~/x")).runtime.scratch == Path("/home/ann/x")
    weights = {"addresses": [], "sha256": "0" * 8, "path": "~/bn.pth"}
    assert parse_params(changed("tiny.model.weights", weights)).recipe("tiny").model.weights.path == Path(
        "/home/ann/bn.pth"
    )
    for key in ("archive", "folder"):
        data = {"source": "cars196", "addresses": [], "md5": None, key: "~/cars"}
        assert getattr(parse_params(changed("tiny.data", data)).recipe("tiny").data, key) == Path("/home/ann/cars")


def test_a_data_set_may_be_called_like_a_key():
    for name in ("loss", "params", "recipes", "training", "metrics"):
        raw = tiny.params()
        raw |= {"datasets": [name], name: raw.pop("tiny")}
        assert parse_params(raw).run(name, "norm_softmax", 1).name == f"{name}/norm_softmax/1"
        raw[name]["training"]["epochs"] = "x"
        with pytest.raises(UserError, match=rf"^{name}\.training\.epochs: "):
            parse_params(raw)


# --- backbones and what they want of images ---


def backbone(name: Any, **images: Any) -> dict[str, Any]:
    """The tiny recipe with a backbone and, of size, test, channels, value_range, mean and std, only `images`."""
    raw = changed("tiny.model.backbone", name)
    raw["tiny"]["images"] = {"train": raw["tiny"]["images"]["train"], **images}
    return raw


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "torchvision/resnet18"),
        ("torchvision/mobilenet_v2", "torchvision/mobilenet_v2"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("convnet", "convnet"),
    ],
)
def test_a_backbone_is_one_of_ours_or_a_librarys(name, expected):
    assert parse_params(changed("tiny.model.backbone", name)).recipes["tiny"].model.backbone == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tim/resnet18", "timm/NAME"), ("convnett", "convnet"), ("timm", "timm/NAME"), ("timm/", "timm/NAME"), ("x", "")],
)
def test_an_unknown_backbone_names_the_choices_and_a_near_one(name, hint):
    with pytest.raises(UserError) as error:
        parse_params(changed("tiny.model.backbone", name))
    message = f"tiny.model.backbone: expected one of {', '.join(BACKBONES)}, found {name!r}"
    assert str(error.value) == message + (f"; did you mean {hint}?" if hint else "")


@pytest.mark.parametrize(
    ("name", "size", "resize", "mean", "std"),
    [
        ("timm/vit_tiny_patch16_224", 224, 248, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("timm/convnext_atto", 224, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("torchvision/mobilenet_v2", 224, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("resnet50", 224, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("bn_inception", 224, 256, [104, 117, 128], [1, 1, 1]),
    ],
)
def test_what_images_leaves_out_is_as_the_backbone_wants_it(name, size, resize, mean, std):
    run = parse_params(backbone(name)).run("tiny", "norm_softmax", 1)
    assert (run.images.size, run.images.test.resize) == (size, resize)
    assert (run.images.mean, run.images.std) == (mean, std)
    ours = name == "bn_inception"
    assert (run.images.channels, run.images.value_range) == (("bgr", 255) if ours else ("rgb", 1))


def test_what_images_names_holds_and_the_rest_comes_in_groups():
    images = parse_params(backbone("resnet18", size=64, test={"resize": 72})).recipes["tiny"].images
    assert (images.size, images.test.resize, images.channels) == (64, 72, "rgb")
    grey = {"channels": "grey", "value_range": 1, "mean": [0.5], "std": [0.5]}
    images = parse_params(backbone("timm/resnet18", **grey)).recipes["tiny"].images
    assert (images.size, images.channels, images.mean) == (224, "grey", [0.5])


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("resnet18", {"channels": "bgr"}, r"^tiny\.images\.value_range: missing$"),
        ("resnet18", {"size": 64}, r"^tiny\.images\.test: missing$"),
        ("convnet", {}, r"^tiny\.images\.size: missing$"),
        (
            "timm/vit_tiny_patch16",
            {},
            r"^tiny: model\.backbone: timm has no network 'vit_tiny_patch16'; near ones: timm/vit_tiny_patch16_\d+",
        ),
        ("torchvision/mobilenetv2", {}, r"near ones: torchvision/mobilenet_v2"),
        ("tim/resnet18", {}, r"^tiny: model\.backbone: expected one of .*; did you mean timm/NAME\?"),
        (3, {}, r"tiny\."),
    ],
)
def test_half_of_a_preprocessing_or_of_no_known_backbone_is_one_line(name, images, message):
    with pytest.raises(UserError, match=message) as error:
        parse_params(backbone(name, **images))
    assert "\n" not in str(error.value)


def test_a_recipe_that_names_every_number_is_read_without_the_libraries_that_compute(tmp_path):
    raw = changed("tiny.model.backbone", "timm/vit_tiny_patch16_224")
    (tmp_path / "params.yaml").write_text(json.dumps(raw))
    code = "import sys; from memvir.params import load_params; load_params(sys.argv[1]); "
    code += "sys.exit(bool({'torch', 'timm', 'torchvision', 'numpy', 'pandas', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "params.yaml")]).returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "head"}, r"^tiny\.model: pooling: convnet has no head of its own; write gap"),
        ({"weights": {"addresses": ["https://a"]}}, r"^tiny\.model: weights\.sha256 is missing"),
    ],
)
def test_settings_of_a_model_that_do_not_go_together_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        parse_params(changed("tiny.model", {**tiny.params()["tiny"]["model"], **changes}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.optimizer.name", "rmsprop", r"^tiny\.training: portable: rmsprop and half precision"),
        ("training.precision", "bf16", r"^tiny\.training: portable: rmsprop and half precision"),
        ("model.backbone", "timm/resnet18", r"^tiny\.variants\.norm_softmax\.training\.portable: only shown for conv"),
        (
            "model.widths",
            [8, 129],
            r"^tiny.*portable: only shown for the last width from 12 to 128, not 129; write false",
        ),
        (
            "model.widths",
            [8, 11],
            r"^tiny.*portable: only shown for the last width from 12 to 128, not 11",
        ),
        ("model.embedding_dim", 8, r"^tiny.*portable: only shown for embedding_dim from 12 to 128, not 8"),
        ("model.embedding_dim", 129, r"^tiny.*portable: only shown for embedding_dim from 12 to 128"),
        ("variants.norm_softmax.training", {"batch_size": 256}, r"^tiny\.variants\.norm_softmax\.training\.portable"),
        (
            "training.batch_size",
            130,
            r"^tiny.*portable: only shown for batch_size from 12 to 128, not 130",
        ),
    ],
)
def test_a_recipe_that_promises_the_same_bytes_is_refused_what_is_not_known_to_give_them(key, value, message):
    raw = changed("tiny.model", {**tiny.params()["tiny"]["model"], "widths": [4, 16], "embedding_dim": 16})
    raw["tiny"]["training"] |= {"batch_size": 16, "portable": True}
    assert parse_params(raw)
    *parents, last = key.split(".")
    functools.reduce(operator.getitem, parents, raw["tiny"])[last] = value
    with pytest.raises(UserError, match=message):
        parse_params(raw)


@pytest.mark.parametrize(
    ("device", "resources", "expected"),
    [
        ("auto", None, "auto"),
        ("auto", {"cpus": 1}, "auto"),
        ("auto", {"gpus": 0}, "cpu"),
        ("auto", {"gpus": 0.5}, "auto"),
        ("cuda", {"gpus": 0}, "cuda"),
    ],
)
def test_a_recipe_of_no_gpus_is_trained_on_the_cpu_unless_a_device_is_named(device, resources, expected):
    raw = copy.deepcopy(tiny.params())
    raw.setdefault("runtime", {})["device"] = device
    if resources:
        raw["tiny"]["resources"] = resources
    assert parse_params(raw).runtime_of("tiny").device == expected


@pytest.mark.parametrize(("processes", "gpus", "expected"), [(1, 0.5, 0.5), (4, 1, 4), (2, 3, 3), (4, 0, 0)])
def test_each_process_of_a_run_takes_a_gpu(processes, gpus, expected):
    raw = copy.deepcopy(tiny.params())
    raw["tiny"]["resources"] = {"gpus": gpus}
    raw.setdefault("runtime", {})["processes"] = processes
    assert parse_params(raw).resources_of("tiny").gpus == expected


# --- fuzz ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=6
)


def key_paths(value: Any, path: tuple = ()) -> list[tuple]:
    if not isinstance(value, dict):
        return [path]
    return [path, *(p for key, item in value.items() for p in key_paths(item, (*path, key)))]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_change_gives_a_configuration_with_that_value_or_one_line(data):
    raw = copy.deepcopy(tiny.params())
    path = data.draw(st.sampled_from(key_paths(raw)[1:]))
    value = data.draw(values)
    place = raw
    for key in path[:-1]:
        place = place[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        place[path[-1]] = value
    elif action == "remove":
        del place[path[-1]]
    else:
        place[data.draw(st.text(max_size=6))] = value
    try:
        params = parse_params(raw)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        if action == "replace" and isinstance(value, (int, float)) and len(path) > 1 and path[0] == "tiny":
            assert_holds(params.recipes["tiny"], path[1:], value)


def assert_holds(place: Any, path: tuple, value: Any) -> None:
    for key in path:
        place = place[key] if isinstance(place, dict) else getattr(place, key)
    assert place == value
