"""The search: settings drawn at random, as many for each variant, and the best of them tried again under more seeds.

What is drawn follows from the seed and the number of the trial, so that the table of trials is the same whatever runs
side by side, in which order trials end, and how often the search was stopped. No trial is cut short, for any variant.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from memvir import libraries
from memvir.errors import UserError
from memvir.experiment.identity import of_variant, short
from memvir.experiment.lock import locked
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
    runtime = params.runtime_of(dataset)
    files = run_files(base, runtime)
    index = validation_index(read_index(files.index), tuning.validation_share, tuning.seed)
    space = Space(tuning, base)
    folder = runtime.scratch / "tuning" / dataset / variant
    counter = Counter(f"{dataset}/{variant}", tuning.runs, "trials", style=runtime.progress)
    lock = locked(folder.with_name(f"{variant}.lock"), "at this search")
    with lock, counter, processes(jobs, base.training.threads) as pool:
        study = open_study(folder / f"{space.identity(files)}.log")

        def make_what_is_missing(wanted: Sequence[FrozenTrial]) -> None:
            by_key = {space.key(trial): trial for trial in wanted}  # two draws may be the same run
            known = space.known(study)
            for key, trial in by_key.items():
                if key not in known:
                    study.add_trial(trial)  # one line of the journal: it is there, or it is not
            trials = [trial for key, trial in space.known(study).items() if key in by_key]
            runs = {trial.number: space.run(trial) for trial in trials if trial.state == TrialState.RUNNING}
            counter.add(len(wanted) - len(runs))
            for number, value in side_by_side(pool, runs, runtime, files, index):
                study.tell(number, value)
                counter.add(1, f"MAP {value:.2%}, best {study.best_value:.2%}", now=True)

        make_what_is_missing([space.trial(draw, tuning.seeds[0]) for draw in range(tuning.trials)])
        make_what_is_missing([space.trial(draw, s) for draw in space.finalists(study) for s in tuning.seeds[1:]])
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

    def trial(self, draw: int, seed: int) -> FrozenTrial:
        """One yet to be made, under the settings of a draw: they follow from its number alone."""
        sampler = RandomSampler(seed=self.tuning.seed * 1_000_003 + draw)
        drawn = optuna.create_study(sampler=sampler).ask(self.distributions).params
        return create_trial(
            state=TrialState.RUNNING, params=drawn, distributions=self.distributions, user_attrs={"seed": seed}
        )

    def key(self, trial: FrozenTrial) -> tuple[str, int]:
        """What a trial is known by, in whatever order they were made: its run."""
        return str(self.settings(trial.params)), self.seed(trial)

    def known(self, study: optuna.Study) -> dict[tuple[str, int], FrozenTrial]:
        """The trials that are written down, made or being made.

        Older versions wrote one down key by key: one of which a key is missing was killed on the way and is none.
        """
        trials = [trial for trial in study.trials if trial.params.keys() == self.distributions.keys()]
        trials.sort(key=lambda trial: trial.state == TrialState.COMPLETE)
        return {self.key(trial): trial for trial in trials}

    def finalists(self, study: optuna.Study) -> list[int]:
        """The draws with the highest MAP."""
        known, seed = self.known(study), self.tuning.seeds[0]
        values = [known[self.key(self.trial(draw, seed))].value or 0 for draw in range(self.tuning.trials)]
        return sorted(range(len(values)), key=lambda draw: -values[draw])[: self.tuning.finalists]

    def table(self, study: optuna.Study) -> pd.DataFrame:
        known, finalists = self.known(study), self.finalists(study)
        first, *others = self.tuning.seeds
        runs = [(draw, first) for draw in range(self.tuning.trials)]
        runs += [(draw, seed) for draw in finalists for seed in others]
        trials = [(draw, known[self.key(self.trial(draw, seed))]) for draw, seed in runs]
        rows = [
            {
                "trial": draw,
                "seed": self.seed(trial),
                **{key: str(value) for key, value in self.settings(trial.params).items()},
                "map": round(100 * (trial.value or 0), 2),
            }
            for draw, trial in trials
        ]
        table = pd.DataFrame(rows).sort_values(["trial", "seed"], ignore_index=True)
        means = table[table["trial"].isin(finalists)].groupby("trial")["map"].mean()
        return table.assign(chosen=table["trial"] == means.idxmax())


def open_study(journal: Path) -> optuna.Study:
    """What is written down, for who holds the search's lock; a last line that a kill or a full disk has cut is dropped.

    Raises UserError, naming the file, if it is no journal.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(f"{journal}.lock").unlink(missing_ok=True)  # optuna's own, which would wait 30 seconds for who was killed
    if journal.exists():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{journal}: damaged; remove it, and the same command makes its trials anew") from None


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
