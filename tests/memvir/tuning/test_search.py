import contextlib
import functools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memvir.errors import UserError
from memvir.experiment.lock import locked
from memvir.experiment.paths import run_files, trials_file
from memvir.params import Params, load_params, parse_params
from memvir.tuning.search import Space, open_study, search
from memvir.tuning.training import validation_map
from memvir.tuning.validation import validation_index
from tests import tiny
from tests.stages.workspace import Workspace

ROOT = Path(__file__).parents[3]
TUNING = {
    "trials": 3,
    "finalists": 2,
    "seeds": [101, 102],
    "validation_share": 0.34,
    "space": {
        "loss.scale": {"low": 5.0, "high": 30.0},
        "training.optimizer.lr": {"low": 0.001, "high": 0.01},
        "training.lr_decay.epochs": {"choices": [[1], [2]]},
        "memvir.num_steps": {"choices": [1, 2]},
    },
}


def params(**changes) -> dict:
    content = tiny.params(epochs=3)
    content["tiny"]["tuning"] = {**TUNING, **changes}
    content["runtime"] = {**content.get("runtime", {}), "progress": "none"}
    return content


@pytest.fixture(scope="module")
def without_test_images(tmp_path_factory):
    """A prepared data set whose test images are gone."""
    made = Workspace(tmp_path_factory.mktemp("tuning"))
    made.write_params(params())
    made.prepared()
    shutil.rmtree(made.folder / "dataset" / "tiny" / "images" / "test")
    shutil.rmtree(made.folder / "dataset" / "tiny" / "source" / "test")
    return made.folder


def read(content: dict) -> Params:
    return parse_params(content)


def test_a_search_reads_no_test_image_and_gives_the_same_trials_however_it_is_run(without_test_images, monkeypatch):
    monkeypatch.chdir(without_test_images)
    table = search(read(params()), "tiny", "memvir_norm_softmax", jobs=2)
    assert len(table) == 5 and table["trial"].nunique() == 3  # three trials, two of them under a second seed
    assert table["map"].between(0.01, 100).all()
    finalists = table[table["trial"].duplicated(keep=False)].groupby("trial")["map"]
    others = table[~table["trial"].duplicated(keep=False)]["map"]
    assert finalists.first().min() >= others.max()
    assert set(table.loc[table["chosen"], "trial"]) == {finalists.mean().idxmax()}

    shutil.rmtree("scratch/tuning")
    for stop_after in (2, 99):
        monkeypatch.setattr("memvir.tuning.search.side_by_side", functools.partial(backwards, stop_after))
        with pytest.raises(KeyboardInterrupt) if stop_after == 2 else contextlib.nullcontext():
            again = search(read(params()), "tiny", "memvir_norm_softmax", jobs=1)
    pd.testing.assert_frame_equal(again, table)


def backwards(stop_after, pool, runs, runtime, files, index):
    """Stands in for `side_by_side`, in this process: the last trial first, and stopped after some."""
    for done, number in enumerate(reversed(runs)):
        if done == stop_after:
            raise KeyboardInterrupt
        yield number, validation_map(runs[number], runtime, files, index)


def made_up(pool, runs, runtime, files, index):
    """Stands in for `side_by_side`: what a trial reaches follows from its settings."""
    for number, run in runs.items():
        yield number, (run.loss.scale * 7.3 + run.training.optimizer.lr * 911 + run.seed * 0.37) % 1


def searched(**changes) -> pd.DataFrame:
    return search(read(params(**changes)), "tiny", "memvir_norm_softmax", jobs=1)


@pytest.fixture
def journal(without_test_images, monkeypatch):
    """That of a search which has been made, without any training."""
    monkeypatch.chdir(without_test_images)
    monkeypatch.setattr("memvir.tuning.search.side_by_side", made_up)
    shutil.rmtree("scratch/tuning", ignore_errors=True)
    searched()
    (path,) = Path("scratch/tuning/tiny/memvir_norm_softmax").iterdir()
    return path


def test_a_journal_that_is_cut_short_anywhere_goes_on_to_the_same_trials(journal):
    table, content = searched(), journal.read_bytes()
    for cut in range(0, len(content), 331):
        journal.write_bytes(content[:cut])
        pd.testing.assert_frame_equal(searched(), table)
    journal.write_bytes(content[:500] + b"{" + content[500:])
    with pytest.raises(UserError, match=rf"^{journal}: damaged; remove it"):
        searched()


def test_trials_that_an_older_version_wrote_key_by_key_are_known_but_for_one_that_it_did_not_finish(journal):
    journal.unlink()
    parsed = read(params())
    space = Space(parsed.recipe("tiny").tuning, parsed.run("tiny", "memvir_norm_softmax", 101))
    study = open_study(journal)
    study.ask({"loss.scale": space.distributions["loss.scale"]})
    for draw in (1, 0, 1):
        study.enqueue_trial(space.trial(draw, 101).params)
        study.ask(space.distributions)
    study.tell(1, 0.999)
    draws = searched().query("seed == 101")
    assert draws["trial"].tolist() == [0, 1, 2] and draws["map"].max() == draws["map"].iloc[1] == 99.9


def test_another_order_of_the_space_is_another_search(journal):
    turned = dict(reversed(TUNING["space"].items()))
    table = searched(space=turned)
    shutil.rmtree("scratch/tuning")
    pd.testing.assert_frame_equal(searched(space=turned), table)


def test_a_search_that_another_process_is_at_is_refused_by_one_line(journal):
    lock = Path("scratch/tuning/tiny/memvir_norm_softmax.lock")
    with locked(lock, "busy"), pytest.raises(UserError, match=rf"^{lock}: another process is at this search; wait"):
        searched()


def test_what_is_drawn_is_what_the_committed_searches_have_drawn():
    params = load_params(ROOT / "params.yaml")
    for path in ROOT.glob("tuning/*/*.csv"):
        space = Space(params.recipe(path.parent.name).tuning, params.run(path.parent.name, path.stem, 101))
        for row in pd.read_csv(path).to_dict("records"):
            drawn = space.settings(space.trial(row["trial"], row["seed"]).params)
            assert {key: str(row[key]) for key in drawn} == {key: str(value) for key, value in drawn.items()}


def test_validation_classes_are_training_classes_drawn_by_the_seed_and_test_rows_are_gone():
    index = pd.DataFrame(
        {
            "split": ["train"] * 40 + ["test"] * 20,
            "class_id": np.repeat(np.arange(30), 2),
            "file": [f"{number}" for number in range(60)],
        }
    )
    validation = validation_index(index, 0.3, seed=1)
    assert set(validation["file"]) == set(index.loc[index["split"] == "train", "file"])
    sides = validation.groupby("split")["class_id"].agg(set)
    assert len(sides["test"]) == 6 and len(sides["train"]) == 14 and not sides["test"] & sides["train"]
    assert validation_index(index, 0.3, seed=2)["split"].tolist() != validation["split"].tolist()
    pd.testing.assert_frame_equal(validation_index(index, 0.3, seed=1), validation)


def test_a_share_that_leaves_a_side_too_few_classes_is_refused():
    index = pd.DataFrame({"split": ["train"] * 4, "class_id": [0, 1, 2, 3]})
    with pytest.raises(UserError, match=r"tuning\.validation_share: 0\.1 of 4 training classes"):
        validation_index(index, 0.1, seed=0)


def test_writing_the_choice_into_params_starts_no_new_search(without_test_images, monkeypatch):
    monkeypatch.chdir(without_test_images)
    content = params()

    def identity() -> str:
        parsed = read(content)
        run = parsed.run("tiny", "norm_softmax", 101)
        return Space(parsed.recipe("tiny").tuning, run).identity(run_files(run, parsed.runtime))

    before = identity()
    content["tiny"]["variants"]["norm_softmax"]["loss"]["scale"] = 7.5
    content["tiny"]["training"]["optimizer"]["lr"] = 0.004
    assert identity() == before
    content["tiny"]["tuning"] = {**content["tiny"]["tuning"], "trials": 10}  # more of them go on from those made
    assert identity() == before
    content["tiny"]["training"]["epochs"] = 4
    assert identity() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"scale": {"low": 1.0, "high": 2.0}}}, "tiny.tuning.space: scale is no key of a variant"),
        ({"space": {"loss.scale": {"low": 2.0, "high": 1.0}}}, "low must be below high"),
        ({"trials": 0}, "tiny.tuning.trials"),
        ({"seeds": [101, 102, 101]}, "tiny.tuning.seeds: an entry is listed twice"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_by_its_key(changes, message):
    with pytest.raises(UserError, match=message):
        read(params(**changes))


def test_a_setting_that_the_variant_does_not_have_is_named(without_test_images, monkeypatch):
    monkeypatch.chdir(without_test_images)
    content = params(space={"loss.margin": {"low": 0.1, "high": 0.5}})
    with pytest.raises(UserError, match=r"tiny\.tuning\.space\.loss.*margin is not an option of norm_softmax"):
        search(read(content), "tiny", "norm_softmax", jobs=1)
    del content["tiny"]["tuning"]
    with pytest.raises(UserError, match=r"tiny\.tuning: missing"):
        search(read(content), "tiny", "norm_softmax", jobs=1)


def test_a_control_has_the_loss_and_the_training_of_its_memvir_line_and_nothing_of_its_own():
    content = params()
    variants = content["tiny"]["variants"]
    variants["memvir_norm_softmax"]["training"] = {"epochs": 4}
    variants["control"] = {"control_of": "memvir_norm_softmax"}
    run = read(content).run("tiny", "control", 1)
    assert run.training.epochs == 4 and run.memvir is None and run.loss.scale == 23.0
    variants["control"]["loss"] = {"name": "Proxy-NCA"}
    with pytest.raises(UserError, match=r"control\.loss: a control has nothing of its own"):
        read(content)
    variants["control"] = {"control_of": "norm_softmax"}
    with pytest.raises(UserError, match=r"control\.control_of: norm_softmax is no variant with memvir"):
        read(content)


def test_settings_that_are_called_tuned_are_the_choice_of_a_committed_search():
    params = load_params(ROOT / "params.yaml")
    tuned = [
        (dataset, name)
        for dataset, recipe in params.recipes.items()
        for name, variant in recipe.variants.items()
        if variant.origin == "tuned" and variant.control_of is None
    ]
    assert tuned
    for dataset, name in tuned:
        tuning, run = params.recipe(dataset).tuning, params.run(dataset, name, 1)
        trials = pd.read_csv(ROOT / trials_file(dataset, name))
        assert len(trials) == tuning.runs and trials["trial"].nunique() == tuning.trials
        means = trials.groupby("trial")["map"].mean()[trials.groupby("trial").size() == len(tuning.seeds)]
        assert len(means) == tuning.finalists
        assert set(trials.loc[trials["chosen"], "trial"]) == {means.idxmax()}
        chosen = trials[trials["chosen"]].iloc[0]
        for key in set(tuning.space) & set(trials.columns):
            value = functools.reduce(getattr, key.split("."), run)
            assert str(value) == str(chosen[key]), f"{dataset}.variants.{name}.{key}"
