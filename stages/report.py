"""The report of a data set as one page, with the tables, figures, settings, versions, and what has changed."""

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memvir.experiment.paths import report_folder, result_file, study_file, trials_file
from memvir.files import write_text
from memvir.params import Params
from memvir.reporting import page, studies, table4, trials
from memvir.reporting.page import Picture, Section
from memvir.reporting.studies import Made
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    experiment = params.experiment(dataset)
    folder = report_folder(dataset)
    previous = previous_content(folder / "summary.json", experiment.content)
    search = trials.describe(params.recipe(dataset), experiment.lines, functools.partial(trials_file, dataset))
    columns = table4.read_columns(params.recipes, params.variants, params.seeds, result_file, params.settings_of)
    shown = table4.is_compared(columns, dataset)
    across = [table4.to_table(columns, p, len(params.seeds)) for p in table4.PROTOCOLS] if shown else []
    made = studies.read_studies(params.recipe(dataset), functools.partial(study_file, dataset))
    sections = page_sections(folder, made)
    write_text(folder / "index.html", page.render_page(dataset, experiment, sections, previous, search, across))


def page_sections(folder: Path, made: Sequence[Made]) -> list[Section]:
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
    searched = Picture(
        folder / "trials" / "trials.svg",
        "Every trial",
        "A panel for each setting: the MAP of every trial on the validation classes over the value that was drawn.",
        "Every trial as a point, its MAP on the validation classes over what was drawn; rings are the choice.",
        wide=True,
    )
    space = Picture(
        folder / "curves" / "space.svg",
        "Seen and unseen classes",
        "A row for each line, a point with its interval: MAP on seen and unseen classes, their gap, distances.",
        "After the last epoch, mean over seeds with its 95 % confidence interval. In the first panel blue are the "
        "classes that training has seen, orange those that it has not; the table above has the numbers.",
        wide=True,
    )
    studied = [
        Picture(
            folder / "studies" / f"{study.name}.svg",
            study.name.capitalize(),
            "MAP on validation classes, over the settings that were varied or over epochs.",
            study.caption,
        )
        for study in made
    ]
    return [
        Section("trials", "How the settings were chosen", [searched]),
        Section("studies", "Studies", studied),
        Section("space", "Seen and unseen classes", [space]),
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
