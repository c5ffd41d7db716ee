"""What a recipe's studies have found on the validation classes, as figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from memvir.errors import UserError
from memvir.experiment.search_space import Study
from memvir.experiment.settings import Recipe
from memvir.reporting.figures import add_legend, house_style, line_styles, new_figure, save_figure
from memvir.reporting.results import Line, table_lines

SIDES = {"map": "validation classes", "train_map": "the classes that train"}
NO_STUDY = "There is none: `studies` in params.yaml declares them, and `python -m stages.study` makes them."


@dataclass(frozen=True)
class Made:
    """A study that has been made."""

    name: str
    study: Study
    """As it is declared; what was made may be older."""
    lines: list[Line]
    table: pd.DataFrame
    """As `memvir.tuning.studies` gives it."""
    epochs: Mapping[str, int]
    """variant -> those of its runs where the study sets none."""

    @property
    def settings(self) -> list[str]:
        return [key for key in self.table if "." in key]

    @property
    def axes(self) -> list[str]:
        """The settings that it varies."""
        return [key for key in self.settings if len(self.values(key)) > 1]

    def values(self, key: str) -> list[str]:
        """Those of a setting: as they are declared, or as they were made if others were."""
        made = list(self.table[key].dropna().unique())
        declared = [str(value) for value in self.study.over.get(key, [])]
        return declared if set(made) <= set(declared) else made

    @property
    def changed(self) -> list[str]:
        """What differs between the study as it is declared and what was made."""
        over = dict.fromkeys([*self.study.over, *self.settings])
        same = {
            "variants": set(self.study.variants) == set(self.table["variant"]),
            "seeds": set(self.study.seeds) == set(self.table["seed"]),
            **{f"over.{key}": self._made(key) == set(map(str, self.study.over.get(key, []))) for key in over},
        }
        last = self.table.groupby("variant")["epoch"].max()
        if "training.epochs" not in over:
            same["training.epochs"] = all(last[line.variant] == self.epochs[line.variant] for line in self.lines)
        return [key for key, is_same in same.items() if not is_same]

    def _made(self, key: str) -> set[str]:
        return set(self.table[key].dropna()) if key in self.table else set()

    @property
    def last(self) -> pd.DataFrame:
        """Mean, Std. and number of runs of MAP after the last epoch, for every variant and its settings."""
        keys = ["variant", *self.axes]
        ends = self.table.groupby([*keys, "seed"], dropna=False)["epoch"].transform("max")
        table = self.table[self.table["epoch"] == ends]
        return table.groupby(keys, sort=False, dropna=False)["map"].agg(["mean", "std", "count"]).reset_index()

    @property
    def caption(self) -> str:
        seeds = self.table["seed"].nunique()
        fixed = [f"{key} {values[0]}" for key in self.settings if len(values := self.values(key)) == 1]
        shown = "validation classes" if self.axes else "validation classes and on those that train"
        changed = (
            f" Not as params.yaml has it now: {', '.join(self.changed)}; what is not there has diverged or was not "
            f"made, and `python -m stages.study --study {self.name}` makes all of it."
        )
        return (
            f"MAP on {shown}; validation classes are cut from the training classes as in the search for settings; "
            f"mean of {seeds} seed{'s' if seeds > 1 else ''}, ± one sample standard deviation. All else as in the "
            f"tables{', but for ' + ' and '.join(fixed) if fixed else ''}.{changed if self.changed else ''}"
        )


def read_studies(recipe: Recipe, file: Callable[[str], Path]) -> list[Made]:
    """The studies that have been made. Raises UserError if the recipe has a variant of one no more."""
    return [_read(recipe, name, study, file(name)) for name, study in recipe.studies.items() if file(name).exists()]


def _read(recipe: Recipe, name: str, study: Study, path: Path) -> Made:
    settings = [key for key in pd.read_csv(path, nrows=0) if "." in key]
    table = pd.read_csv(path, dtype=dict.fromkeys(settings, str), na_values="", keep_default_na=False)
    made = list(table["variant"].unique())
    variants = [*(v for v in study.variants if v in made), *(v for v in made if v not in study.variants)]
    if gone := [variant for variant in variants if variant not in recipe.variants]:
        raise UserError(
            f"{path}: made with {', '.join(gone)}, which the recipe does not have; remove it or make it anew"
        )
    epochs = {v: recipe.variants[v].training.get("epochs", recipe.training.epochs) for v in variants}
    return Made(name, study, table_lines(recipe, variants), table, epochs)


def draw_study(made: Made, stem: Path) -> None:
    """Where two settings vary a heat map, where one does its values, else curves over epochs: stem.png and stem.svg."""
    draw = (_draw_curves, _draw_values, _draw_heat_maps)[len(made.axes)]
    with house_style():
        draw(made, stem)


def _draw_heat_maps(made: Made, stem: Path) -> None:
    """A panel for each variant that has both settings; what the others reach stands above."""
    down, across = made.axes
    cells = {line: made.last[made.last["variant"] == line.variant] for line in made.lines}
    varied = {line: found for line, found in cells.items() if found[[down, across]].notna().all(axis=None)}
    figure = new_figure(1.5 + 4.8 * len(varied), 4.6)
    values = pd.concat(varied.values())["mean"]
    for panel, (line, found) in zip(figure.subplots(1, len(varied), squeeze=False).flat, varied.items(), strict=True):
        rows, columns = made.values(down), made.values(across)
        means, spreads = (
            found.pivot(index=down, columns=across, values=name).reindex(index=rows, columns=columns)
            for name in ("mean", "std")
        )
        image = panel.imshow(means, cmap="viridis", vmin=values.min(), vmax=values.max(), aspect="auto")
        _write_cells(panel, means, spreads, middle=(values.min() + values.max()) / 2)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel(across)
        panel.set_ylabel(down)
        panel.set_title(line.title)
        panel.grid(visible=False)
    figure.colorbar(image, ax=figure.axes, label="MAP on validation classes (%)")
    others = [f"{line.title}: {_best(f)}" for line, f in cells.items() if line not in varied and len(f)]
    if others:
        figure.suptitle("; ".join(others))
    save_figure(figure, stem)


def _write_cells(panel: Axes, means: pd.DataFrame, spreads: pd.DataFrame, middle: float) -> None:
    for row in range(means.shape[0]):
        for column in range(means.shape[1]):
            mean, std = means.iloc[row, column], spreads.iloc[row, column]
            if pd.isna(mean):  # all of its runs have diverged
                continue
            text = f"{mean:.2f}" + ("" if pd.isna(std) else f"\n± {std:.2f}")
            colour = "white" if mean < middle else "black"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)


def _spread(row: pd.Series) -> str:
    return f"{row['mean']:.2f}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:.2f}")


def _best(found: pd.DataFrame) -> str:
    best = _spread(found.loc[found["mean"].idxmax()])
    return best if len(found) == 1 else f"{best}, the best of {len(found)}"


def _draw_values(made: Made, stem: Path) -> None:
    """A point for each value and variant; a variant without the setting is one line across."""
    (key,) = made.axes
    places = {value: place for place, value in enumerate(made.values(key))}
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    for line, style in _with_styles(made.lines):
        found = made.last[made.last["variant"] == line.variant].fillna({"std": 0.0})
        label = {"label": line.title, "linewidth": 1.6, **style}
        if found[key].isna().all():
            for _, row in found.iterrows():
                axes.axhline(row["mean"], **label)
                axes.axhspan(row["mean"] - row["std"], row["mean"] + row["std"], color=style["color"], alpha=0.15, lw=0)
        else:
            across = found[key].map(places)
            axes.errorbar(across, found["mean"], yerr=found["std"], marker="o", capsize=3, **label)
    axes.set_xticks(range(len(places)), list(places))
    axes.set_xlabel(key)
    axes.set_ylabel("MAP on validation classes (%)")
    add_legend(figure, axes, "outside lower center", 2)
    save_figure(figure, stem)


def _draw_curves(made: Made, stem: Path) -> None:
    figure = new_figure(9.6, 4.2)
    for axes, (metric, classes) in zip(figure.subplots(1, 2), SIDES.items(), strict=True):
        for line, style in _with_styles(made.lines):
            runs = made.table[made.table["variant"] == line.variant]
            curve = runs.groupby("epoch")[metric].agg(["mean", "std"]).reset_index()
            axes.plot(curve["epoch"], curve["mean"], label=line.title, linewidth=1.6, **style)
            spread = curve["std"].fillna(0.0)
            low, high = curve["mean"] - spread, curve["mean"] + spread
            axes.fill_between(curve["epoch"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.set_ylabel(f"MAP on {classes} (%)")
    add_legend(figure, axes, "outside lower center", 2)
    save_figure(figure, stem)


def _with_styles(lines: Sequence[Line]) -> list[tuple[Line, Mapping]]:
    styles = line_styles(lines)
    return [(line, styles[line.variant]) for line in lines]
