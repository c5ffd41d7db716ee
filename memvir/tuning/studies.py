"""A study: what becomes of the validation classes where settings are varied, or where training goes on for long."""

import itertools
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pandas as pd

from memvir.errors import UserError
from memvir.experiment.identity import of_variant, short
from memvir.experiment.lock import locked
from memvir.experiment.paths import RunFiles, run_files
from memvir.experiment.search_space import Study
from memvir.experiment.settings import Run, Runtime, has_section
from memvir.files import write_text
from memvir.images.index import read_index
from memvir.params import Params
from memvir.progress import Counter
from memvir.tuning.search import processes
from memvir.tuning.validation import validation_index, validation_run

METRICS = ["recall_at_1", "map", "train_recall_at_1", "train_map"]


def make_study(params: Params, dataset: str, name: str, jobs: int) -> pd.DataFrame:
    """Make all runs of a study that are not made yet, `jobs` at a time.

    Returns:
        One row per run and evaluated epoch: `variant`, the settings that are varied (none where the variant has no such
        section), `seed`, `epoch`, and in per cent `recall_at_1` and `map` of the validation classes, and
        `train_recall_at_1` and `train_map` of those that train. A run that diverges has no row.

    Raises UserError if the recipe has no such study.
    """
    recipe = params.recipe(dataset)
    study = recipe.studies.get(name)
    if study is None:
        raise UserError(f"{dataset}.studies: has no {name}; there is {', '.join(recipe.studies) or 'none'}")
    if recipe.tuning is None:
        raise UserError(f"{dataset}.tuning: missing; a study takes its validation classes from there")
    base = params.run(dataset, study.variants[0], study.seeds[0])
    runtime = params.runtime_of(dataset)
    files = run_files(base, runtime)
    index = validation_index(read_index(files.index), recipe.tuning.validation_share, recipe.tuning.seed)
    folder = runtime.scratch / "studies" / dataset
    split = f"{recipe.tuning.validation_share} {recipe.tuning.seed}"
    cells = [(cell, run, _place(folder, run, files, split)) for cell, run in _runs(params, dataset, name, study)]
    counter = Counter(f"{dataset}/{name}", len(cells), "runs", style=runtime.progress)
    lock = locked(folder / f"{name}.lock", "making this study")
    with lock, counter, processes(jobs, base.training.threads) as pool:
        missing = [(run, path) for _, run, path in cells if not path.exists()]
        counter.add(len(cells) - len(missing))
        made = [pool.submit(_make, run, runtime, files, index, path) for run, path in missing]
        for future in as_completed(made):
            future.result()
            counter.add(1, now=True)
    tables = [pd.read_csv(path).assign(**cell) for cell, _, path in cells]
    table = pd.concat(tables, ignore_index=True)
    table[METRICS] = (100 * table[METRICS]).round(2)
    return table[[*cells[0][0], "epoch", *METRICS]]


def _runs(params: Params, dataset: str, name: str, study: Study) -> Iterator[tuple[dict[str, Any], Run]]:
    """Each run, and what tells it from the others."""
    for variant in study.variants:
        base = params.run(dataset, variant, study.seeds[0])
        varied = {key: values for key, values in study.over.items() if has_section(base, key)}
        for values in itertools.product(*varied.values()):
            settings = dict(zip(varied, values, strict=True))
            cell = {"variant": variant, **{key: str(settings[key]) if key in settings else None for key in study.over}}
            for seed in study.seeds:
                run = validation_run(base, settings, seed, study.check_epoch, f"{dataset}.studies.{name}.over")
                yield {**cell, "seed": seed}, run


def _place(folder: Path, run: Run, files: RunFiles, split: str) -> Path:
    """Where a run's history is kept until all are there."""
    return (
        folder / run.variant / f"{short({**of_variant(run, files.index, '-'), 'seed': run.seed, 'split': split})}.csv"
    )


def _make(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame, path: Path) -> None:
    from memvir.tuning.training import validation_history  # late: the process's threads have been set by now

    write_text(path, validation_history(run, runtime, files, index).to_csv(index=False, lineterminator="\n"))
