"""Every loss on every data set by Recall@1, beside the figures of the paper's Table 4; from whatever results there are.

The columns are the data sets that the paper has and those with results; the lines are the paper's and those with
results. A run that is missing is marked, and so are settings: the paper's, tuned, or of our own choice.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memvir.errors import NotMade
from memvir.experiment.settings import TSNE_VARIANT, Recipe
from memvir.losses import DISPLAY_NAMES
from memvir.reporting.aggregation import read_experiment, rests_on
from memvir.reporting.results import CONTROL, Line, table_lines
from memvir.reporting.tables import MISSING, NOTHING, PROTOCOL_TITLES, Table, table4_means

METRIC = "recall_at_1"
PROTOCOLS = ("best", "last")
"""The one that the paper's figures are of comes first."""
PAPERS_LINES = [title for name in DISPLAY_NAMES.values() for title in (name, f"MemVir + {name}")]


@dataclass(frozen=True)
class Column:
    """A data set of the table."""

    dataset: str
    lines: Mapping[str, Line]
    """Loss, as the paper calls it, or a control's title -> the variant that stands for it."""
    summary: pd.DataFrame | None
    """What `summarise` gives; None without any result."""
    published: Mapping[str, float]
    """Loss in lower case -> Recall@1 in the paper's table."""

    def row(self, loss: str, protocol: str) -> pd.Series | None:
        """What `summarise` gives for a loss; None if the data set has no such line, or no run of it."""
        if self.summary is None or loss not in self.lines:
            return None
        row = self.summary.loc[METRIC, protocol, self.lines[loss].variant]
        return row if row["count"] else None


def read_columns(
    recipes: Mapping[str, Recipe],
    variants: Sequence[str],
    seeds: Sequence[int],
    result_file: Callable[[str, str, int], Path],
    settings: Callable[[str, str], Mapping[str, Any]],
) -> list[Column]:
    """The data sets that have a published figure or a result; `variants` come first where several are of one loss."""
    columns = []
    for dataset, recipe in recipes.items():
        names = [name for name in dict.fromkeys([*variants, *recipe.variants]) if name in recipe.variants]
        names = [name for name in names if name != TSNE_VARIANT]
        lines: dict[str, Line] = {}
        for line in table_lines(recipe, names):
            lines.setdefault(line.title if line.loss.endswith(CONTROL) else line.loss, line)
        chosen = [line.variant for line in lines.values()]
        summary = None
        with contextlib.suppress(NotMade):
            file, of_variant = functools.partial(result_file, dataset), functools.partial(settings, dataset)
            summary = read_experiment(recipe, chosen, seeds, file, of_variant).summary
        published = table4_means(dataset)
        if published or summary is not None:
            columns.append(Column(dataset, lines, summary, published))
    return columns


def is_compared(columns: Sequence[Column], dataset: str) -> bool:
    """Whether a data set has others to stand beside: those of the paper, if it is one of them, or others' results."""
    return any(column.published if column.dataset == dataset else column.summary is not None for column in columns)


def losses(columns: Sequence[Column]) -> list[str]:
    """The lines: the paper's, then those of the recipes that have a result."""
    found = [loss for c in columns for loss in c.lines if c.row(loss, "last") is not None]
    return list(dict.fromkeys([*PAPERS_LINES, *found]))


def to_table(columns: Sequence[Column], protocol: str, seeds: int) -> Table:
    """Loss | for each data set: mean ± Std., Diff., and what the paper has."""
    titles = ["Loss"]
    for column in columns:
        titles += [column.dataset, "Diff.", *(["Paper"] if column.published else [])]
    rows = []
    for loss in losses(columns):
        cells = [loss]
        for column in columns:
            row = column.row(loss, protocol)
            if row is None:
                cells += [MISSING if loss in column.lines else NOTHING, NOTHING]
            else:
                spread = "" if math.isnan(row["std"]) else f" ± {row['std']:.2f}"
                cells.append(f"{row['mean']:.2f}{spread}{'' if row['count'] == seeds else '*'}")
                diff = NOTHING if math.isnan(row["diff"]) else f"{round(row['diff'], 2) + 0.0:+.2f}"
                cells.append(f"{diff}{'*' if diff != NOTHING and rests_on(row) < seeds else ''}")
            if column.published:
                value = column.published.get(loss.casefold())
                cells.append(NOTHING if value is None else f"{value:.1f}")
        rows.append(cells)
    notes = [
        f"Mean ± Std. over {seeds} seed{'s' if seeds > 1 else ''} and Diff. to the loss without MemVir; * over those "
        "runs alone that there are. Paper: the best epoch of each run, chosen on the test set.",
        *map(_whose, columns),
    ]
    return Table(f"Recall@1 (%), {PROTOCOL_TITLES[protocol]}", titles, rows, notes)


def to_csv(columns: Sequence[Column]) -> str:
    """A row for each data set, loss and protocol: four decimals, empty where missing."""
    rows: list[tuple] = []
    for column in columns:
        for loss in losses(columns):
            for protocol in PROTOCOLS:
                row, line = column.row(loss, protocol), column.lines.get(loss)
                names = ("count", "mean", "std", "diff")
                values = [0, *[math.nan] * 3] if row is None else [row[name] for name in names]
                settings = (line.variant, line.origin) if line else ("", "")
                rows.append((column.dataset, loss, *settings, protocol, *values, column.published.get(loss.casefold())))
    titles = ["dataset", "loss", "variant", "settings", "protocol", "runs", "mean", "std", "diff", "published"]
    table = pd.DataFrame(rows, columns=titles).astype({"runs": int})
    return table.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def _whose(column: Column) -> str:
    """Whose settings the lines have that this data set shows."""
    origins: dict[str, list[str]] = {}
    for loss, line in column.lines.items():
        if loss in PAPERS_LINES or column.row(loss, "last") is not None:
            origins.setdefault(line.origin, []).append(loss)
    words = {"published": "the paper's", "tuned": "ours, tuned", "untuned": "ours, untuned"}
    parts = [
        f"{words[origin]} for {', '.join(some)}" if len(origins) > 1 else words[origin]
        for origin, some in origins.items()
    ]
    return f"Settings on {column.dataset}: {'; '.join(parts)}."
