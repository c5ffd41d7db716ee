"""What the last models make of the classes that training has seen, beside those that it has not."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from memvir.reporting.aggregation import confidence_of_mean, seeds_of
from memvir.reporting.figures import COLOURS, house_style, new_figure, save_figure
from memvir.reporting.results import Line

PANELS = {
    "MAP (%): seen and unseen classes": ("train_map", "map"),
    "seen less unseen, MAP": ("map_gap",),
    "distance within classes / between": ("distance_ratio",),
    "spectral decay": ("spectral_decay",),
}
"""Title of a panel -> what it shows; where two things, the first is of the seen classes."""


def draw_space(space: pd.DataFrame, summary: pd.DataFrame, lines: Sequence[Line], stem: Path) -> None:
    """A row for each line: mean over seeds and its 95 % confidence interval, as stem.png and stem.svg.

    Args:
        space, summary: as `aggregation.summarise` gives them.
    """
    shown = [line for line in lines if line.variant in space.index.get_level_values("variant")]
    both = pd.concat([space, summary]).sort_index()
    with house_style():
        figure = new_figure(12.5, 1.6 + 0.36 * len(shown))
        for panel, (title, metrics) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
            for colour, metric in zip(COLOURS, metrics, strict=False):
                _draw_rows(panel, both.loc[metric, "last"], shown, seeds_of(space), colour)
            panel.set_xlabel(title)
            panel.margins(y=0.12)
        sides = [Line2D([], [], linestyle="", marker="o", color=colour) for colour in COLOURS[:2]]
        figure.legend(sides, ["seen classes", "unseen classes"], loc="outside lower left", ncols=2)
        panel.set_yticks(range(len(shown)), [line.title for line in shown])
        panel.invert_yaxis()
        save_figure(figure, stem)


def _draw_rows(panel: Axes, found: pd.DataFrame, lines: Sequence[Line], seeds: Sequence, colour: str) -> None:
    for row, line in enumerate(lines):
        values = found.loc[line.variant, list(seeds)].astype(float).dropna()
        if values.empty:
            continue
        mean, half = confidence_of_mean(values.tolist())
        panel.errorbar(mean, row, xerr=0 if math.isnan(half) else half, fmt="o", color=colour, capsize=3, markersize=4)
