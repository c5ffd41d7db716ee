"""Metrics and loss over epochs, and the growth of what is in use beside the batch over steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from memvir.reporting.aggregation import HEADLINE_METRICS, metric_title
from memvir.reporting.figures import add_legend, house_style, line_styles, new_figure, save_figure
from memvir.reporting.results import Line

BAND = "lines: mean over seeds; bands: ± one sample standard deviation"
PER_CENT = 100.0
CURVES = (*HEADLINE_METRICS, "loss")

Histories = Mapping[tuple[str, int], pd.DataFrame]
"""(variant, seed) -> history.csv of a run that there is."""


def read_tables(paths: Mapping[tuple[str, int], Path]) -> dict[tuple[str, int], pd.DataFrame]:
    """The runs' tables (history.csv, growth.csv); those that are missing are left out."""
    return {run: pd.read_csv(path) for run, path in paths.items() if path.exists()}


def mean_curve(histories: Histories, variant: str, column: str) -> pd.DataFrame:
    """epoch, mean, std and count over a variant's runs, at the epochs where each of them has a value.

    Where some runs have stopped early, an average over the others would be one over other runs than before.
    """
    runs = [table.set_index("epoch")[column] for (name, _), table in histories.items() if name == variant]
    if not runs:
        return pd.DataFrame({"epoch": [], "mean": [], "std": [], "count": []})
    wide = pd.concat(runs, axis=1).dropna() * (PER_CENT if column != "loss" else 1.0)
    frame = pd.DataFrame({"mean": wide.mean(axis=1), "std": wide.std(axis=1, ddof=1), "count": len(runs)})
    return frame.rename_axis("epoch").reset_index()


def curves_csv(histories: Histories, lines: Sequence[Line]) -> str:
    """The mean curves in long form: metric, loss, epoch, mean, std; metrics in per cent."""
    tables = []
    for column in CURVES:
        for line in lines:
            curve = mean_curve(histories, line.variant, column).drop(columns="count")
            tables.append(curve.assign(metric=_title(column), loss=line.title))
    frame = pd.concat(tables)[["metric", "loss", "epoch", "mean", "std"]].astype({"epoch": int})
    return frame.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def draw_curves(histories: Histories, lines: Sequence[Line], num_seeds: int, folder: Path) -> None:
    """folder/recall_at_1, rp, map and loss over epochs, each as .png and .svg."""
    with house_style():
        for column in CURVES:
            _draw_curve(histories, lines, num_seeds, column, folder / column)


def _title(column: str) -> str:
    return "training loss" if column == "loss" else f"{metric_title(column)} (%)"


def _draw_curve(histories: Histories, lines: Sequence[Line], num_seeds: int, column: str, stem: Path) -> None:
    """All epochs, and beside them the last third again: curves that rise fast and then differ little need both."""
    curves = {line.variant: mean_curve(histories, line.variant, column) for line in lines}
    curves = {variant: curve for variant, curve in curves.items() if len(curve)}
    last = max(curve["epoch"].max() for curve in curves.values())
    late = {variant: curve[curve["epoch"] >= last * 2 / 3] for variant, curve in curves.items()}
    figure = new_figure(6.4, 4.4)
    if min(len(curve) for curve in late.values()) >= 3:
        axes, close_up = figure.subplots(1, 2, width_ratios=[6, 5])
        _plot(close_up, late, lines, num_seeds)
        close_up.set_title("the last third")
        close_up.set_xlabel("epoch")
        close_up.set_ylabel(_title(column))
        close_up.margins(x=0.02)
    else:  # runs of different length have no last third in common
        axes = figure.subplots()
    _plot(axes, curves, lines, num_seeds)
    axes.set_title("all epochs")
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.set_ylabel(_title(column) if column == "loss" else f"{metric_title(column)} on the test classes (%)")
    title = BAND if num_seeds > 1 else "one seed"
    title += "\nMemVir and its like: over what they add to the batch too" if column == "loss" else ""
    add_legend(figure, axes, "outside lower center", 2, title=title, title_fontsize=8)
    save_figure(figure, stem)


def _plot(axes: Axes, curves: Mapping[str, pd.DataFrame], lines: Sequence[Line], num_seeds: int) -> None:
    styles = line_styles(lines)
    for line in lines:
        if line.variant not in curves:
            continue
        curve, style = curves[line.variant], styles[line.variant]
        count = int(curve["count"].iloc[0])
        label = line.title if count == num_seeds else f"{line.title} ({count} of {num_seeds} runs)"
        axes.plot(curve["epoch"], curve["mean"], label=label, linewidth=1.6, **style)
        spread = curve["std"].fillna(0.0)
        axes.fill_between(
            curve["epoch"],
            curve["mean"] - spread,
            curve["mean"] + spread,
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )


def draw_growth(growths: Histories, histories: Histories, lines: Sequence[Line], stem: Path) -> None:
    """Virtual classes and embeddings in use over steps, for the variants that have any, as stem.png and stem.svg.

    Seeds do not change the growth: each variant shows its first run. The steps shown are those of the growth, with as
    much again around it; what lies before and after is constant.
    """
    runs = {variant: (growths[variant, seed], histories[variant, seed]) for variant, seed in reversed(list(growths))}
    shown = [line for line in lines if line.variant in runs and len(runs[line.variant][0]) > 1]
    with house_style():
        figure = new_figure(6.4, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        if shown:
            _draw_steps(upper, lower, {line: runs[line.variant] for line in shown}, line_styles(lines))
            add_legend(figure, upper, "outside lower center", 2)
        else:
            upper.text(0.5, 0.5, "no run has virtual classes or embeddings", ha="center", transform=upper.transAxes)
        upper.set_title("What the loss sees beside the batch")
        upper.set_ylabel("virtual classes")
        lower.set_ylabel("virtual embeddings")
        lower.set_xlabel("optimiser step")
        save_figure(figure, stem)


def _draw_steps(
    upper: Axes,
    lower: Axes,
    runs: Mapping[Line, tuple[pd.DataFrame, pd.DataFrame]],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    changes = [growth.loc[growth["step"] > 0, "step"] for growth, _ in runs.values()]
    first, last = min(steps.min() for steps in changes), max(steps.max() for steps in changes)
    room = max(last - first, 4)
    final_step = max(history["step"].max() for _, history in runs.values())
    left, right = max(0, first - room), min(last + room, final_step)
    for position, (line, (growth, _)) in enumerate(runs.items()):
        # variants that grow alike stay visible: each is drawn thinner than the one beneath it
        style: dict[str, Any] = {
            "color": styles[line.variant]["color"],
            "linewidth": 1.6 + 1.6 * (len(runs) - 1 - position),
        }
        for axes, column in ((upper, "num_virtual_classes"), (lower, "num_virtual_embeddings")):
            steps, values = [*growth["step"], right], [*growth[column], growth[column].iloc[-1]]
            axes.step(steps, values, where="post", label=line.title, solid_capstyle="butt", **style)
    totals = {line: (growth["num_virtual_classes"].max(), growth) for line, (growth, _) in runs.items()}
    for most, text in sorted({(most, _in_use(line, growth)) for line, (most, growth) in totals.items() if most}):
        place: dict[str, Any] = {"textcoords": "offset points", "xytext": (-2, 5), "ha": "right", "fontsize": 9}
        upper.annotate(f"{text}, to the last step ({final_step})", (right, most), **place)
    lower.annotate(f"none before step {first}", (left, 0), textcoords="offset points", xytext=(4, 5), fontsize=9)
    upper.set_xlim(left, right)
    for axes in (upper, lower):
        axes.set_ylim(bottom=0, top=1.2 * max(axes.get_ylim()[1] / 1.05, 1))


def _in_use(line: Line, growth: pd.DataFrame) -> str:
    """The virtual classes in use at the end; MemVir's come in sets of C, and the first set in use is one."""
    classes = growth["num_virtual_classes"]
    sets = f"{round(classes.max() / classes[classes > 0].iloc[0])}C = " if line.wrapper == "MemVir" else ""
    return f"{sets}{classes.max()}"
