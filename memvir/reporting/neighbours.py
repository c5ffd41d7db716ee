"""Retrieval pictures: queries and their nearest neighbours, by several models side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from memvir.errors import NotMade
from memvir.images.decode import load, read_file
from memvir.reporting.figures import house_style, legible, new_figure, save_figure

HIT, MISS = "#1a7f37", "#c1121f"
KINDS = ("best", "typical", "worst")
# Inches; fixed places rather than a layout engine, so that rows line up across models.
PICTURE, STEP, ROW = 0.88, 0.98, 1.5
MARGIN, BLOCK_GAP, HEADER, FOOTER = 0.35, 0.25, 0.55, 0.3
WIDE = "\0"  # the second half of a wide letter while lines are broken; no name holds it
THUMBNAIL = 80  # pixels of the longer side: a report of photographs stays small


@dataclass(frozen=True)
class Ranking:
    """What one model finds for the chosen queries."""

    title: str
    average_precision: np.ndarray  # (Q,) of the chosen queries, in [0, 1]
    neighbours: np.ndarray  # (Q, k) rows of the images, nearest first


def read_embeddings(path: Path) -> np.ndarray:
    """(T, D) from a run's test_embeddings.npz; UserError if the run has not been trained."""
    try:
        with np.load(path) as arrays:
            return arrays["embeddings"]
    except FileNotFoundError:
        raise NotMade(f"{path}: not found; this run has not been trained") from None


def choose_queries(average_precision: np.ndarray, labels: np.ndarray, per_kind: int) -> list[tuple[str, int]]:
    """Queries by their average precision and nothing else: (kind, row), best first.

    The best are those with the highest value, the worst those with the lowest, the typical those nearest to the
    median. No class is shown twice, equal values go by row, and queries without one (NaN) are never chosen.
    """
    rows = np.flatnonzero(~np.isnan(average_precision))
    values = average_precision[rows]
    orders = {"best": -values, "worst": values, "typical": np.abs(values - np.median(values))}
    chosen: dict[str, list[int]] = {}
    classes: set[object] = set()
    for kind, order in orders.items():
        chosen[kind] = []
        for row in rows[np.argsort(order, kind="stable")]:
            if len(chosen[kind]) < per_kind and labels[row] not in classes:
                chosen[kind].append(int(row))
                classes.add(labels[row])
    return [(kind, row) for kind in KINDS for row in chosen[kind]]


def rank(
    embeddings: Mapping[str, np.ndarray],
    labels: np.ndarray,
    queries: np.ndarray | None = None,
    *,
    per_kind: int = 2,
    num_neighbours: int = 5,
) -> tuple[list[tuple[str, int]], list[Ranking]]:
    """Choose queries by their average precision, averaged over the models so that it favours none, and rank for them.

    Args:
        embeddings: title -> (T, D) of each model.
        labels: (T,) classes.
        queries: (T,) whether an image is one, if the others are a gallery; None: each is compared with all others.
    """
    from threadpoolctl import threadpool_limits

    from memvir import retrieval  # late: faiss

    asked = gallery = np.arange(len(labels))
    if queries is not None:
        asked, gallery = np.flatnonzero(queries), np.flatnonzero(~queries)

    def query(array: np.ndarray) -> np.ndarray | None:
        return None if queries is None else array[asked]

    with threadpool_limits(1):  # the same sums on every machine
        precisions = {
            title: retrieval.average_precision(
                table[gallery], labels[gallery], query=query(table), query_labels=query(labels)
            )
            for title, table in embeddings.items()
        }
        chosen = choose_queries(np.mean(list(precisions.values()), axis=0), labels[asked], per_kind)
        rows = [row for _, row in chosen]
        nearest = min(num_neighbours, len(gallery) - (queries is None))
        rankings = [
            Ranking(
                title,
                precisions[title][rows],
                gallery[retrieval.nearest_neighbours(table[gallery], nearest, query=query(table))[1][rows]],
            )
            for title, table in embeddings.items()
        ]
    return [(kind, int(asked[row])) for kind, row in chosen], rankings


def draw_neighbours(
    queries: Sequence[tuple[str, int]], rankings: Sequence[Ranking], images: pd.DataFrame, folder: Path, stem: Path
) -> None:
    """A row per query: the query, then its neighbours by each model; as stem.png and stem.svg.

    A hit has a solid green frame and a tick, a miss a dashed red frame and a cross.

    Args:
        queries: (kind, row of `images`).
        images: class_id, class_name and file of every test image, in the order of the embeddings.
        folder: what `file` is relative to.
    """
    per_model = rankings[0].neighbours.shape[1]
    lefts = [MARGIN + PICTURE + BLOCK_GAP + block * (per_model * STEP + BLOCK_GAP) for block in range(len(rankings))]
    width = lefts[-1] + per_model * STEP
    height = HEADER + len(queries) * ROW + FOOTER
    classes, names, files = (images[column].tolist() for column in ("class_id", "class_name", "file"))
    with house_style():
        figure = new_figure(width, height, layout=None)

        def place(left: float, row: int) -> Axes:
            bottom = height - HEADER - row * ROW - PICTURE
            return figure.add_axes((left / width, bottom / height, PICTURE / width, PICTURE / height))

        def write(left: float, bottom: float, text: str, size: float = 10, align: str = "left") -> None:
            figure.text(left / width, bottom / height, text, fontsize=size, horizontalalignment=align)

        title = height - HEADER + 0.3
        write(MARGIN, title, "query")
        for left, ranking in zip(lefts, rankings, strict=True):
            write(left, title, f"nearest images by {ranking.title}")
        for number, (kind, row) in enumerate(queries):
            axes = place(MARGIN, number)
            _show(axes, folder / files[row], names[row])
            axes.set_ylabel(kind, fontsize=10)
            for left, ranking in zip(lefts, rankings, strict=True):
                precision = f"average precision {100 * ranking.average_precision[number]:.1f} %"
                write(left, height - HEADER - number * ROW + 0.06, precision, size=8)
                for position, neighbour in enumerate(ranking.neighbours[number]):
                    axes = place(left + position * STEP, number)
                    _show(axes, folder / files[neighbour], names[neighbour])
                    _mark(axes, hit=classes[neighbour] == classes[row])
        legend = "solid green frame, ✓: an image of the query's class;   dashed red frame, ✗: of another class"
        write(width / 2, 0.1, legend, size=9, align="center")
        save_figure(figure, stem, dpi=110)


def _show(axes: Axes, path: Path, name: str) -> None:
    axes.imshow(_thumbnail(path), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(_short(name), fontsize=6.5)


def _mark(axes: Axes, hit: bool) -> None:
    colour, line = (HIT, "-") if hit else (MISS, (0, (2, 1)))
    whole: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=3, linestyle=line, **whole))
    sign: dict[str, Any] = {"color": "white", "fontsize": 8, "ha": "right", "va": "top", "transform": axes.transAxes}
    box: dict[str, Any] = {"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"}
    axes.text(0.97, 0.97, "✓" if hit else "✗", bbox=box, **sign)


def _thumbnail(path: Path) -> np.ndarray:
    """The whole picture, as the network's are decoded, on a white square, so that frames line up."""
    picture = load(read_file(path), str(path))
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    side = max(picture.size)
    square = Image.new(picture.mode, (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square)


def _short(name: str, width: int = 16, lines: int = 3) -> str:
    """A class name in a few short lines of so many letters; Chinese, Japanese and Korean ones take the room of two."""
    words = legible(" ".join(name.replace("_", " ").replace("/", " ").split()))
    padded = "".join(letter + WIDE * (east_asian_width(letter) in "WF") for letter in words)
    wrapped = "\n".join(textwrap.wrap(padded, width, max_lines=lines, placeholder=" …"))
    return wrapped.replace(WIDE, "") or name.strip()
