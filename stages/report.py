"""The report of a data set as one page, with the tables, figures, settings, versions, and what has changed."""

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

from memvir.config import Params
from memvir.files import write_text
from memvir.reporting import page, tables
from memvir.reporting.page import Picture, Section
from stages import stage
from stages.paths import report_folder, result_file


@stage
def main(params: Params, dataset: str) -> None:
    experiment = tables.read_experiment(
        params.recipe(dataset), params.variants, params.seeds, functools.partial(result_file, dataset)
    )
    folder = report_folder(dataset)
    previous = previous_content(folder / "summary.json", experiment.content)
    write_text(folder / "index.html", page.render_page(dataset, experiment, page_sections(folder), previous))


def page_sections(folder: Path) -> list[Section]:
    names = {"recall_at_1": "Recall@1", "rp": "RP", "map": "MAP", "loss": "Training loss"}
    curves = [
        Picture(
            folder / "curves" / f"{name}.svg",
            title,
            f"{title} over epochs, a line for each loss: the mean over seeds, in a band of one standard deviation.",
        )
        for name, title in names.items()
    ]
    growth = Picture(
        folder / "curves" / "growth.svg",
        "Growth",
        "Virtual classes and embeddings in use over optimiser steps: none at first, then one set more at a time.",
        "What the loss sees beside the batch: nothing in the warm-up, then the memory's steps, set by set.",
    )
    by_step = Picture(
        folder / "tsne.png",
        "Embeddings by step",
        "t-SNE of embeddings at several epochs: points coloured by optimiser step, class weights as black diamonds.",
        "The training embeddings that one step of MemVir sees, by t-SNE under the cosine distance, coloured by "
        "the step that made them. How far apart clusters lie means little in such a picture.",
        wide=True,
    )
    neighbours = Picture(
        folder / "neighbours.png",
        "Nearest neighbours",
        "Query images, each with its nearest images by two models; a tick marks those of its class, a cross others.",
        "The queries were chosen by their average precision alone, averaged over the models shown: the best, those "
        "nearest to the median, and the worst, no class twice. Both models: first seed, last epoch.",
        wide=True,
    )
    return [
        Section("curves", "Curves", [*curves, growth]),
        Section("tsne", "Embeddings by step", [by_step]),
        Section("neighbours", "Nearest neighbours", [neighbours]),
    ]


def previous_content(path: Path, current: dict[str, Any]) -> dict[str, Any] | None:
    """The latest committed version of a summary that differs from `current`; None without any, or without git.

    It is a function of the history and of `current`, so the page that was made before a commit is the one that a
    clone of the commit makes.
    """
    try:
        for commit in _git("log", "--format=%H", "--", str(path)).split():
            try:
                content = json.loads(_git("show", f"{commit}:./{path.as_posix()}"))
            except subprocess.CalledProcessError:  # the commit deleted it
                continue
            if content != json.loads(json.dumps(current)):
                return content
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass
    return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, check=True, text=True, encoding="utf-8").stdout


if __name__ == "__main__":
    main()
