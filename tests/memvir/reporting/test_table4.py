"""Every loss on every data set: what a cell says, and whose settings it has."""

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memvir.params import load_params
from memvir.reporting import table4
from memvir.reporting.table4 import PAPERS_LINES, Column

ROOT = Path(__file__).parents[3]
PARAMS = load_params(ROOT / "params.yaml")


def columns_of(values: dict[tuple[str, str, int], float], folder: Path) -> list[Column]:
    """The table's columns when (data set, variant, seed) have such Recall@1 after the last epoch, best 1 % more."""
    for (dataset, variant, seed), value in values.items():
        path = folder / dataset / variant / f"{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = {"recall_at_1": value, "rp": 0.5, "map": 0.25}
        content: dict[str, Any] = {"last": metrics, "best": metrics | {"recall_at_1": value + 0.01}, "last_epoch": 3}
        content["settings"] = PARAMS.settings_of(dataset, variant)
        path.write_text(json.dumps(copy.deepcopy(content)))
    places = lambda dataset, variant, seed: folder / dataset / variant / f"{seed}.json"  # noqa: E731
    return table4.read_columns(PARAMS.recipes, PARAMS.variants, [1, 2], places, PARAMS.settings_of)


RESULTS = {
    ("cub200", "cosface", 1): 0.60,
    ("cub200", "cosface", 2): 0.62,
    ("cub200", "memvir_cosface", 1): 0.66,
    ("inshop", "softmax", 1): 0.8,
    ("inshop", "softmax", 2): 0.9,
}


def cells(columns: list[Column], loss: str, protocol: str = "last") -> dict[str, list[str]]:
    """data set -> what the table says of a loss there."""
    table = table4.to_table(columns, protocol, 2)
    row = next(row for row in table.rows if row[0] == loss)
    names = [column.dataset for column in columns]
    found: dict[str, list[str]] = {}
    place = ""
    for title, cell in zip(table.columns[1:], row[1:], strict=True):
        place = title if title in names else place
        found.setdefault(place, []).append(cell)
    return found


def test_means_stand_beside_the_papers_and_what_is_missing_is_marked(tmp_path):
    columns = columns_of(RESULTS, tmp_path)
    assert [column.dataset for column in columns] == ["cars196", "cub200", "sop", "inshop"], "glyphs has no result"
    assert [row[0] for row in table4.to_table(columns, "last", 2).rows] == PAPERS_LINES
    assert cells(columns, "CosFace")["cub200"] == ["61.00 ± 1.41", "–", "65.7"]
    assert cells(columns, "CosFace", "best")["cub200"] == ["62.00 ± 1.41", "–", "65.7"]
    assert cells(columns, "MemVir + CosFace")["cub200"] == ["66.00*", "+5.00*", "67.7"]
    assert cells(columns, "SoftMax") == {
        "cars196": ["missing", "–", "81.5"],
        "cub200": ["missing", "–", "64.2"],
        "sop": ["missing", "–", "76.3"],
        "inshop": ["85.00 ± 7.07", "–"],
    }


def test_every_control_has_a_line_of_its_own(tmp_path):
    names = {"memvir": 0.5, "broadface": 0.6}
    columns = columns_of(
        {("rivals", f"{name}_norm_softmax_control", seed): value for name, value in names.items() for seed in (1, 2)},
        tmp_path,
    )
    assert cells(columns, "Norm-SoftMax (control of MemVir)")["rivals"][0] == "50.00 ± 0.00"
    assert cells(columns, "Norm-SoftMax (control of BroadFace)")["rivals"][0] == "60.00 ± 0.00"


def test_every_published_figure_is_the_papers(tmp_path):
    columns = {column.dataset: column for column in columns_of({}, tmp_path)}
    published = pd.read_csv(ROOT / "memvir/reporting/published_table4_recall_at_1.csv", index_col="loss")
    assert list(columns) == ["cars196", "cub200", "sop"] and set(columns) == set(published.columns)
    for dataset, column in columns.items():
        for loss, value in published[dataset].items():
            assert column.published[loss.casefold()] == value
    assert cells(list(columns.values()), "MemVir + Norm-SoftMax")["cars196"] == ["missing", "–", "86.8"]


def test_the_notes_say_whose_settings_the_lines_have(tmp_path):
    notes = table4.to_table(columns_of(RESULTS, tmp_path), "last", 2).notes
    assert "Settings on cub200: ours, untuned." in notes
    (cars,) = [note for note in notes if "on cars196" in note]
    papers, ours = cars.split("; ")
    assert papers.endswith("the paper's for Norm-SoftMax, MemVir + Norm-SoftMax, Proxy-NCA, MemVir + Proxy-NCA")
    assert ours.startswith("ours, untuned for SoftMax, MemVir + SoftMax, CosFace")


def test_the_csv_has_a_row_for_each_data_set_loss_and_protocol(tmp_path):
    columns = columns_of(RESULTS, tmp_path)
    table = pd.read_csv(io.StringIO(table4.to_csv(columns))).set_index(["dataset", "loss", "protocol"])
    assert len(table) == 4 * 12 * 2
    row = table.loc["cub200", "MemVir + CosFace", "last"]
    assert (row["variant"], row["settings"], row["runs"]) == ("memvir_cosface", "untuned", 1)
    assert (row["mean"], row["diff"], row["published"]) == (66.0, 5.0, 67.7) and math.isnan(row["std"])
    assert table.loc["cars196", "Proxy-NCA", "best"]["settings"] == "published"
    assert np.isnan(table.loc["sop", "ArcFace", "last"]["mean"]) and table.loc["sop", "ArcFace", "last"]["runs"] == 0


@pytest.mark.parametrize(
    ("dataset", "values", "shown"),
    [
        ("cub200", RESULTS, True),
        ("inshop", RESULTS, True),
        ("inshop", {("inshop", "softmax", 1): 0.8}, False),
        ("cub200", {("cub200", "softmax", 1): 0.8}, True),
        ("glyphs", {("glyphs", "norm_softmax", 1): 0.8}, False),
    ],
)
def test_a_page_shows_it_where_there_is_something_to_stand_beside(dataset, values, shown, tmp_path):
    assert bool(table4.is_compared(columns_of(values, tmp_path), dataset)) == shown
