"""The recipes of the four benchmarks, compared with what is published (published_recipes.csv; docs/METHOD.md)."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memvir.losses import DISPLAY_NAMES
from memvir.params import Params, load_params
from memvir.reporting.tables import published_means

ROOT = Path(__file__).parents[3]
FACTS = pd.read_csv(Path(__file__).with_name("published_recipes.csv"), dtype=str)
BENCHMARKS = {"cars196": 8054, "cub200": 5864, "sop": 59551, "inshop": 25882}
"""Training images."""
PAPERS_LINES = {"norm_softmax", "memvir_norm_softmax", "proxy_nca", "memvir_proxy_nca"}


@functools.cache
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@functools.cache
def settings(dataset: str, variant: str) -> dict[str, Any]:
    return params().run(dataset, variant, 1).model_dump(mode="json")


def value(text: str) -> Any:
    number, _, unit = text.partition(" ")
    return pytest.approx(math.radians(float(number)), abs=5e-4) if unit == "degrees" else json.loads(text)


@pytest.mark.parametrize("fact", FACTS.itertuples(), ids=lambda fact: f"{fact.dataset}-{fact.variant}-{fact.key}")
def test_a_published_number_stands_in_the_recipes(fact):
    lines = list(DISPLAY_NAMES) if fact.variant == "*" else [fact.variant]
    for dataset in BENCHMARKS if fact.dataset == "*" else [fact.dataset]:
        for variant in lines:
            found = functools.reduce(dict.__getitem__, fact.key.split("."), settings(dataset, variant))
            assert found == value(fact.value), f"{dataset}.{variant}"


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_each_benchmark_has_the_papers_twelve_lines_and_says_whose_numbers_they_have(dataset):
    recipe = params().recipe(dataset)
    for loss in DISPLAY_NAMES:
        plain, memvir = recipe.variants[loss], recipe.variants[f"memvir_{loss}"]
        assert plain.loss == memvir.loss and plain.loss.name == loss
        assert plain.memvir is None and memvir.memvir is not None and recipe.baseline_of(f"memvir_{loss}") == loss
        for name, variant in ((loss, plain), (f"memvir_{loss}", memvir)):
            published = dataset == "cars196" and name in PAPERS_LINES
            assert variant.origin == ("published" if published else "untuned"), name
            assert dataset == "inshop" or ("recall_at_1", variant.display_name.casefold()) in published_means(dataset)


@pytest.mark.parametrize(("dataset", "epochs"), {"cars196": 8, "cub200": 8, "sop": 0.24, "inshop": 2}.items())
def test_a_full_memory_reaches_as_many_epochs_back_as_params_says(dataset, epochs):
    steps = math.ceil(BENCHMARKS[dataset] / 128)
    for loss in DISPLAY_NAMES:
        memory = params().recipe(dataset).variants[f"memvir_{loss}"].memvir
        assert memory.num_steps * (memory.step_gap + 1) / steps == pytest.approx(epochs, rel=0.05)
