"""A data set's report as one self-contained page: no network, no scripts, readable on a phone, light and dark."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from memvir.reporting import tables
from memvir.reporting.aggregation import Experiment, headline_metrics, metric_title, seeds_of
from memvir.reporting.results import PROTOCOLS, UNTRAINED, Line
from memvir.reporting.tables import Table
from memvir.reporting.trials import Search

MIME_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
NOT_SET = "–"


@dataclass(frozen=True)
class Picture:
    path: Path
    title: str
    alt: str
    """What it shows, for those who cannot see it."""
    caption: str = ""
    wide: bool = False
    """Scrolls sideways on a narrow screen instead of becoming too small to read."""

    @property
    def source(self) -> str:
        """The picture itself as a data URI."""
        content = base64.b64encode(self.path.read_bytes()).decode()
        return f"data:{MIME_TYPES[self.path.suffix]};base64,{content}"


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    figures: list[Picture]


@dataclass(frozen=True)
class Changes:
    text: str
    tables: list[Table] = field(default_factory=list)


def render_page(
    dataset: str,
    experiment: Experiment,
    sections: Sequence[Section],
    previous: Mapping[str, Any] | None,
    search: Search | None = None,
    across: Sequence[Table] = (),
) -> str:
    """The page as HTML.

    Args:
        sections: figures; those whose file is missing are left out.
        previous: the `content` of the experiment in the report before, None if there is none.
        search: how the settings were chosen, shown in the section `trials`.
        across: this data set beside others.
    """
    summary, lines, current = experiment.summary, experiment.lines, experiment.content
    present = [
        Section(section.anchor, section.title, figures)
        for section in sections
        if (figures := [figure for figure in section.figures if figure.path.exists()])
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    template = environment.from_string((files("memvir.reporting") / "page.html").read_text(encoding="utf-8"))
    metric_tables = [
        (
            metric_title(metric),
            [tables.metric_table(summary, lines, metric, protocol) for protocol in PROTOCOLS],
        )
        for metric in headline_metrics(summary)
    ]
    return template.render(
        dataset=dataset,
        introduction=_introduction(lines, summary),
        verdicts=tables.verdicts(summary, lines),
        checks=experiment.checks,
        metric_tables=metric_tables,
        runs=len(seeds_of(summary)),
        comparison=tables.comparison_table(summary, lines),
        space=tables.space_table(experiment.space, lines),
        published=tables.published_table(summary, lines, dataset),
        all_metrics=[tables.all_metrics_table(summary, lines, protocol) for protocol in PROTOCOLS],
        figures=present,
        search=search,
        across=across,
        changes=describe_changes(current, previous, lines),
        settings=settings_tables(current["settings"], lines),
        versions=_key_value_table("What the runs were made with", current["environment"], "What"),
    )


def _introduction(lines: Sequence[Line], summary: pd.DataFrame) -> str:
    count = len(seeds_of(summary))
    titles = ", ".join(line.title for line in lines if line.variant != UNTRAINED)
    return (
        "Learning with memory-based virtual classes (Ko, Gu, Kim, ICCV 2021): "
        f"{titles}, {count} run{'s' if count > 1 else ''} each. Trained on some "
        "classes of the data set, compared on how well images of other classes find their own kind."
    )


def settings_tables(settings: Mapping[str, Mapping[str, Any]], lines: Sequence[Line]) -> list[Table]:
    """Where the variants differ, a column each, and what they have in common."""
    shown = [line for line in lines if line.variant in settings]
    keys = list(dict.fromkeys(key for flat in settings.values() for key in flat))
    rows, common = [], {}
    for key in keys:
        values = [_text(settings[line.variant].get(key)) for line in shown]
        if len(set(values)) > 1:
            rows.append([key, *values])
        else:
            common[key] = values[0]
    differing = Table(
        "Where the variants differ", ["Setting", *(line.title for line in shown)], rows, left=1 + len(shown)
    )
    both = _key_value_table("What all variants have in common", common)
    return [differing, both] if rows else [both]


def describe_changes(current: Mapping[str, Any], previous: Mapping[str, Any] | None, lines: Sequence[Line]) -> Changes:
    """Metrics, settings and versions that differ from the report before."""
    if previous is None:
        return Changes("There is no earlier report of this data set in the history of this clone.")
    titles = {line.variant: line.title for line in lines}
    metric_rows = []
    for variant, metric in _pairs(current["metrics"], previous["metrics"]):
        after, before = (s["metrics"].get(variant, {}).get(metric, {}).get("mean") for s in (current, previous))
        if after != before:
            change = NOT_SET if None in (after, before) else f"{round(after - before, 2) + 0.0:+.2f}"
            cells = [f"{value:.2f}" if value is not None else NOT_SET for value in (before, after)]
            metric_rows.append([titles.get(variant, variant), metric_title(metric), *cells, change])
    setting_rows = []
    for variant, key in _pairs(current["settings"], previous["settings"]):
        after, before = (_text(s["settings"].get(variant, {}).get(key)) for s in (current, previous))
        if after != before:
            setting_rows.append([key, titles.get(variant, variant), before, after])
    version_rows = []
    for key in dict.fromkeys([*current["environment"], *previous["environment"]]):
        after, before = (_text(summary["environment"].get(key)) for summary in (current, previous))
        if after != before:
            version_rows.append([key, before, after])
    found = [
        Table("Mean after the last epoch (%)", ["Loss", "Metric", "Before", "Now", "Change"], metric_rows, left=2),
        Table("Settings", ["Setting", "Variant", "Before", "Now"], setting_rows, left=4),
        Table("Versions and data", ["What", "Before", "Now"], version_rows, left=3),
    ]
    if not any(table.rows for table in found):
        return Changes("Nothing that these tables show.")
    text = "Compared with the last committed report that differs from this one. "
    if not metric_rows:
        text += "No mean changed."
    return Changes(text.strip(), [table for table in found if table.rows])


def _pairs(*nested: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((outer, inner) for tree in nested for outer, branch in tree.items() for inner in branch))


def _key_value_table(caption: str, content: Mapping[str, Any], what: str = "Setting") -> Table:
    return Table(caption, [what, "Value"], [[key, _text(value)] for key, value in content.items()], left=2)


def _text(value: Any) -> str:
    if value is None:
        return NOT_SET
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
