import contextlib
from concurrent.futures import Future

import pandas as pd
import pytest

from memvir.errors import UserError
from memvir.params import parse_params
from memvir.reporting.results import table_lines
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
    "odd": {"variants": ["norm_softmax"], "over": {"loss.margin": [0.1]}, "seeds": [1]},
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
    assert list(table) == ["variant", "memvir.num_steps", "memvir.step_gap", "seed", "epoch", "recall_at_1", "map"]
    plain = table["variant"] == "norm_softmax"
    assert table.loc[plain, "memvir.num_steps"].isna().all() and plain.sum() == 2
    assert not table[~plain].duplicated(["memvir.num_steps", "memvir.step_gap", "seed"]).any()
    assert set(table["epoch"]) == {3} and table["map"].between(0.01, 100).all()
    pd.testing.assert_frame_equal(make_study(read, "tiny", "memory", jobs=1), table)
    assert pool.count == 10  # nothing was made again
    long = make_study(read, "tiny", "long", jobs=1)
    assert long["epoch"].tolist() == [2, 4, 2, 4]


def test_a_study_that_is_not_there_or_asks_for_what_a_variant_does_not_take_is_one_line(pool):
    with pytest.raises(UserError, match=r"^tiny\.studies: has no nothing; there is memory, long, odd"):
        make_study(parse_params(content()), "tiny", "nothing", jobs=1)
    with pytest.raises(UserError, match=r"tiny\.studies\.odd\.over.*margin is not an option of norm_softmax"):
        make_study(parse_params(content()), "tiny", "odd", jobs=1)


def test_studies_that_were_made_are_drawn_the_same_every_time(tmp_path):
    grid = [(n, m, seed) for n in (1, 2) for m in (0, 1) for seed in (1, 2)]
    memory = pd.DataFrame(grid, columns=["memvir.num_steps", "memvir.step_gap", "seed"])
    memory = memory.assign(variant="memvir_norm_softmax", epoch=3, recall_at_1=50.0)
    memory["map"] = 40.0 + 2 * memory["memvir.num_steps"] + memory["seed"]
    plain = pd.DataFrame({"variant": ["norm_softmax"], "seed": [1], "epoch": [3], "recall_at_1": [1.0], "map": [30.0]})
    memory = pd.concat([plain, memory])
    (tmp_path / "memory.csv").write_text(memory.to_csv(index=False))
    long = pd.concat([plain.assign(epoch=epoch, map=10.0 * epoch) for epoch in (1, 2, 3)])
    (tmp_path / "long.csv").write_text(long.to_csv(index=False))
    recipe = parse_params(content()).recipe("tiny")
    made = read_studies(recipe, lambda name: tmp_path / f"{name}.csv")
    assert [study.name for study in made] == ["memory", "long"]
    cell = made[0].last.query("variant == 'memvir_norm_softmax' and `memvir.num_steps` == 2 and `memvir.step_gap` == 1")
    assert cell[["mean", "count"]].to_numpy().tolist() == [[45.5, 2]]
    assert "training.epochs 4" in made[1].caption and "2 seeds" in made[0].caption
    for folder in ("a", "b"):
        for study in made:
            draw_study(study, tmp_path / folder / study.name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and len(files_of(tmp_path / "a")) == 4


def test_a_study_with_one_varied_setting_is_drawn_as_curves(tmp_path):
    recipe = parse_params(content()).recipe("tiny")
    study = recipe.studies["memory"].model_copy(update={"over": {"memvir.num_steps": [1, 2]}})
    rows = [("memvir_norm_softmax", n, 1, epoch, 1.0, n * epoch) for n in (1, 2) for epoch in (1, 2)]
    table = pd.DataFrame(rows, columns=["variant", "memvir.num_steps", "seed", "epoch", "recall_at_1", "map"])
    lines = table_lines(recipe, ["norm_softmax", "memvir_norm_softmax"])
    draw_study(Made("n", study, lines, table), tmp_path / "n")
    assert (tmp_path / "n.png").stat().st_size > 5000
