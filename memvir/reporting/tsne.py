"""The embeddings of past steps in two dimensions, a panel per recorded epoch: the paper's figure of MemVir's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from memvir.errors import UserError
from memvir.reporting.figures import house_style, new_figure, save_figure

STEP_COLOURS = ("magenta", "cyan", "orange", "grey", "red", "blue")  # the paper's: current step, -1(M+1), -2(M+1), ...
ITERATIONS = (250, 500)  # early exaggeration and after: openTSNE's defaults


@dataclass(frozen=True)
class Snapshot:
    """What the loss saw at the end of an epoch."""

    epoch: int
    embeddings: np.ndarray  # (P, D)
    step_offset: np.ndarray  # (P,): k for a row of step -k(M+1)
    proxies: np.ndarray  # (C, D)
    num_classes_in_use: int
    step_gap: int  # M


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a run in the order of epochs. Raises UserError if it has none."""
    snapshots = []
    for path in sorted(folder.glob("epoch-*.npz")):
        with np.load(path) as arrays:
            snapshots.append(
                Snapshot(
                    int(path.stem.removeprefix("epoch-")),
                    arrays["embeddings"],
                    arrays["step_offset"],
                    arrays["proxies"],
                    int(arrays["num_classes_in_use"]),
                    int(arrays["step_gap"]),
                )
            )
    if not snapshots:
        raise UserError(f"{folder}: no snapshots; give the variant `snapshots: [epoch, ...]` and train it again")
    return sorted(snapshots, key=lambda snapshot: snapshot.epoch)


def embed_in_two_dimensions(
    points: np.ndarray, perplexity: float, seed: int, iterations: Sequence[int] = ITERATIONS
) -> np.ndarray:
    """t-SNE under the cosine distance, (P, D) -> (P, 2); the same input gives the same output.

    Perplexity is lowered where there are too few points for it. Without two principal components that differ, in one
    dimension or where all points are one, it starts from random places.
    """
    import openTSNE  # takes seconds to import
    from threadpoolctl import threadpool_limits

    early, after = iterations
    points = np.asarray(points, np.float64)
    points = np.where(points.any(axis=1, keepdims=True), points, 1.0)  # zero has no direction: any one will do
    spread = points.shape[1] > 1 and bool(np.ptp(points, axis=0).any())
    with threadpool_limits(1):  # more threads would add up in another order, and t-SNE amplifies every last digit
        tsne = openTSNE.TSNE(
            perplexity=min(perplexity, (len(points) - 1) / 3),
            metric="cosine",
            neighbors="exact",
            initialization="pca" if spread else "random",
            negative_gradient_method="bh",
            early_exaggeration_iter=early,
            n_iter=after,
            n_jobs=1,
            random_state=seed,
        )
        return np.asarray(tsne.fit(points))


def draw_tsne(
    snapshots: Sequence[Snapshot], stem: Path, *, perplexity: float = 30.0, max_points: int = 1000, seed: int = 0
) -> None:
    """A panel per snapshot as stem.png and stem.svg: embeddings coloured by step, class weights as black diamonds.

    At most `max_points` embeddings a panel, drawn at random from `seed`; every class weight is shown.
    """
    offsets = sorted({int(k) for snapshot in snapshots for k in snapshot.step_offset})
    with house_style():
        figure = new_figure(3.9 * len(snapshots), 4.9)
        panels = figure.subplots(1, len(snapshots), squeeze=False)[0]
        for axes, snapshot in zip(panels, snapshots, strict=True):
            _draw_panel(axes, snapshot, perplexity, max_points, seed)
        gap = snapshots[-1].step_gap + 1
        labels = ["current step", *(f"−{k}(M+1) = −{k * gap}" for k in offsets if k > 0)]
        handles = [Line2D([], [], linestyle="", marker="o", color=_colour(k), markersize=5) for k in offsets]
        handles.append(Line2D([], [], linestyle="", marker="D", color="black", markersize=5))
        figure.legend(
            handles,
            [*labels, "class weights"],
            loc="outside lower center",
            ncols=4,
            title="embeddings of training images, by optimiser step",
            title_fontsize=9,
        )
        save_figure(figure, stem)


def _draw_panel(axes: Axes, snapshot: Snapshot, perplexity: float, max_points: int, seed: int) -> None:
    count = len(snapshot.embeddings)
    chosen = np.arange(count)
    if count > max_points:
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[:max_points])
    points = np.concatenate([snapshot.embeddings[chosen], snapshot.proxies])  # (P + C, D)
    places = embed_in_two_dimensions(points, perplexity, seed)
    embeddings, proxies = places[: len(chosen)], places[len(chosen) :]
    order = np.argsort(-snapshot.step_offset[chosen], kind="stable")  # the current step on top
    colours = [_colour(int(k)) for k in snapshot.step_offset[chosen][order]]
    axes.scatter(embeddings[order, 0], embeddings[order, 1], s=9, c=colours, alpha=0.75, linewidths=0)
    axes.scatter(proxies[:, 0], proxies[:, 1], s=15, c="black", marker="D", linewidths=0)
    times = snapshot.num_classes_in_use // len(snapshot.proxies)
    in_use = f"{times if times > 1 else ''}C = {snapshot.num_classes_in_use}"
    axes.set_title(f"epoch {snapshot.epoch}: {in_use} classes in use")
    axes.set_xlabel("t-SNE dimension 1 (no unit)")
    axes.set_ylabel("t-SNE dimension 2 (no unit)")
    axes.set_box_aspect(1)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)


def _colour(offset: int) -> str:
    """Beyond the paper's six steps the colours start again, darker."""
    rounds, position = divmod(offset, len(STEP_COLOURS))
    red, green, blue = (channel * 0.6**rounds for channel in to_rgb(STEP_COLOURS[position]))
    return to_hex((red, green, blue))
