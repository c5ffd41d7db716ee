"""What settings and data tell before anything is decoded or trained."""

import copy
import itertools
import logging
import re
from typing import Any

import pandas as pd
import pytest
import torch

from memvir.errors import UserError
from memvir.experiment.preflight import check_run
from memvir.experiment.settings import Run
from memvir.experiment.training import build_run_loss
from memvir.memory import MemVir
from memvir.models import build_embedder
from memvir.params import parse_params
from tests import tiny


def index(train=(8,) * 6, test=(8,) * 6) -> pd.DataFrame:
    """The columns that matter, for classes of so many images."""
    sizes = [("train", size) for size in train] + [("test", size) for size in test]
    rows = [(split, label, f"class_{label:02d}") for label, (split, size) in enumerate(sizes) for _ in range(size)]
    return pd.DataFrame(rows, columns=["split", "class_id", "class_name"])


def run(
    variant="norm_softmax",
    model=None,
    images=None,
    memvir=None,
    snapshots=None,
    recall_at=None,
    variants=None,
    **training,
) -> Run:
    raw = copy.deepcopy(tiny.params(**training))
    recipe = raw["tiny"]
    recipe["variants"] |= variants or {}
    recipe["model"] |= model or {}
    recipe["images"] |= images or {}
    recipe["evaluation"]["recall_at"] = recall_at or [1, 2]
    recipe["variants"]["memvir_norm_softmax"]["memvir"] |= memvir or {}
    recipe["variants"]["memvir_norm_softmax"]["snapshots"] = snapshots or []
    return parse_params(raw).run("tiny", variant, 1)


PORTABLE: dict[str, Any] = {
    "portable": True,
    "batch_size": 16,
    "model": {"widths": [4, 16], "embedding_dim": 16},
}


def broadface(queue_size):
    return {"loss": {"name": "arcface"}, "broadface": {"queue_size": queue_size}}


def warnings_of(caplog, *arguments, **options) -> list[str]:
    with caplog.at_level(logging.WARNING, "memvir"):
        check_run(*arguments, **options)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("variant", ["norm_softmax", "memvir_norm_softmax"])
def test_of_a_run_in_order_nothing_is_said(caplog, variant):
    assert warnings_of(caplog, run(variant), index()) == []


ONE_PIXEL = {"widths": [4, 4, 4, 4]}  # 16 -> 1
MANY = {"channels": "rgb", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"batch_size": 50}, {}, r"^tiny\.training\.batch_size: 50 is more than the 48 training images"),
        ({}, {"train": (48,)}, r"^tiny\.data: all 48 training images are of one class, 'class_00'"),
        ({}, {"test": (48,)}, r"^tiny\.data: all 48 test images are of one class, 'class_06'"),
        ({}, {"test": (1,) * 20}, r"^tiny\.data: no test class has two images"),
        ({"recall_at": [1, 48]}, {}, r"^tiny\.evaluation\.recall_at: 48 is more than the 47 other test images"),
        (
            {"images_per_class": 9, "batch_size": 18},
            {},
            r"^tiny\.training\.images_per_class: 9 is more than the 8 images",
        ),
        (
            {"model": ONE_PIXEL},
            {"train": (8, 8, 15)},
            r"^tiny\.training\.batch_size: 10 of 31 .* a batch of 1, .*size 16",
        ),
        (
            {"model": ONE_PIXEL, "images_per_class": 1, "batch_size": 47},
            {},
            r"^tiny\.training\.batch_size: 47 of 48 training images leaves a batch of 1",
        ),
        ({"model": {"backbone": "bn_inception"}, "images": MANY}, {}, r"^tiny\.images\.size: .*multiples of 32"),
        ({"model": {"backbone": "bn_inception"}}, {}, r"^tiny\.images\.channels: bn_inception takes colour images"),
        (
            {"variant": "memvir_norm_softmax", "memvir": {"step_gap": 24}},
            {},
            r"^tiny\.variants\.memvir_norm_softmax\.memvir\.warm_up_epochs: 1 of 6 epochs leaves 25 steps, and with "
            r"step_gap 24 virtual classes are in use from step 26",
        ),
        (
            {"variant": "mine", "variants": {"mine": {"loss": {"name": "proxy_anchor"}, "virtual_softmax": {}}}},
            {},
            r"^tiny\.variants\.mine\.virtual_softmax: Virtual Softmax needs a cross-entropy loss .*not ProxyAnchor$",
        ),
        (
            {"variant": "mine", "variants": {"mine": {"loss": {"name": "softmax"}, "proxy_synthesis": {}}}},
            {},
            r"^tiny\.variants\.mine\.proxy_synthesis: Proxy Synthesis needs a loss of memvir\.losses that normalises",
        ),
    ],
)
def test_a_run_that_cannot_work_or_means_nothing_is_one_line_that_names_data_set_and_key(settings, data, message):
    with pytest.raises(UserError) as error:
        check_run(run(**settings), index(**data))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"recall_at": [1, 47]}, {}),
        ({"model": ONE_PIXEL | {"freeze_batch_norm": True}}, {"train": (8, 8, 15)}),
        ({}, {"train": (8, 8, 15)}),  # a batch of one image, but of 4 x 4 features
        ({"model": ONE_PIXEL}, {"train": (8, 8, 16)}),
        ({"batch_size": 48}, {}),
        ({"variant": "memvir_norm_softmax", "memvir": {"step_gap": 23, "num_steps": 1}}, {}),
        ({"variant": "mine", "variants": {"mine": broadface(280)}}, {}),
    ],
)
def test_what_is_just_possible_is_let_pass(caplog, settings, data):
    assert warnings_of(caplog, run(**settings), index(**data)) == []


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (
            {},
            {"test": (8, 8, 1, 1)},
            r"^warning: tiny\.data: 2 of 4 test classes have one image only, such as 'class_08'",
        ),
        (
            {"images_per_class": 2},
            {"train": (20, 1, 5, 5, 5)},
            r"^warning: tiny\.training\.images_per_class: 1 of 5 training classes have fewer than 2 images, such as "
            r"'class_01' with 1",
        ),
        (
            {"images_per_class": 2, "batch_size": 16},
            {},
            r"^warning: tiny\.training\.batch_size: 16 at 2 .* asks for 8 classes, .* are 6; .* 12 images",
        ),
        (
            {"lr_decay": {"epochs": [3, 7, 9]}},
            {},
            r"^warning: tiny\.training\.lr_decay\.epochs: \[7, 9\] lies beyond .* 6$",
        ),
        (
            {"variant": "memvir_norm_softmax", "memvir": {"num_steps": 13}},
            {},
            r"^warning: tiny\.variants\.memvir_norm_softmax\.memvir\.num_steps: of 13 past steps at most 12 ",
        ),
        (
            {"variant": "memvir_norm_softmax", "memvir": {"step_gap": 5}, "snapshots": [1, 2]},
            {},
            r"^warning: tiny\.variants\.memvir_norm_softmax\.snapshots: all before epoch 3",
        ),
        (
            {"variant": "mine", "variants": {"mine": broadface(281)}},
            {},
            r"^warning: tiny\.variants\.mine\.broadface\.queue_size: of 281 past embeddings at most 280 will be in use",
        ),
    ],
)
def test_what_is_hardly_meant_is_a_warning_of_one_line(caplog, settings, data, message):
    (text,) = warnings_of(caplog, run(**settings), index(**data))
    assert re.search(message, text) and "\n" not in text, text


def test_a_batch_with_less_than_an_image_for_each_process_is_an_error():
    check_run(run(), index(), processes=8)
    with pytest.raises(
        UserError, match=r"^tiny\.training\.batch_size: 10 of 48 .* a batch of 8, too few for 9 processes"
    ):
        check_run(run(), index(), processes=9)


@pytest.mark.parametrize(("warm_up", "step_gap", "num_steps"), [(1, 0, 3), (2, 7, 2), (4, 3, 5), (5, 3, 1), (0, 28, 2)])
def test_the_memory_in_use_is_foretold_as_it_comes(caplog, warm_up, step_gap, num_steps):
    """Against the memory itself, stepped through the epochs."""
    memvir = {"warm_up_epochs": warm_up, "step_gap": step_gap, "num_steps": num_steps}
    chosen = run("memvir_norm_softmax", memvir=memvir)
    loss = build_run_loss(chosen, num_classes=6)
    assert isinstance(loss, MemVir)
    in_use = []
    for epoch in range(1, 7):
        loss.enabled = epoch > warm_up
        for _ in range(5):
            loss(torch.randn(2, 8), torch.tensor([0, 1]))
            in_use.append(loss.num_virtual_classes // 6)
    warned = warnings_of(caplog, chosen, index())
    assert [f"at most {max(in_use)} will" in text for text in warned] == [True] * (max(in_use) < num_steps)
    first = 1 + next(step for step, used in enumerate(in_use) if used) // 5
    for epoch in (first - 1, first):
        if epoch:
            caplog.clear()
            chosen = run("memvir_norm_softmax", memvir=memvir, snapshots=[epoch])
            warned = [text for text in warnings_of(caplog, chosen, index()) if "snapshots" in text]
            assert len(warned) == (epoch < first)


def test_batch_norm_is_asked_and_not_guessed():
    """What is refused is what torch refuses, and nothing else."""
    refused = 0
    for depth, size, classes in itertools.product((1, 2, 5), (1, 2, 4, 5, 32, 33), ((7, 7, 7), (7, 7, 8))):
        chosen = run(model={"widths": [4] * depth}, images={"size": size, "test": {"resize": size}})
        last_batch = torch.zeros(sum(classes) % 10, 1, size, size)
        try:
            build_embedder(chosen.model, 1, None)(last_batch)
        except ValueError:
            refused += 1
            with pytest.raises(UserError, match="BatchNorm"):
                check_run(chosen, index(train=classes))
        else:
            check_run(chosen, index(train=classes))
    assert 0 < refused < 18


def test_a_processor_that_cannot_keep_the_promise_of_the_same_bytes_is_told_so_at_the_start(caplog, monkeypatch):
    assert warnings_of(caplog, run(**PORTABLE), index()) == []
    monkeypatch.setattr("memvir.experiment.preflight.has_avx2", lambda: False)
    (warning,) = warnings_of(caplog, run(**PORTABLE), index())
    assert "tiny.training.portable: this is no x86-64 processor with AVX2" in warning


def test_the_same_bytes_are_not_promised_of_batches_of_few_images():
    with pytest.raises(UserError, match=r"^tiny\.training\.portable: batch_size 16 of 49 .* leaves a batch of 1"):
        check_run(run(**PORTABLE), index(train=(8,) * 5 + (9,)))
    with pytest.raises(UserError, match=r"^tiny\.training\.portable: batch_size 16 of 48 training .* a batch of 16"):
        check_run(run(**PORTABLE), index(), processes=5)


def apart(queries=(3, 3), gallery=(2, 2)) -> pd.DataFrame:
    """Training images of six classes, and of further ones so many queries and images in a gallery."""
    table = index(test=())
    rows = [
        (split, 6 + label, f"class_{6 + label:02d}")
        for split, sizes in (("query", queries), ("gallery", gallery))
        for label, size in enumerate(sizes)
        for _ in range(size)
    ]
    return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


def test_queries_are_looked_for_in_the_gallery_alone(caplog):
    assert warnings_of(caplog, run(recall_at=[1, 4]), apart(queries=(1, 1))) == []
    (told,) = warnings_of(caplog, run(), apart(queries=(3, 3, 2), gallery=(2, 2)))
    assert "1 of 3 query classes are not in the gallery, such as 'class_08'" in told
    with pytest.raises(UserError, match="recall_at: 5 is more than the 4 gallery images"):
        check_run(run(recall_at=[1, 5]), apart())
    with pytest.raises(UserError, match="no class of the queries is in the gallery"):
        check_run(run(), apart(queries=(3, 3, 0, 0), gallery=(0, 0, 2, 2)))
