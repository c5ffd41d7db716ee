"""Tables of a data set's results, in the paper's form: what each cell says, whatever the format.

All values are percentages, printed with two decimals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import pandas as pd

from memvir.reporting.aggregation import difference, headline_metrics, metric_title, rests_on, seeds_of
from memvir.reporting.results import PLAIN, PROTOCOLS, SPACE, Line, comparisons

MISSING = "missing"
NOTHING = "–"
PROTOCOL_TITLES = {
    "last": "after the last epoch",
    "best": "best epoch of each run, chosen on the test set",
}
CONTROL = (
    "(control of ...): the plain loss under the settings that were chosen for that line. Its Diff. is what these "
    "settings do, and that line against it is what MemVir, or whatever it has in its place, does."
)
SEEN = (
    "Seen classes are the training images, cropped as test images are and compared among themselves; the gap is theirs "
    "less that of the test classes. With more images to a class Recall@1 is higher, so where the two have different "
    "numbers of them, compare gaps from line to line. Distances and spectral decay are the test images': the ratio "
    "is small where classes are tight and far apart, the decay where all directions of the space are used."
)
MEANING = (
    "Diff. is the mean of a line's runs minus the mean of those that it is compared with, in percentage points. Its "
    "95 % confidence interval (Welch's t) holds the true differences that these runs are compatible with: where it "
    "contains 0, they do not show that there is one in this metric. p is the probability of a difference at least "
    "this large if there were none; of twenty such tests without any effect about one falls below 0.05. Runs differ "
    "in their seed alone, so this speaks about seeds, not about other data."
)


TWO_SAMPLES = (
    "The published values of Proxy Synthesis are over eight runs, those of MemVir and of the plain losses over five. "
    "Of the plain losses these are the best five of the same eight, metric by metric; over all eight, which Proxy "
    "Synthesis was compared with, their Recall@1 is 83.08 (Norm-SoftMax) and 83.28 (Proxy-NCA)."
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


def metric_table(summary: pd.DataFrame, lines: Sequence[Line], metric: str, protocol: str) -> Table:
    """Loss | 1 | 2 | ... | Mean | Diff. | Std., as in the paper."""
    seeds = seeds_of(summary)
    rows, incomplete = [], []
    for line in lines:
        row = summary.loc[metric, protocol, line.variant]
        mark = "" if row["count"] == len(seeds) else "*"
        diff_mark = "*" if rests_on(row) < len(seeds) else ""
        runs = [MISSING if math.isnan(row[seed]) else f"{row[seed]:.2f}" for seed in seeds]
        rows.append(
            [line.title, *runs, _number(row["mean"], mark), _signed(row["diff"], diff_mark), _number(row["std"], mark)]
        )
        if mark:
            absent = ", ".join(str(seed) for seed in seeds if math.isnan(row[seed]))
            incomplete.append(f"{line.title}: {row['count']:.0f} of {len(seeds)} runs, without seed {absent}")
    notes = [f"* Not over all runs. {'; '.join(incomplete)}."] if incomplete else []
    notes += _notes(lines)
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
    notes = [*(["* Not over all runs."] if marked else []), *_notes(lines)]
    titles = [metric_title(metric) for metric in metrics]
    return Table(f"All metrics (%), mean ± Std., {PROTOCOL_TITLES[protocol]}", ["Loss", *titles], rows, notes)


def comparison_table(summary: pd.DataFrame, lines: Sequence[Line]) -> Table | None:
    """Every Diff. with its confidence interval and p-value, `last` beside `best`; None if nothing is compared."""
    compared = comparisons(lines)
    if not compared:
        return None
    expected = len(seeds_of(summary))
    rows: list[list[str]] = []
    marked = False
    for metric in headline_metrics(summary):
        for line, other in compared:
            cells = [metric_title(metric), line.title, other.title]
            for protocol in PROTOCOLS:
                row = difference(summary, metric, protocol, line.variant, other.variant)
                mark = "*" if rests_on(row) < expected else ""
                marked |= bool(mark)
                cells += [_signed(row["diff"], mark), _interval(row), _p_value(row["p"])]
            rows.append(cells)
    columns = ["Metric", "Loss", "against"]
    for protocol in PROTOCOLS:
        columns += [f"Diff. ({protocol})", "95 % CI", "p"]
    notes = [*(["* Not over all runs."] if marked else []), *_notes(lines), MEANING]
    return Table("Differences, with 95 % confidence intervals and Welch's p", columns, rows, notes, left=3)


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
    notes = ["The published values are the best epoch of each run, chosen on the test set: compare them with `best`."]
    if dataset == "cars196":
        notes.append(TWO_SAMPLES)
    return Table("Beside the published values (%)", columns, rows, [*_notes(lines), *notes], left=2)


def space_table(space: pd.DataFrame | None, lines: Sequence[Line]) -> Table | None:
    """What the last models make of the classes that they have seen beside the others; None if no result tells."""
    if space is None:
        return None
    shown = [line for line in lines if line.variant in space.index.get_level_values("variant")]
    rows = []
    for line in shown:
        cells = [line.title, NOTHING]
        for metric in SPACE:
            row, decimals = space.loc[metric, "last", line.variant], _decimals(metric)
            spread = "" if math.isnan(row["std"]) else f" ± {row['std']:.{decimals}f}"
            cells.append(NOTHING if math.isnan(row["mean"]) else f"{row['mean']:.{decimals}f}{spread}")
        rows.append(cells)
    for line, other in comparisons(shown):
        cells = [line.title, other.title]
        for metric in SPACE:
            row, decimals = difference(space, metric, "last", line.variant, other.variant), _decimals(metric)
            interval = [f"{row[name]:+.{decimals}f}" for name in ("diff", "low", "high")]
            cells.append(NOTHING if math.isnan(row["low"]) else f"{interval[0]} [{interval[1]}, {interval[2]}]")
        rows.append(cells)
    caption = "Classes that training has seen and others, after the last epoch: mean ± Std., and Diff. [95 % CI]"
    return Table(caption, ["Loss", "against", *SPACE.values()], rows, [*_notes(shown), SEEN], left=2)


def _decimals(metric: str) -> int:
    return 2 if metric.startswith(("train_", "recall", "map")) else 3


@dataclass(frozen=True)
class Published:
    mean: float
    text: str


def published_means(dataset: str) -> dict[tuple[str, str], Published]:
    """(metric, loss in lower case) -> what the paper or its release gives for it on that data set."""
    means: dict[tuple[str, str], Published] = {}
    for loss, value in table4_means(dataset).items():
        means["recall_at_1", loss] = Published(value, f"{value:.1f}")
    if dataset == "cars196":
        for row in pd.concat([published_runs(8), published_runs(5)]).itertuples():
            metric = {"Recall@1": "recall_at_1", "RP": "rp", "MAP": "map"}[row.metric]
            spread = "" if math.isnan(row.std) else f" ± {row.std:.2f}"
            means[metric, row.loss.casefold()] = Published(row.mean, f"{row.mean:.2f}{spread}")
    return means


def table4_means(dataset: str) -> dict[str, float]:
    """Loss in lower case -> its Recall@1 in the paper's Table 4; empty for other data sets than the paper's."""
    table = pd.read_csv(str(files("memvir.reporting") / "published_table4_recall_at_1.csv"), index_col="loss")
    return {loss.casefold(): float(value) for loss, value in table.get(dataset, pd.Series(dtype=float)).items()}


def published_runs(number: int = 5) -> pd.DataFrame:
    """On CARS196, of MemVir's release (5) or of Proxy Synthesis's (8): metric, loss, run1 ..., mean and std."""
    name = {5: "published_cars196_runs.csv", 8: "published_eight_runs.csv"}[number]
    return pd.read_csv(str(files("memvir.reporting") / name))


def verdicts(summary: pd.DataFrame, lines: Sequence[Line], protocol: str = "last") -> list[str]:
    """What the comparison of each pair says, metric by metric, as a sentence."""
    sentences = []
    for line, other in comparisons(lines):
        parts = []
        for metric in headline_metrics(summary):
            row = difference(summary, metric, protocol, line.variant, other.variant)
            if math.isnan(row["diff"]):
                parts.append(f"{metric_title(metric)} cannot be compared, as runs are missing")
            elif math.isnan(row["low"]):
                parts.append(f"{metric_title(metric)} {_signed(row['diff'])} (too few runs to judge)")
            else:
                clear = "higher" if row["low"] > 0 else "lower" if row["high"] < 0 else "no clear difference"
                parts.append(f"{metric_title(metric)} {_signed(row['diff'])} ({clear})")
        sentences.append(f"{line.title} against {other.title}: {'; '.join(parts)}.")
    return sentences


def _notes(lines: Sequence[Line]) -> list[str]:
    controls = {line.control for line in lines} & {line.variant for line in lines}
    return [*_plain_notes(lines), *([CONTROL] if controls else [])]


def _plain_notes(lines: Sequence[Line]) -> list[str]:
    seeds = {line.title: ", ".join(map(str, line.plain_seeds)) for line in lines if line.plain_seeds}
    runs = "; ".join(f"{title.removesuffix(PLAIN)}, seed {numbers}" for title, numbers in seeds.items())
    wrappers = " or ".join(dict.fromkeys(line.wrapper for line in lines if line.plain_seeds))
    return [f"{PLAIN} Not {wrappers}: nothing virtual was ever in use in {runs}."] if runs else []


def _number(value: float, mark: str = "") -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}{mark}"


def _signed(value: float, mark: str = "") -> str:
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}{mark}"  # + 0.0: no -0.00


def _interval(row: pd.Series) -> str:
    return NOTHING if math.isnan(row["low"]) else f"{_signed(row['low'])} to {_signed(row['high'])}"


def _p_value(p: float) -> str:
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.0005 else f"{p:.3f}"
