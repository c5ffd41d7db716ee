"""How a recipe's settings were chosen: what was searched, every trial, and the choice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from memvir.experiment.search_space import Choices, Range, Tuning
from memvir.experiment.settings import Recipe
from memvir.reporting.figures import COLOURS, house_style, new_figure, save_figure
from memvir.reporting.results import Line
from memvir.reporting.tables import Table

Trials = Mapping[str, pd.DataFrame]
"""variant -> its table of trials, as `memvir.tuning.search` gives it."""
RUN = ["trial", "seed", "map", "chosen"]
"""The columns that are no settings."""
COLUMNS = 3
NO_SEARCH = "No search was made for these: see `origin` of each variant in params.yaml."


def read_trials(files: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """The tables that there are."""
    return {variant: pd.read_csv(path) for variant, path in files.items() if path.exists()}


def protocol(tuning: Tuning, epochs: int) -> str:
    """How the search went, in a paragraph."""
    return (
        f"For each line alike, {tuning.trials} settings were drawn at random and trained for {epochs} epochs on "
        f"{1 - tuning.validation_share:.0%} of the training classes, seed {tuning.seeds[0]}, and judged by MAP on the "
        f"other training classes after the last epoch. The best {tuning.finalists} were trained again under seeds "
        f"{', '.join(map(str, tuning.seeds[1:]))}, and that with the highest mean was chosen. No trial was cut short, "
        "and none has seen an image of a test class. A control has no search of its own."
    )


@dataclass(frozen=True)
class Search:
    text: str
    tables: list[Table]


def describe(recipe: Recipe, lines: Sequence[Line], file: Callable[[str], Path]) -> Search | None:
    """How the search for the settings of these lines went, and its choice; None if there was none."""
    found = read_trials({line.variant: file(line.variant) for line in lines})
    if recipe.tuning is None or not found:
        return None
    text = protocol(recipe.tuning, recipe.training.epochs)
    return Search(text, [choice_table(found, lines), space_table(recipe.tuning, found)])


def space_table(tuning: Tuning, trials: Trials) -> Table:
    """What was drawn from, as far as these searches had it."""
    rows = [
        [key, f"{what.low:g} to {what.high:g}{', on a logarithmic scale' if what.log else ''}"]
        if isinstance(what, Range)
        else [key, " or ".join(map(str, what.choices))]
        for key, what in tuning.space.items()
        if any(key in table for table in trials.values())
    ]
    return Table("What was searched", ["Setting", "Values"], rows, left=2)


def choice_table(trials: Trials, lines: Sequence[Line]) -> Table:
    """A column for each line that was searched: its choice, and what that scored on the validation classes."""
    shown = [line for line in lines if line.variant in trials]
    keys = list(dict.fromkeys(key for line in shown for key in trials[line.variant].columns if key not in RUN))
    chosen = {line.variant: trials[line.variant].query("chosen") for line in shown}
    rows = [[key, *(_cell(chosen[line.variant], key) for line in shown)] for key in keys]
    best = [trials[line.variant]["map"].max() for line in shown]
    scores = [chosen[line.variant]["map"] for line in shown]
    rows += [
        ["trial", *(str(chosen[line.variant]["trial"].iloc[0]) for line in shown)],
        ["validation MAP, mean ± Std.", *(f"{score.mean():.2f} ± {score.std(ddof=1):.2f}" for score in scores)],
        ["best of all trials", *(f"{value:.2f}" for value in best)],
    ]
    return Table("What was chosen", ["Setting", *(line.title for line in shown)], rows, left=1)


def _cell(rows: pd.DataFrame, key: str) -> str:
    return str(rows[key].iloc[0]) if key in rows else "–"


def draw_trials(tuning: Tuning, trials: Trials, lines: Sequence[Line], stem: Path) -> None:
    """A panel for each setting: every trial as a point, its validation MAP over what was drawn, the choice ringed."""
    shown = [line for line in lines if line.variant in trials]
    keys = [key for key in tuning.space if any(key in trials[line.variant] for line in shown)]
    height = -(-len(keys) // COLUMNS)
    with house_style():
        figure = new_figure(3.4 * COLUMNS, 2.6 * height + 0.5)
        panels = list(figure.subplots(height, COLUMNS, sharey=True, squeeze=False).flat)
        for panel, key in zip(panels, keys, strict=False):
            _draw_panel(panel, key, tuning.space[key], trials, shown)
        for panel in panels[len(keys) :]:
            panel.axis("off")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(shown))
        figure.supylabel("MAP on validation classes (%)")
        save_figure(figure, stem)


def _draw_panel(panel: Axes, key: str, what: Range | Choices, trials: Trials, shown: Sequence[Line]) -> None:
    choices = [str(choice) for choice in what.choices] if isinstance(what, Choices) else []
    for number, line in enumerate(shown):
        table = trials[line.variant]
        if key not in table:
            continue
        beside = 0.16 * (number - (len(shown) - 1) / 2)
        places = table[key].map(lambda value: choices.index(str(value))) + beside if choices else table[key]
        colour = COLOURS[number % len(COLOURS)]
        panel.plot(places, table["map"], "o", color=colour, markersize=3, alpha=0.5, label=line.title)
        panel.plot(
            *(column[table["chosen"]] for column in (places, table["map"])),
            "o",
            color=colour,
            markersize=9,
            fillstyle="none",
        )
    if choices:
        panel.set_xticks(range(len(choices)), choices)
    elif isinstance(what, Range) and what.log:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))  # Matplotlib's own would need its mathematics
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(key)
