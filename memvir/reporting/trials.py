"""How a recipe's settings were chosen: what was searched, every trial, and the choice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from memvir.experiment.search_space import Choices, Range, Tuning
from memvir.experiment.settings import Recipe
from memvir.reporting.figures import COLOURS, add_legend, house_style, new_figure, save_figure
from memvir.reporting.results import Line, SearchSize, in_words, search_size
from memvir.reporting.tables import Table

Trials = Mapping[str, pd.DataFrame]
"""variant -> its table of trials, as `memvir.tuning.search` gives it."""
RUN = ["trial", "seed", "map", "chosen"]
"""The columns that are no settings."""
COLUMNS = 3
MARKERS = ("o", "^", "s")
"""Of the first lines, of those whose colour is taken by then, and so on."""
NO_SEARCH = "No search was made for these: see `origin` of each variant in params.yaml."


def read_trials(files: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """The tables that there are, settings as text."""
    types = {"trial": int, "seed": int, "map": float}
    tables = {
        variant: pd.read_csv(path, dtype=str, keep_default_na=False).astype(types)
        for variant, path in files.items()
        if path.exists()
    }
    return {variant: table.assign(chosen=table["chosen"] == "True") for variant, table in tables.items()}


def protocol(tuning: Tuning, epochs: int, sizes: Mapping[str, SearchSize]) -> str:
    """How the searches went, title -> size, in a paragraph."""
    size = next(iter(sizes.values()))
    if all(other == size for other in sizes.values()):
        first, *others = sorted(size, key=lambda seed: -size[seed])
        head, seed = f"For each line alike, {size[first]} settings", f", seed {first},"
        again = f"best {size[others[0]]}" if others else ""
        under = f"seeds {', '.join(map(str, others))}"
    else:
        tried = "; ".join(f"{title}: {in_words(size)}" for title, size in sizes.items())
        head, seed = f"The lines were not searched alike (settings tried: {tried}). They", ""
        again, under = "best", "the other seeds"
    chosen = f"The {again} were trained again under {under}, and that with" if again else "That with"
    return (
        f"{head} were drawn at random and trained for {epochs} epochs on {1 - tuning.validation_share:.0%} of the "
        f"training classes{seed} and judged by MAP on the other training classes after the last epoch. {chosen} the "
        "highest mean was chosen. No trial was cut short, and none has seen an image of a test class. A control has no "
        "search of its own."
    )


def changed(tuning: Tuning, trials: Trials) -> list[str]:
    """Keys of `tuning` that are not those of these searches any more, as far as their tables tell."""
    resized = any(search_size(table) != tuning.size for table in trials.values())
    drawn = dict.fromkeys(key for table in trials.values() for key in table if key not in RUN)
    others = [key for key in drawn if not _holds(tuning.space.get(key), _values(trials, key))]
    of_every_line = [key for key in tuning.space if key.startswith(("loss.", "training."))]
    new = [key for key in of_every_line if any(key not in table for table in trials.values())]
    return [*(["trials, finalists or seeds"] if resized else []), *(f"space.{key}" for key in [*others, *new])]


def _values(trials: Trials, key: str) -> list[str]:
    """Those of a setting, as they come."""
    return list(dict.fromkeys(value for table in trials.values() if key in table for value in table[key]))


def _holds(what: Range | Choices | None, values: Sequence[str]) -> bool:
    """Whether all values may have been drawn there."""
    if isinstance(what, Choices):
        return set(values) <= set(map(str, what.choices))
    if what is None or not _numbers(values):
        return False
    low, high = (float(f"{bound:.3g}") for bound in (what.low, what.high))  # as what is drawn is rounded
    return all(low <= float(value) <= high for value in values)


def _numbers(values: Sequence[str]) -> bool:
    return bool(pd.to_numeric(pd.Series(values), errors="coerce").notna().all())


@dataclass(frozen=True)
class Search:
    text: str
    tables: list[Table]


def describe(recipe: Recipe, lines: Sequence[Line], file: Callable[[str], Path]) -> Search | None:
    """How the search for the settings of these lines went, and its choice; None if there was none."""
    found = read_trials({line.variant: file(line.variant) for line in lines})
    if recipe.tuning is None or not found:
        return None
    sizes = {line.title: search_size(found[line.variant]) for line in lines if line.variant in found}
    text = protocol(recipe.tuning, recipe.training.epochs, sizes)
    if keys := changed(recipe.tuning, found):
        text += (
            f" params.yaml has changed since: tuning.{', '.join(keys)}; epochs and shares may be others too. "
            "`python -m stages.tune` makes a search as it is there now."
        )
    return Search(text, [choice_table(found, lines), space_table(recipe.tuning, found)])


def space_table(tuning: Tuning, trials: Trials) -> Table:
    """What was drawn from, as far as these searches had it."""
    rows = [[key, _drawn_from(tuning.space.get(key), _values(trials, key))] for key in _keys(tuning, trials)]
    return Table("What was searched", ["Setting", "Values"], rows, left=2)


def _keys(tuning: Tuning, trials: Trials) -> list[str]:
    """The settings that were drawn, in the order of `tuning`."""
    keys = [*tuning.space, *(key for table in trials.values() for key in table)]
    return [key for key in dict.fromkeys(keys) if key not in RUN and _values(trials, key)]


def _drawn_from(what: Range | Choices | None, values: Sequence[str]) -> str:
    if what is None or not _holds(what, values):
        return "others than in params.yaml now"
    if isinstance(what, Range):
        return f"{what.low:g} to {what.high:g}{', on a logarithmic scale' if what.log else ''}"
    return " or ".join(map(str, what.choices))


def choice_table(trials: Trials, lines: Sequence[Line]) -> Table:
    """A column for each line that was searched: its choice, and what that scored on the validation classes."""
    shown = [line for line in lines if line.variant in trials]
    keys = list(dict.fromkeys(key for line in shown for key in trials[line.variant].columns if key not in RUN))
    chosen = {line.variant: trials[line.variant].query("chosen") for line in shown}
    rows = [[key, *(_cell(chosen[line.variant], key) for line in shown)] for key in keys]
    under_first_seed = [
        table[table["seed"] == table["seed"].mode()[0]] for table in (trials[it.variant] for it in shown)
    ]
    scores = [chosen[line.variant]["map"] for line in shown]
    rows += [
        ["trial", *(str(chosen[line.variant]["trial"].iloc[0]) for line in shown)],
        ["validation MAP, mean ± Std.", *(f"{score.mean():.2f} ± {score.std(ddof=1):.2f}" for score in scores)],
        ["best of all trials, one seed", *(f"{table['map'].max():.2f}" for table in under_first_seed)],
    ]
    return Table("What was chosen", ["Setting", *(line.title for line in shown)], rows, left=1)


def _cell(rows: pd.DataFrame, key: str) -> str:
    return rows[key].iloc[0] if key in rows else "–"


def draw_trials(tuning: Tuning, trials: Trials, lines: Sequence[Line], stem: Path) -> None:
    """A panel for each setting: every trial as a point, its validation MAP over what was drawn, the choice ringed."""
    shown = [line for line in lines if line.variant in trials]
    keys = _keys(tuning, trials)
    height = -(-len(keys) // COLUMNS)
    with house_style():
        figure = new_figure(3.4 * COLUMNS, 2.6 * height + 0.5)
        panels = list(figure.subplots(height, COLUMNS, sharey=True, squeeze=False).flat)
        for panel, key in zip(panels, keys, strict=False):
            _draw_panel(panel, key, tuning.space.get(key), trials, shown)
        for panel in panels[len(keys) :]:
            panel.axis("off")
        add_legend(figure, panels[0], "outside upper center", len(shown))
        figure.supylabel("MAP on validation classes (%)")
        save_figure(figure, stem)


def _draw_panel(panel: Axes, key: str, what: Range | Choices | None, trials: Trials, shown: Sequence[Line]) -> None:
    values, choices = _values(trials, key), []
    if isinstance(what, Choices) or not _numbers(values):
        declared = [str(choice) for choice in what.choices] if isinstance(what, Choices) else []
        choices = list(dict.fromkeys([*declared, *values]))
    for number, line in enumerate(shown):
        table = trials[line.variant]
        if key not in table:
            continue
        beside = min(0.16, 0.7 / len(shown)) * (number - (len(shown) - 1) / 2)
        places = table[key].map(choices.index) + beside if choices else table[key].astype(float)
        again, position = divmod(number, len(COLOURS))
        colour, marker = COLOURS[position], MARKERS[again % len(MARKERS)]
        panel.plot(places, table["map"], marker, color=colour, markersize=3, alpha=0.5, label=line.title)
        panel.plot(
            *(column[table["chosen"]] for column in (places, table["map"])),
            marker,
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
