"""Mean, Diff. and Std. over runs, and tables of them in the paper's form as Markdown, CSV, LaTeX and plain text.

All values are percentages, printed with two decimals; everything is computed from unrounded values and rounded once.
That is the published tables' rule too: their Diff. is the difference of the means, not of the printed means.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from memvir.config import Recipe
from memvir.reporting import results
from memvir.reporting.results import PROTOCOLS, Check, Line, Results

HEADLINE_METRICS = ("recall_at_1", "rp", "map")
MISSING = "missing"
NOTHING = "–"
PROTOCOL_TITLES = {
    "last": "after the last epoch",
    "best": "best epoch of each run, chosen on the test set",
}
CONFIDENCE = 0.95
MEANING = (
    "Diff. is the mean of the MemVir runs minus the mean of the runs without it, in percentage points. Its 95 % "
    "confidence interval (Welch's t) holds the true differences that these runs are compatible with: where it "
    "contains 0, they do not show that MemVir changes this metric. p is the probability of a difference at least "
    "this large if there were none; of twenty such tests without any effect about one falls below 0.05. Runs differ "
    "in their seed alone, so this speaks about seeds, not about other data."
)


@dataclass(frozen=True)
class Table:
    """A table as text, ready for any format; the first column names the row."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    left: int = 1
    """How many of the first columns hold words rather than numbers."""


@dataclass(frozen=True)
class Experiment:
    """A data set's results, aggregated: what tables and pages are made of."""

    lines: list[Line]
    results: Results
    summary: pd.DataFrame
    """What `summarise` gives."""
    checks: list[Check]

    @property
    def content(self) -> dict[str, Any]:
        """What a later report is compared with: metrics (`last`), settings and environment."""
        return {
            "metrics": to_metrics(self.summary),
            "settings": results.settings_of(self.results, self.lines),
            "environment": results.environment_of(self.results),
        }


def read_experiment(
    recipe: Recipe, variants: Sequence[str], seeds: Sequence[int], result_file: Callable[[str, int], Path]
) -> Experiment:
    """Read and aggregate the results of a recipe's variants. Raises UserError if there is not one."""
    lines = results.table_lines(recipe, variants)
    found = results.read_results({(v, seed): result_file(v, seed) for v in variants for seed in seeds})
    summary = summarise(results.run_values(found, lines, seeds), lines)
    return Experiment(lines, found, summary, results.check_runs(found, lines, seeds))


# ------------------------------------------------------------------------------------------------------- aggregation


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


# ------------------------------------------------------------------------------------------------------------ tables


def metric_title(metric: str) -> str:
    """Recall@1 for recall_at_1, MAP for map."""
    return f"Recall@{metric.removeprefix('recall_at_')}" if metric.startswith("recall_at_") else metric.upper()


def metric_table(summary: pd.DataFrame, lines: Sequence[Line], metric: str, protocol: str) -> Table:
    """Loss | 1 | 2 | ... | Mean | Diff. | Std., as in the paper."""
    seeds = seeds_of(summary)
    rows, incomplete = [], []
    for line in lines:
        row = summary.loc[metric, protocol, line.variant]
        mark = "" if row["count"] == len(seeds) else "*"
        diff_mark = "*" if _rests_on(row) < len(seeds) else ""
        runs = [MISSING if math.isnan(row[seed]) else f"{row[seed]:.2f}" for seed in seeds]
        rows.append(
            [line.title, *runs, _number(row["mean"], mark), _signed(row["diff"], diff_mark), _number(row["std"], mark)]
        )
        if mark:
            absent = ", ".join(str(seed) for seed in seeds if math.isnan(row[seed]))
            incomplete.append(f"{line.title}: {row['count']:.0f} of {len(seeds)} runs, without seed {absent}")
    notes = [f"* Not over all runs. {'; '.join(incomplete)}."] if incomplete else []
    caption = f"{metric_title(metric)} (%), {PROTOCOL_TITLES[protocol]}"
    return Table(caption, ["Loss", *(str(seed) for seed in seeds), "Mean", "Diff.", "Std."], rows, notes)


def all_metrics_table(summary: pd.DataFrame, lines: Sequence[Line], protocol: str) -> Table:
    """Mean ± Std. of every metric, a column each: the other Recall@k beside the three of the main tables."""
    seeds = seeds_of(summary)
    metrics = list(dict.fromkeys(summary.index.get_level_values("metric")))
    rows, marked = [], False
    for line in lines:
        cells = [line.title]
        for metric in metrics:
            row = summary.loc[metric, protocol, line.variant]
            mark = "" if row["count"] == len(seeds) else "*"
            marked |= bool(mark)
            spread = "" if math.isnan(row["std"]) else f" ± {row['std']:.2f}"
            cells.append(MISSING if math.isnan(row["mean"]) else f"{row['mean']:.2f}{spread}{mark}")
        rows.append(cells)
    notes = ["* Not over all runs."] if marked else []
    titles = [metric_title(metric) for metric in metrics]
    return Table(f"All metrics (%), mean ± Std., {PROTOCOL_TITLES[protocol]}", ["Loss", *titles], rows, notes)


def comparison_table(summary: pd.DataFrame, lines: Sequence[Line]) -> Table | None:
    """Every Diff. with its confidence interval and p-value, `last` beside `best`; None if nothing is compared."""
    variants = {line.variant for line in lines}
    compared = [line for line in lines if line.baseline in variants]
    if not compared:
        return None
    expected = len(seeds_of(summary))
    rows: list[list[str]] = []
    marked = False
    for metric in headline_metrics(summary):
        for line in compared:
            cells = [metric_title(metric), line.title]
            for protocol in PROTOCOLS:
                row = summary.loc[metric, protocol, line.variant]
                mark = "*" if _rests_on(row) < expected else ""
                marked |= bool(mark)
                cells += [_signed(row["diff"], mark), _interval(row), _p_value(row["p"])]
            rows.append(cells)
    columns = ["Metric", "Loss"]
    for protocol in PROTOCOLS:
        columns += [f"Diff. ({protocol})", "95 % CI", "p"]
    notes = ["* Not over all runs.", MEANING] if marked else [MEANING]
    return Table("Differences, with 95 % confidence intervals and Welch's p", columns, rows, notes, left=2)


def published_table(summary: pd.DataFrame, lines: Sequence[Line], dataset: str) -> Table | None:
    """The paper's means beside ours, with the difference; None if it has none for this data set."""
    published = published_means(dataset)
    rows = []
    for metric in headline_metrics(summary):
        for line in lines:
            reference = published.get((metric, line.loss.casefold()))
            if reference is None:
                continue
            cells = [metric_title(metric), line.title, reference.text]
            for protocol in ("best", "last"):
                mean = summary.loc[metric, protocol, line.variant]["mean"]
                cells += [_number(mean), _signed(mean - reference.mean)]
            rows.append(cells)
    if not rows:
        return None
    columns = ["Metric", "Loss", "Published", "Ours (best)", "Difference", "Ours (last)", "Difference"]
    note = "The published values are the best epoch of each run, chosen on the test set: compare them with `best`."
    return Table("Beside the published values (%)", columns, rows, [note], left=2)


@dataclass(frozen=True)
class Published:
    mean: float
    text: str


def published_means(dataset: str) -> dict[tuple[str, str], Published]:
    """(metric, loss in lower case) -> what the paper or its release gives for it on that data set."""
    folder = files("memvir.reporting")
    means: dict[tuple[str, str], Published] = {}
    table = pd.read_csv(str(folder / "published_table4_recall_at_1.csv"))
    if dataset in table:
        for loss, value in zip(table["loss"], table[dataset], strict=True):
            means["recall_at_1", loss.casefold()] = Published(float(value), f"{value:.1f}")
    if dataset == "cars196":
        for row in published_runs().itertuples():
            metric = {"Recall@1": "recall_at_1", "RP": "rp", "MAP": "map"}[row.metric]
            means[metric, row.loss.casefold()] = Published(row.mean, f"{row.mean:.2f} ± {row.std:.2f}")
    return means


def published_runs() -> pd.DataFrame:
    """The paper's release on CARS196: metric, loss, run1 ... run5, mean, diff, std."""
    return pd.read_csv(str(files("memvir.reporting") / "published_cars196_runs.csv"))


def verdicts(summary: pd.DataFrame, lines: Sequence[Line], protocol: str = "last") -> list[str]:
    """What the comparison of each pair says, metric by metric, as a sentence."""
    titles = {line.variant: line.title for line in lines}
    sentences = []
    for line in lines:
        if line.baseline not in titles:
            continue
        parts = []
        for metric in headline_metrics(summary):
            row = summary.loc[metric, protocol, line.variant]
            if math.isnan(row["diff"]):
                parts.append(f"{metric_title(metric)} cannot be compared, as runs are missing")
            elif math.isnan(row["low"]):
                parts.append(f"{metric_title(metric)} {_signed(row['diff'])} (too few runs to judge)")
            else:
                clear = "higher" if row["low"] > 0 else "lower" if row["high"] < 0 else "no clear difference"
                parts.append(f"{metric_title(metric)} {_signed(row['diff'])} ({clear})")
        sentences.append(f"{line.title} against {titles[line.baseline or '']}: {'; '.join(parts)}.")
    return sentences


def seeds_of(summary: pd.DataFrame) -> list[Any]:
    """The columns of `summarise` that are seeds."""
    return list(summary.columns[: list(summary.columns).index("count")])


def _rests_on(row: pd.Series) -> int:
    """How many runs of a variant, or of its baseline where that has fewer, a Diff. is made of."""
    return int(row["count"] if pd.isna(row["base_count"]) else min(row["count"], row["base_count"]))


def headline_metrics(summary: pd.DataFrame) -> list[str]:
    """Those of the paper's three tables that were measured."""
    return [metric for metric in HEADLINE_METRICS if metric in summary.index.get_level_values("metric")]


def _number(value: float, mark: str = "") -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}{mark}"


def _signed(value: float, mark: str = "") -> str:
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}{mark}"  # + 0.0: no -0.00


def _interval(row: pd.Series) -> str:
    return NOTHING if math.isnan(row["low"]) else f"{_signed(row['low'])} to {_signed(row['high'])}"


def _p_value(p: float) -> str:
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.0005 else f"{p:.3f}"


# ----------------------------------------------------------------------------------------------------------- formats


def to_text(table: Table) -> str:
    """For a terminal."""
    return "\n".join([table.caption, _tabulate(table, "simple"), *table.notes]) + "\n"


def to_markdown(table: Table) -> str:
    notes = "".join(f"\n{_escape_star(note)}\n" for note in table.notes)
    return f"{_tabulate(table, 'pipe')}\n{notes}"


def to_latex(table: Table, label: str) -> str:
    """A booktabs table, ready to paste into a document that uses the package."""
    tabular = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", _tabulate(table, "latex_booktabs"))
    caption = " ".join([_latex(table.caption) + ".", *map(_latex, table.notes)])
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\label{{{label}}}"]
    return "\n".join([*lines, _symbols(tabular), r"\end{table}"]) + "\n"


def to_csv(summary: pd.DataFrame, lines: Sequence[Line]) -> str:
    """Every metric and protocol as numbers: a row per variant, four decimals, empty where missing."""
    table = summary.astype({"base_count": "Int64"}).reset_index()
    table.insert(3, "loss", table["variant"].map({line.variant: line.title for line in lines}))
    return table.to_csv(index=False, float_format="%.4f", lineterminator="\n")


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
        names = ("mean", "std") if _rests_on(row) < expected else ("mean", "std", "diff")
        values = {name: round(float(row[name]), 2) + 0.0 for name in names if not math.isnan(row[name])}
        metrics.setdefault(variant, {})[metric] = values
    return metrics


def to_terminal(experiment: Experiment, protocol: str = "last") -> str:
    """The paper's three tables and what they say."""
    summary, lines = experiment.summary, experiment.lines
    parts = [to_text(metric_table(summary, lines, metric, protocol)) for metric in headline_metrics(summary)]
    parts += verdicts(summary, lines, protocol)
    parts += [f"Note: {check.text}" for check in experiment.checks if not check.passed]
    return "\n".join(parts) + "\n"


def to_document(experiment: Experiment, dataset: str) -> str:
    """All tables as one Markdown page."""
    summary, lines = experiment.summary, experiment.lines
    notes = [f"- {'' if check.passed else '**Note:** '}{check.text}" for check in experiment.checks]
    parts = [f"# Results on {dataset}", "\n".join(notes)]
    for metric in headline_metrics(summary):
        parts.append(f"## {metric_title(metric)}")
        for protocol in PROTOCOLS:
            parts += [
                f"`{protocol}`: {PROTOCOL_TITLES[protocol]}",
                to_markdown(metric_table(summary, lines, metric, protocol)),
            ]
    comparison = comparison_table(summary, lines)
    if comparison:
        parts += [
            "## Differences",
            to_markdown(comparison),
            "\n".join(f"- {text}" for text in verdicts(summary, lines)),
        ]
    published = published_table(summary, lines, dataset)
    if published:
        parts += ["## Beside the published values", to_markdown(published)]
    parts.append("## All metrics, mean ± Std.")
    for protocol in PROTOCOLS:
        parts += [
            f"`{protocol}`: {PROTOCOL_TITLES[protocol]}",
            to_markdown(all_metrics_table(summary, lines, protocol)),
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def to_latex_document(summary: pd.DataFrame, lines: Sequence[Line], dataset: str) -> str:
    """All tables, for \\input or for pasting one of them."""
    tables = [
        to_latex(metric_table(summary, lines, metric, protocol), f"tab:{dataset}-{metric.replace('_', '-')}-{protocol}")
        for protocol in PROTOCOLS
        for metric in headline_metrics(summary)
    ]
    tables += [
        to_latex(all_metrics_table(summary, lines, protocol), f"tab:{dataset}-all-{protocol}") for protocol in PROTOCOLS
    ]
    for name, table in {
        "differences": comparison_table(summary, lines),
        "published": published_table(summary, lines, dataset),
    }.items():
        if table:
            tables.append(to_latex(table, f"tab:{dataset}-{name}"))
    return "% needs \\usepackage{booktabs}\n\n" + "\n".join(tables)


def _tabulate(table: Table, form: str) -> str:
    align = ["left"] * table.left + ["right"] * (len(table.columns) - table.left)
    if form == "pipe":  # in this one format tabulate does not escape
        table = Table(table.caption, table.columns, [[_escape_star(cell) for cell in row] for row in table.rows])
    return tabulate(table.rows, table.columns, tablefmt=form, colalign=align, disable_numparse=True)


def _escape_star(text: str) -> str:
    return text.replace("*", r"\*").replace("|", r"\|")


def _latex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return _symbols(text.replace("`", ""))


def _symbols(text: str) -> str:
    return text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--")
