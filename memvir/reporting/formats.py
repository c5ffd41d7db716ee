"""Tables as Markdown, LaTeX, CSV and plain text."""

import re
from collections.abc import Sequence

import pandas as pd
from tabulate import tabulate

from memvir.reporting.aggregation import Experiment, headline_metrics, metric_title
from memvir.reporting.results import PLAIN, PROTOCOLS, Line
from memvir.reporting.tables import (
    PROTOCOL_TITLES,
    Table,
    all_metrics_table,
    comparison_table,
    metric_table,
    published_table,
    space_table,
    verdicts,
)


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
    space = space_table(experiment.space, lines)
    if space:
        parts += ["## Seen and unseen classes", to_markdown(space)]
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
    return text.replace("±", r"$\pm$").replace(PLAIN, r"$\dagger$").replace("−", "$-$").replace("–", "--")
