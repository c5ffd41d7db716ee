"""The search: settings drawn at random, as many for each variant, and the best of them tried again under more seeds.

What is drawn follows from the seed and the number of the trial, so that the table of trials is the same whatever runs
side by side, in which order trials end, and how often the search was stopped. No trial is cut short, for any variant.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from memvir import libraries
from memvir.errors import UserError
from memvir.experiment.identity import of_variant, short
from memvir.experiment.paths import RunFiles, run_files
from memvir.experiment.search_space import Choices, Tuning
from memvir.experiment.settings import Run, Runtime, has_section
from memvir.images.index import read_index
from memvir.params import Params
from memvir.progress import Counter
from memvir.signals import end_with_parent
from memvir.tuning.validation import validation_index, validation_run

DIGITS = 3
"""Significant ones of what is drawn, so that a person can write it down."""


def search(params: Params, dataset: str, variant: str, jobs: int) -> pd.DataFrame:
    """Make all trials that are not made yet, `jobs` at a time.

    Returns:
        One row per run: `trial`, `seed`, the settings, `map` of the validation classes in per cent after the last
        epoch, and `chosen`: whether it is a run of the finalist with the highest mean MAP.

    Raises UserError if the recipe has no `tuning`, or one that does not fit the variant.
    """
    tuning = params.recipe(dataset).tuning
    if tuning is None:
        raise UserError(f"{dataset}.tuning: missing; it says what a search tries")
    base = params.run(dataset, variant, tuning.seeds[0])
    files = run_files(base, params.runtime)
    index = validation_index(read_index(files.index), tuning.validation_share, tuning.seed)
    space = Space(tuning, base)
    study = open_study(params.runtime.scratch / "tuning" / dataset / variant / f"{space.identity(files)}.log")
    counter = Counter(f"{dataset}/{variant}", tuning.runs, "trials", style=params.runtime.progress)
    with counter, processes(jobs, base.training.threads) as pool:

        def make_what_is_missing() -> None:
            runs = {t.number: space.run(t) for t in study.trials if t.state == TrialState.RUNNING}
            counter.add(len(study.trials) - len(runs) - counter.done)
            for number, value in side_by_side(pool, runs, params.runtime, files, index):
                study.tell(number, value)
                counter.add(1, f"MAP {value:.2%}, best {study.best_value:.2%}", now=True)

        for draw in range(len(space.draws(study)), tuning.trials):
            study.sampler = RandomSampler(seed=tuning.seed * 1_000_003 + draw)
            study.ask(space.distributions)
        make_what_is_missing()
        for draw, trial in space.finalists(study):
            for seed in tuning.seeds[1:]:
                content = {"of": draw, "seed": seed}
                if not any(other.user_attrs == content for other in study.trials):
                    study.enqueue_trial(trial.params, user_attrs=content)
                    study.ask(space.distributions)
        make_what_is_missing()
    return space.table(study)


class Space:
    """What is drawn for a variant, and the runs that it makes.

    Args:
        base: the variant's run in the tables, whose other settings a trial shares.
    """

    def __init__(self, tuning: Tuning, base: Run) -> None:
        self.tuning, self.base = tuning, base
        self.dimensions = {key: what for key, what in tuning.space.items() if has_section(base, key)}
        self.distributions: dict[str, BaseDistribution] = {
            key: IntDistribution(0, len(what.choices) - 1)
            if isinstance(what, Choices)
            else FloatDistribution(what.low, what.high, log=what.log)
            for key, what in self.dimensions.items()
        }

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """What was drawn, as a person would write it."""
        return {
            key: what.choices[drawn[key]] if isinstance(what, Choices) else float(f"{drawn[key]:.{DIGITS}g}")
            for key, what in self.dimensions.items()
        }

    def seed(self, trial: FrozenTrial) -> int:
        return trial.user_attrs.get("seed", self.tuning.seeds[0])

    def run(self, trial: FrozenTrial) -> Run:
        return self._run(self.settings(trial.params), self.seed(trial))

    def _run(self, settings: Mapping[str, Any], seed: int) -> Run:
        return validation_run(self.base, settings, seed, None, f"{self.base.dataset}.tuning.space")

    def identity(self, files: RunFiles) -> str:
        """Of all trials: what is drawn replaces what the variant says, so that the choice may be written there.

        How many trials there are is none of it: more of them go on from those that were made.
        """
        lowest = {key: 0 if isinstance(what, Choices) else what.low for key, what in self.dimensions.items()}
        run = self._run(self.settings(lowest), 0)
        tuning = self.tuning.model_dump(mode="json", exclude={"trials", "finalists"})
        tuning["space"] = {key: what for key, what in tuning["space"].items() if key in self.dimensions}
        return short({**of_variant(run, files.index, "-"), "tuning": tuning})

    def draws(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials whose settings were drawn, in this order; the others are finalists under another seed."""
        return [trial for trial in study.trials if "of" not in trial.user_attrs]

    def finalists(self, study: optuna.Study) -> list[tuple[int, FrozenTrial]]:
        draws = list(enumerate(self.draws(study)[: self.tuning.trials]))
        return sorted(draws, key=lambda it: (-(it[1].value or 0), it[0]))[: self.tuning.finalists]

    def table(self, study: optuna.Study) -> pd.DataFrame:
        finalists = [draw for draw, _ in self.finalists(study)]
        trials = list(enumerate(self.draws(study)[: self.tuning.trials]))
        trials += [(of, t) for t in study.trials if (of := t.user_attrs.get("of")) in finalists]
        rows = [
            {
                "trial": draw,
                "seed": self.seed(trial),
                **self.settings(trial.params),
                "map": round(100 * (trial.value or 0), 2),
            }
            for draw, trial in trials
        ]
        table = pd.DataFrame(rows).sort_values(["trial", "seed"], ignore_index=True)
        means = table[table["trial"].isin(finalists)].groupby("trial")["map"].mean()
        return table.assign(chosen=table["trial"] == means.idxmax())


def open_study(journal: Path) -> optuna.Study:
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)


@contextlib.contextmanager
def processes(count: int, threads: int) -> Iterator[Executor]:
    """So many processes of their own; what they are at when a signal or an error comes is not waited for."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _set_up, (threads,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def side_by_side(
    pool: Executor, runs: Mapping[int, Run], runtime: Runtime, files: RunFiles, index: pd.DataFrame
) -> Iterator[tuple[int, float]]:
    """Train runs; (number, MAP) as they end."""
    futures = {pool.submit(_map, run, runtime, files, index): number for number, run in runs.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def _map(run: Run, runtime: Runtime, files: RunFiles, index: pd.DataFrame) -> float:
    from memvir.tuning.training import validation_map  # late: the process's threads have been set by now

    return validation_map(run, runtime, files, index)


def _set_up(threads: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one
    libraries.prepare(threads)
