import contextlib
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from memvir.errors import UserError
from memvir.experiment.lock import locked
from memvir.params import parse_params
from memvir.reporting.studies import Made, draw_study, read_studies
from memvir.tuning.studies import make_study
from tests.memvir.reporting.test_figures import files_of
from tests.memvir.tuning.test_search import params
from tests.stages.workspace import Workspace

STUDIES = {
    "memory": {
        "variants": ["norm_softmax", "memvir_norm_softmax"],
        "over": {"memvir.num_steps": [1, 2], "memvir.step_gap": [0, 1]},
        "seeds": [1, 2],
    },
    "long": {
        "variants": ["norm_softmax", "memvir_norm_softmax"],
        "over": {"training.epochs": [4]},
        "seeds": [1],
        "check_epoch": 2,
    },
}


def content() -> dict:
    content = params()
    content["tiny"]["studies"] = STUDIES
    return content


class Inline:
    """Stands in for processes: what is submitted is done at once."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, function, *arguments):
        self.count += 1
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def pool(tmp_path, monkeypatch):
    made = Workspace(tmp_path / "project")
    made.write_params(content())
    made.prepared()
    monkeypatch.chdir(made.folder)
    pool = Inline()
    monkeypatch.setattr("memvir.tuning.studies.processes", lambda *_: contextlib.nullcontext(pool))
    return pool


def test_a_study_has_every_combination_and_goes_on_where_it_was_stopped(pool):
    read = parse_params(content())
    table = make_study(read, "tiny", "memory", jobs=1)
    assert pool.count == 2 + 4 * 2  # the plain loss has no memory to vary
    metrics = ["recall_at_1", "map", "train_recall_at_1", "train_map"]
    assert list(table) == ["variant", "memvir.num_steps", "memvir.step_gap", "seed", "epoch", *metrics]
    assert table["train_map"].between(0.01, 100).all() and (table["train_map"] != table["map"]).all()
    plain = table["variant"] == "norm_softmax"
    assert table.loc[plain, "memvir.num_steps"].isna().all() and plain.sum() == 2
    assert not table[~plain].duplicated(["memvir.num_steps", "memvir.step_gap", "seed"]).any()
    assert set(table["epoch"]) == {3} and table["map"].between(0.01, 100).all()
    pd.testing.assert_frame_equal(make_study(read, "tiny", "memory", jobs=1), table)
    assert pool.count == 10  # nothing was made again
    long = make_study(read, "tiny", "long", jobs=1)
    assert long["epoch"].tolist() == [2, 4, 2, 4]


def test_a_study_that_another_process_is_at_is_refused_by_one_line(pool):
    lock = Path("scratch/studies/tiny/long.lock")
    with locked(lock, "busy"), pytest.raises(UserError, match=rf"^{lock}: another process is making this study; wait"):
        make_study(parse_params(content()), "tiny", "long", jobs=1)


def test_a_study_that_is_not_there_or_asks_for_what_a_variant_does_not_take_is_one_line(pool):
    with pytest.raises(UserError, match=r"^tiny\.studies: has no nothing; there is memory, long"):
        make_study(parse_params(content()), "tiny", "nothing", jobs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": {"loss.margin": [0.1]}}, r"over.*margin is not an option of norm_softmax"),
        (
            {"over": {"memvirr.num_steps": [1]}},
            r"over: memvirr\.num_steps is no key of a variant .*did you mean memvir",
        ),
        (
            {"over": {"proxy_synthesis.mu": [1.0]}},
            r"over: none of norm_softmax, memvir_norm_softmax has proxy_synthesis",
        ),
        ({"over": {"training.optimizer.lrr": [0.1]}}, r"over.*training\.optimizer\.lrr: unknown key"),
        ({"over": {"training.epoch.s": [1]}}, r"over: training\.epoch\.s is no key of a variant"),
        ({"over": {"training.epochs": [4, -1]}}, r"over.*training\.epochs"),
        (
            {"over": {"loss.scale": [1.0, 2.0], "memvir.num_steps": [1, 2], "memvir.step_gap": [0, 1]}},
            r"over: a figure shows two settings; give one value for all but two of loss\.scale, memvir",
        ),
        ({"over": {"training.check_epoch": [1, 2]}}, r"over: training\.check_epoch is the study's own check_epoch"),
        ({"over": {"memvir.warm_up_epochs": [1, 99]}}, r"over\.memvir\.warm_up_epochs: 99 leaves no epoch for MemVir"),
        (
            {"over": {"loss.scale": [1.0, 2.0], "memvir.num_steps": [1, 2]}, "variants": ["norm_softmax"]},
            r"over: none of norm_softmax has memvir",
        ),
        ({"seeds": [1, 1]}, r"seeds: an entry is listed twice"),
        ({"over": {"training.lr_decay.epochs": [[1], [2], [1]]}}, r"over.*lr_decay.epochs.*: an entry is listed twice"),
        ({"variants": ["nothing"]}, r"'nothing' is not a variant of tiny"),
    ],
)
def test_a_study_that_makes_no_sense_is_one_line_before_anything_runs(changes, message):
    wrong = content()
    wrong["tiny"]["studies"] = {"odd": {**STUDIES["memory"], **changes}}
    with pytest.raises(UserError, match=message):
        parse_params(wrong)


def test_studies_that_were_made_are_drawn_the_same_every_time(tmp_path):
    grid = [(n, m, seed) for n in (1, 2) for m in (0, 1) for seed in (1, 2)]
    memory = pd.DataFrame(grid, columns=["memvir.num_steps", "memvir.step_gap", "seed"])
    memory = memory.assign(variant="memvir_norm_softmax", epoch=3, recall_at_1=50.0)
    memory["map"] = 40.0 + 2 * memory["memvir.num_steps"] + memory["seed"]
    plain = pd.DataFrame(
        {
            "variant": ["norm_softmax"],
            "seed": [1],
            "epoch": [3],
            "recall_at_1": [1.0],
            "map": [30.0],
            "train_map": [60.0],
        }
    )
    memory = pd.concat([plain, memory.astype({"memvir.num_steps": object, "memvir.step_gap": object})])
    (tmp_path / "memory.csv").write_text(memory.to_csv(index=False))
    long = pd.concat([plain.assign(epoch=epoch, map=10.0 * epoch, **{"training.epochs": 4}) for epoch in (1, 2, 3)])
    (tmp_path / "long.csv").write_text(long.to_csv(index=False))
    recipe = parse_params(content()).recipe("tiny")
    made = read_studies(recipe, lambda name: tmp_path / f"{name}.csv")
    assert [study.name for study in made] == ["memory", "long"]
    cell = made[0].last.query(
        "variant == 'memvir_norm_softmax' and `memvir.num_steps` == '2' and `memvir.step_gap` == '1'"
    )
    assert cell[["mean", "count"]].to_numpy().tolist() == [[45.5, 2]]
    assert "training.epochs 4" in made[1].caption and "2 seeds" in made[0].caption
    for folder in ("a", "b"):
        for study in made:
            draw_study(study, tmp_path / folder / study.name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and len(files_of(tmp_path / "a")) == 4


def older(folder: Path, over: dict) -> Made:
    """A study over num_steps 1 and 2, of two seeds and 3 epochs, that is declared otherwise by now."""
    grid = [("memvir_norm_softmax", steps, seed, 3, 40.0 + steps + seed) for steps in (1, 2) for seed in (1, 2)]
    table = pd.DataFrame(grid, columns=["variant", "memvir.num_steps", "seed", "epoch", "map"])
    table.to_csv(folder / "old.csv", index=False)
    later = content()
    study = {"variants": ["memvir_norm_softmax"], "over": over, "seeds": [1, 2, 3]}
    later["tiny"]["studies"] = {"old": study}
    (made,) = read_studies(parse_params(later).recipe("tiny"), lambda name: folder / f"{name}.csv")
    return made


@pytest.mark.parametrize(
    ("over", "changed", "values"),
    [
        ({"memvir.num_steps": [1, 2]}, ["seeds"], ["1", "2"]),
        ({"memvir.num_steps": [1, 2, 4]}, ["seeds", "over.memvir.num_steps"], ["1", "2", "4"]),
        ({"memvir.num_steps": [2, 4, 8]}, ["seeds", "over.memvir.num_steps"], ["1", "2"]),
        ({"loss.scale": [5.0, 9.0]}, ["seeds", "over.loss.scale", "over.memvir.num_steps"], ["1", "2"]),
        (
            {"memvir.num_steps": [1, 2], "training.epochs": [400]},
            ["seeds", "over.training.epochs"],
            ["1", "2"],
        ),
    ],
)
def test_a_study_that_was_made_under_other_settings_is_drawn_as_it_was_made_and_says_so(
    over, changed, values, tmp_path
):
    made = older(tmp_path, over)
    assert made.changed == changed and made.axes == ["memvir.num_steps"]
    assert made.values("memvir.num_steps") == values
    assert "mean of 2 seeds" in made.caption and "400" not in made.caption
    assert f"Not as params.yaml has it now: {', '.join(changed)}; " in made.caption
    draw_study(made, tmp_path / "old")


def test_a_study_with_a_variant_that_is_gone_is_one_line(tmp_path):
    older(tmp_path, {"memvir.num_steps": [1, 2]})
    table = pd.read_csv(tmp_path / "old.csv").assign(variant="gone")
    table.to_csv(tmp_path / "memory.csv", index=False)
    with pytest.raises(UserError, match=r"memory\.csv: made with gone, which the recipe does not have; remove it or"):
        read_studies(parse_params(content()).recipe("tiny"), lambda name: tmp_path / f"{name}.csv")


@pytest.mark.parametrize(
    ("over", "shown"),
    [
        ({"training.epochs": [4]}, ["MAP on validation classes (%)", "MAP on the classes that train (%)"]),
        ({"training.epochs": [2, 4]}, ["2", "4"]),
        ({"memvir.num_steps": [10, 2]}, ["10", "2"]),
        ({"loss.initialisation": ["uniform_d", None]}, ["uniform_d", "None"]),
        ({"training.lr_decay.epochs": [[], [2], [2, 3]], "memvir.step_gap": [1, 0]}, ["[]", "[2]", "[2, 3]", "1", "0"]),
    ],
)
def test_a_study_of_words_and_lists_is_drawn_in_the_declared_order(over, shown, pool, monkeypatch):
    varied = content()
    varied["tiny"]["studies"] = {"any": {**STUDIES["memory"], "over": over, "seeds": [1]}}
    read = parse_params(varied)
    make_study(read, "tiny", "any", jobs=1).to_csv("any.csv", index=False)
    figures: list[Figure] = []
    monkeypatch.setattr("memvir.reporting.studies.save_figure", lambda figure, stem: figures.append(figure))
    (made,) = read_studies(read.recipe("tiny"), lambda name: Path(f"{name}.csv"))
    draw_study(made, Path("any"))
    axes = figures[0].axes[0]
    ticks = [label.get_text() for axis in (axes.yaxis, axes.xaxis) for label in axis.get_ticklabels()]
    texts = ticks if made.axes else [panel.get_ylabel() for panel in figures[0].axes]
    assert [text for text in texts if text in shown] == shown
    combinations = len(made.values(made.axes[0])) if made.axes else 1
    assert len(made.last.query("variant == 'memvir_norm_softmax'")) >= combinations
