"""The look that all figures share, and files of theirs that are the same bytes for the same content."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memvir.files import atomic_write
from memvir.reporting.results import Line

# Okabe and Ito's palette, which colour-blind readers tell apart; yellow and black are left out as too pale and too loud
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_DASH = "--"
MEMVIR_DASHES = ("-", "-.", ":")
STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # ships with Matplotlib: the same glyphs on every machine
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "memvir",  # Matplotlib's ids are random otherwise
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Draw and save inside of this: our settings over Matplotlib's defaults, not over the user's matplotlibrc."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of so many inches whose parts make room for each other, without pyplot and its global state."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path, dpi: float = 150) -> None:
    """Write stem.png and stem.svg, without dates."""
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata)
        with atomic_write(stem.with_suffix(f".{suffix}")) as file:
            file.write(_compact(buffer.getvalue()) if suffix == "svg" else buffer.getvalue())


def line_styles(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """variant -> colour and dash: a colour for each loss, dashed without MemVir, solid with."""
    families = list(dict.fromkeys(_family(line) for line in lines))
    styles: dict[str, dict[str, Any]] = {}
    for line in lines:
        before = sum(_family(other) == _family(line) for other in lines[: lines.index(line)] if _is_memvir(other))
        styles[line.variant] = {
            "color": COLOURS[families.index(_family(line)) % len(COLOURS)],
            "linestyle": MEMVIR_DASHES[before % len(MEMVIR_DASHES)] if _is_memvir(line) else BASELINE_DASH,
        }
    return styles


def _is_memvir(line: Line) -> bool:
    return line.loss.startswith("MemVir + ")


def _family(line: Line) -> str:
    return line.loss.removeprefix("MemVir + ")


def _compact(svg: bytes) -> bytes:
    """Without the spaces at line ends that Matplotlib leaves inside of paths, which git would complain about."""
    return re.sub(rb"[ \t]+\n", b"\n", svg)
