"""params.yaml becomes a valid configuration, or one line that names the key."""

import copy
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memvir.config import Model, load_params, parse_params
from memvir.errors import UserError
from tests import tiny

PARAMS = Path(__file__).parents[2] / "params.yaml"


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
    # METHOD.md, section 3
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
            r"^tiny\.data\.source: expected one of glyphs, cars196, folder, found 'nowhere'",
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
        ("tiny.variants.memvir_norm_softmax.snapshots", [7], r"snapshots: epoch 7 is beyond"),
        (
            "tiny.variants.norm_softmax.loss.name",
            "tripplet",
            r"loss\.name: unknown loss 'tripplet'; there are: Norm-Soft",
        ),
        ("tiny.variants.norm_softmax.loss.margin", 0.1, r"norm_softmax\.loss: margin is not an option of norm_softmax"),
        ("tiny.variants.norm_softmax.training", {"epochs": "x"}, r"^tiny\.variants\.norm_softmax\.training\.epochs: "),
        ("datasets", ["cars"], r"'cars' is not a recipe for data set; there are: tiny"),
        ("variants", ["norm_softmix"], r"'norm_softmix' is not a variant of tiny; there are: norm_softmax, memvir_"),
        ("seeds", [1, 1], r"^seeds: .*twice"),
        ("seeds", [], r"^seeds: "),
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
    path.write_text(PARAMS.read_text().replace("lr: 0.006", "lr: 6e-3"))
    assert load_params(path).recipes["glyphs"].training.optimizer.lr == 0.006


def test_the_backbones_of_the_configuration_are_those_of_the_registry():
    from memvir.models import BACKBONES

    assert set(get_args(Model.model_fields["backbone"].annotation)) == set(BACKBONES)


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
