"""The pages of a search tell what its table tells, whatever params.yaml has become."""

import pandas as pd
import pytest

from memvir.params import parse_params
from memvir.reporting.results import Line, check_runs, table_lines
from memvir.reporting.trials import describe, draw_trials, read_trials
from tests.memvir.tuning.test_search import TUNING, params

VARIANTS = ["norm_softmax", "memvir_norm_softmax"]


@pytest.fixture
def file(tmp_path):
    """Of tables such as TUNING makes."""
    runs = pd.DataFrame({"trial": [0, 0, 1, 1, 2], "seed": [101, 102, 101, 102, 101], "map": 50.0, "chosen": False})
    drawn = {"loss.scale": 7.5, "training.optimizer.lr": 0.001, "training.lr_decay.epochs": "[1]"}
    table = runs.assign(**drawn)
    table.loc[table["trial"] == 1, "chosen"] = True
    for variant in VARIANTS:
        extra = {"memvir.num_steps": 2} if variant.startswith("memvir") else {}
        table.assign(**extra).to_csv(tmp_path / f"{variant}.csv", index=False)
    return lambda variant: tmp_path / f"{variant}.csv"


def described(file, **changes):
    recipe = parse_params(params(**changes)).recipe("tiny")
    lines = table_lines(recipe, VARIANTS)
    draw_trials(recipe.tuning, read_trials({name: file(name) for name in VARIANTS}), lines, file("figure"))
    return describe(recipe, lines, file)


def test_the_sizes_of_a_search_are_those_of_its_table_and_what_has_changed_since_is_said(file):
    text = described(file).text
    assert "For each line alike, 3 settings" in text and "best 2 were trained again under seeds 102," in text
    assert "changed" not in text
    later = described(file, trials=100, finalists=5, seeds=[1, 2, 3]).text
    assert later.startswith(text.removesuffix("search of its own."))
    assert "params.yaml has changed since: tuning.trials, finalists or seeds; " in later


def test_the_best_trial_is_that_of_the_seed_under_which_all_were_made(file):
    table = pd.read_csv(file("norm_softmax"))
    table.loc[(table["trial"] == 2), "map"] = 60.0
    table.loc[(table["trial"] == 1) & (table["seed"] == 102), "map"] = 70.0
    table.to_csv(file("norm_softmax"), index=False)
    assert {row[0]: row[1:] for row in described(file).tables[0].rows}["best of all trials, one seed"] == [
        "60.00",
        "50.00",
    ]


@pytest.mark.parametrize(
    "space",
    [
        {"memvir.num_steps": {"choices": [3, 4]}},
        {"memvir.num_steps": {"low": 3.0, "high": 4.0}},
        {"loss.scale": {"low": 10.0, "high": 30.0}},
        {"loss.scale": {"choices": [1.0, 2.0]}},
        {"training.lr_decay.epochs": {"choices": [[2], [3]]}},
    ],
)
def test_a_space_that_has_changed_is_named_and_the_trials_are_drawn_all_the_same(file, space):
    (key,) = space
    search = described(file, space={**TUNING["space"], **space})
    assert f"params.yaml has changed since: tuning.space.{key}; " in search.text
    assert dict(search.tables[1].rows)[key] == "others than in params.yaml now"
    without = {name: what for name, what in TUNING["space"].items() if name != key}
    assert f"params.yaml has changed since: tuning.space.{key}; " in described(file, space=without).text


def test_a_key_that_has_come_to_the_space_is_named(file):
    space = {**TUNING["space"], "training.optimizer.eps": {"low": 1e-8, "high": 1e-4}}
    assert "changed since: tuning.space.training.optimizer.eps; " in described(file, space=space).text


def test_lines_of_searches_of_different_sizes_are_not_called_alike(file):
    table = pd.read_csv(file("norm_softmax"))
    table[table["trial"] == 1].to_csv(file("norm_softmax"), index=False)
    text = described(file).text
    assert "not searched alike" in text and "3 under seed 101, 2 also under seed 102). They were drawn" in text
    lines = [Line(name, name, name, None, origin="tuned") for name in "ab"]
    check = check_runs({("a", 1): {}}, lines, [1], searches={"a": {101: 30, 102: 3}, "b": {101: 3}})[1]
    assert not check.passed and "a: 30 under seed 101, 3 also under seed 102; b: 3 under seed 101" in check.text
