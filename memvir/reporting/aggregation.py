"""Mean, Diff. and Std. over runs: what tables, curves and pages are made of.

All values are percentages, computed from unrounded values and rounded once. That is the published tables' rule too:
their Diff. is the difference of the means, not of the printed means.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memvir.errors import NotMade
from memvir.experiment.settings import Recipe
from memvir.reporting import results
from memvir.reporting.results import Check, Line, Results

HEADLINE_METRICS = ("recall_at_1", "rp", "map")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Experiment:
    """A data set's results, aggregated: what tables and pages are made of."""

    lines: list[Line]
    """The backbone before training first, if the results tell of it; then the variants."""
    results: Results
    summary: pd.DataFrame
    """What `summarise` gives."""
    checks: list[Check]
    space: pd.DataFrame | None = None
    """What `summarise` gives of the last models' space and of seen classes; None if no result tells of them."""

    @property
    def content(self) -> dict[str, Any]:
        """What a later report is compared with: metrics (`last`), settings and environment."""
        return {
            "metrics": to_metrics(self.summary),
            "settings": results.settings_of(self.results, self.lines),
            "environment": results.environment_of(self.results),
        }


def read_experiment(
    recipe: Recipe,
    variants: Sequence[str],
    seeds: Sequence[int],
    result_file: Callable[[str, int], Path],
    settings: Callable[[str], Mapping[str, Any]],
    trials_file: Callable[[str], Path] | None = None,
) -> Experiment:
    """Read and aggregate the results of a recipe's variants, those that have the variant's present `settings`.

    Raises UserError if there is not one.

    Args:
        trials_file: where the searches are whose sizes `checks` compare; without it they are not.
    """
    files = {(v, seed): result_file(v, seed) for v in variants for seed in seeds}
    found = results.read_results(files)
    stale = results.of_other_settings(found, settings)
    for run in stale:
        del found[run]
    if not found:
        raise NotMade(f"{files[stale[0]].parent.parent}: all results are of other settings than params.yaml has now")
    lines = results.mark_plain(results.table_lines(recipe, variants), found)
    searched = {v: path for v in variants if trials_file and (path := trials_file(v)).exists()}
    sizes = {variant: results.search_size(pd.read_csv(path)) for variant, path in searched.items()}
    checks = results.check_runs(found, lines, seeds, stale, sizes)
    values, space = results.run_values(found, lines, seeds), results.space_values(found, lines, seeds)
    shown = None if space["value"].isna().all() else summarise(space, lines)
    before = results.untrained_values(found, seeds)
    if not before.empty:
        lines = [Line(results.UNTRAINED, "Untrained", "Untrained", None), *lines]
        values = pd.concat([before, values], ignore_index=True)
    return Experiment(lines, found, summarise(values, lines), checks, shown)


def summarise(values: pd.DataFrame, lines: Sequence[Line]) -> pd.DataFrame:
    """Aggregate over seeds.

    Args:
        values: columns protocol, metric, variant, seed, value (per cent; NaN: the run is missing).
        lines: the variants and what each is compared with.

    Returns:
        One row per (metric, protocol, variant): a column per seed, `count` of runs that there are, `mean` and `std`
        (ddof = 1) over those, and for a variant with a baseline its `base_count`, `diff` = mean - baseline's mean with
        the bounds `low` and `high` of its confidence interval, and `p` of Welch's t-test. NaN where something cannot
        be said.
    """
    keys = ["metric", "protocol", "variant"]
    index = pd.MultiIndex.from_frame(values[keys].drop_duplicates())
    runs = values.pivot(index=keys, columns="seed", values="value").reindex(index)[list(values["seed"].unique())]
    summary = runs.assign(count=runs.count(axis=1), mean=runs.mean(axis=1), std=runs.std(axis=1, ddof=1))
    comparison = pd.DataFrame(index=summary.index, columns=["base_count", "diff", "low", "high", "p"], dtype=float)
    for line in lines:
        for metric, protocol, variant in summary.index:
            if variant == line.variant and (metric, protocol, line.baseline) in summary.index:
                ours, base = (runs.loc[metric, protocol, name].dropna() for name in (variant, line.baseline))
                comparison.loc[(metric, protocol, variant)] = [len(base), *welch(ours.tolist(), base.tolist())]
    return summary.join(comparison)


def difference(summary: pd.DataFrame, metric: str, protocol: str, variant: str, other: str) -> pd.Series:
    """The row of a variant with base_count, diff, low, high and p of its comparison with any other variant."""
    ours, base = (
        summary.loc[(metric, protocol, name), seeds_of(summary)].astype(float).dropna() for name in (variant, other)
    )
    row = summary.loc[(metric, protocol, variant)].copy()
    row[["base_count", "diff", "low", "high", "p"]] = [len(base), *welch(ours.tolist(), base.tolist())]
    return row


def welch(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float, float, float]:
    """Difference of the means, bounds of its 95 % confidence interval, and p, for samples of unequal variance.

    The bounds and p are NaN for a sample of one, and where neither sample varies.
    """
    from scipy.special import stdtr, stdtrit  # Student's t without the second that scipy.stats takes to import

    if not ours or not base:
        return (math.nan,) * 4
    difference = sum(ours) / len(ours) - sum(base) / len(base)
    if len(ours) < 2 or len(base) < 2:
        return difference, math.nan, math.nan, math.nan
    squares = [pd.Series(sample).var(ddof=1) / len(sample) for sample in (ours, base)]  # squared standard errors
    error = math.sqrt(sum(squares))
    if error == 0:
        return difference, math.nan, math.nan, math.nan
    freedom = sum(squares) ** 2 / sum(s**2 / (len(n) - 1) for s, n in zip(squares, (ours, base), strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return difference, difference - half, difference + half, float(2 * stdtr(freedom, -abs(difference) / error))


def confidence_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % confidence interval (Student's t), NaN for a single value."""
    from scipy.special import stdtrit

    sample = pd.Series(values)
    half = sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean()), float(stdtrit(max(len(sample) - 1, 1), (1 + CONFIDENCE) / 2)) * half


def to_metrics(summary: pd.DataFrame, protocol: str = "last") -> dict[str, dict[str, dict[str, float]]]:
    """variant -> metric -> {mean, std, diff} of the paper's three metrics: per cent, two decimals.

    What rests on a part of the runs is left out. `last` is the default because it is the honest one, chosen without
    the test set. The other Recall@k are in the tables: `dvc metrics show` gives every value a column.
    """
    expected = len(seeds_of(summary))
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for (metric, row_protocol, variant), row in summary.iterrows():
        if row_protocol != protocol or metric not in HEADLINE_METRICS or row["count"] < expected:
            continue
        names = ("mean", "std") if rests_on(row) < expected else ("mean", "std", "diff")
        values = {name: round(float(row[name]), 2) + 0.0 for name in names if not math.isnan(row[name])}
        metrics.setdefault(variant, {})[metric] = values
    return metrics


def seeds_of(summary: pd.DataFrame) -> list[Any]:
    """The columns of `summarise` that are seeds."""
    return list(summary.columns[: list(summary.columns).index("count")])


def rests_on(row: pd.Series) -> int:
    """How many runs of a variant, or of its baseline where that has fewer, a Diff. is made of."""
    return int(row["count"] if pd.isna(row["base_count"]) else min(row["count"], row["base_count"]))


def headline_metrics(summary: pd.DataFrame) -> list[str]:
    """Those of the paper's three tables that were measured."""
    return [metric for metric in HEADLINE_METRICS if metric in summary.index.get_level_values("metric")]


def metric_title(metric: str) -> str:
    """Recall@1 for recall_at_1, MAP for map."""
    return f"Recall@{metric.removeprefix('recall_at_')}" if metric.startswith("recall_at_") else metric.upper()
