"""The look that all figures share, and files of theirs that are the same bytes for the same content."""

import contextlib
import functools
import io
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.legend import Legend
from matplotlib.text import Text

from memvir.files import atomic_write
from memvir.reporting.results import CONTROL, Line

# Okabe and Ito's palette, which colour-blind readers tell apart; yellow and black are left out as too pale and too loud
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_DASH = "--"
WRAPPED_DASHES = ("-", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (12, 2)))
CONTROL_DASHES = (":", (0, (1, 3)), (0, (1, 5)), (0, (1, 1, 1, 4)))
FONT = "DejaVu Sans"  # ships with Matplotlib: the same glyphs on every machine
STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 100,
    "font.family": FONT,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "memvir",  # Matplotlib's ids are random otherwise
    "text.parse_math": False,  # a dollar sign in a name is one
}
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font has only a bold face: better than none


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


def add_legend(figure: Figure, axes: Axes, place: Any, columns: int, **options: Any) -> Legend:
    """The legend of `axes` outside of all, in as many as `columns` columns as the figure's width has room for; of small
    letters rather than in a single column, which would leave the panels little height.
    """
    handles, labels = axes.get_legend_handles_labels()
    sizes: list[tuple[int, int | None]] = [(number, None) for number in range(columns, 1, -1)]
    sizes += [(min(2, columns), 8), (min(2, columns), 7)]
    for number, size in sizes:
        legend = figure.legend(handles, labels, loc=place, ncols=number, fontsize=size, **options)
        if legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width:
            return legend
        legend.remove()
    return figure.legend(handles, labels, loc=place, ncols=1, **options)


def save_figure(figure: Figure, stem: Path, dpi: float = 150) -> None:
    """Write stem.png and stem.svg, without dates and with every text in letters that there are."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    for text in texts:
        text.set_text(legible(text.get_text()))
    fonts = list(_fonts({letter for text in texts for letter in text.get_text()}))
    if len(fonts) > 1:
        for text in texts:
            text.set_fontfamily(fonts)
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata)
        with atomic_write(stem.with_suffix(f".{suffix}")) as file:
            file.write(_compact(buffer.getvalue()) if suffix == "svg" else buffer.getvalue())


def legible(text: str) -> str:
    """`text` in letters that figures can show: escaped are those that no installed font has."""
    text = unicodedata.normalize("NFC", text)  # macOS splits accents and Hangul in file names
    lost = set(text).difference("\n", *_fonts(set(text)).values())
    return text.translate({ord(letter): _escaped(letter) for letter in lost})


def _fonts(letters: set[str]) -> dict[str, set[str]]:
    """FONT, then installed fonts for what it lacks (Chinese, Hindi, emoji), and which of `letters` each draws.

    Text that FONT covers looks the same whatever else is installed.
    """
    chain = {FONT: _drawn(FONT, letters)}
    missing = {letter for letter in letters - chain[FONT] if unicodedata.category(letter) != "Cc"}
    if not missing:
        return chain
    _look_for_new_fonts()
    families = sorted({font.name for font in fontManager.ttflist if not font.name.startswith("Last Resort")})
    drawn = {family: _drawn(family, missing) for family in families}
    while any(drawn.values()):
        best = max(drawn, key=lambda family: len(drawn[family]))
        chain[best] = drawn[best]
        drawn = {family: found - chain[best] for family, found in drawn.items()}
    return chain


@functools.cache
def _look_for_new_fonts() -> None:
    """Matplotlib keeps a list of the fonts that were installed when it was first used."""
    for path in set(findSystemFonts()).difference(font.fname for font in fontManager.ttflist):
        with contextlib.suppress(Exception):  # nothing that Matplotlib can draw with
            fontManager.addfont(path)


def _drawn(family: str, letters: set[str]) -> set[str]:
    font = _open_font(fontManager.findfont(FontProperties(family=family)))
    return {letter for letter in letters if font.get_char_index(ord(letter))}


@functools.cache
def _open_font(path: str) -> FT2Font:
    return FT2Font(path)


def _escaped(letter: str) -> str:
    """U+4E2D becomes \\u4e2d, any space a space; controls are left out."""
    category = unicodedata.category(letter)
    if category.startswith("Z"):
        return " "
    return "" if category in ("Cc", "Cf") else letter.encode("ascii", "backslashreplace").decode()


def line_styles(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """variant -> colour and dash: a colour for each loss, dashed alone, solid in a wrapper, dotted for a control; the
    second wrapper and control of a loss have dashes of their own.
    """
    families = list(dict.fromkeys(line.plain_loss for line in lines))
    styles: dict[str, dict[str, Any]] = {}
    for line in lines:
        family = [other for other in lines if other.plain_loss == line.plain_loss and _kind(other) == _kind(line)]
        dashes = _kind(line)
        styles[line.variant] = {
            "color": COLOURS[families.index(line.plain_loss) % len(COLOURS)],
            "linestyle": dashes[family.index(line) % len(dashes)],
        }
    return styles


def _kind(line: Line) -> tuple:
    """The dashes of its kind."""
    if line.wrapper:
        return WRAPPED_DASHES
    return CONTROL_DASHES if line.loss.endswith(CONTROL) else (BASELINE_DASH,)


def _compact(svg: bytes) -> bytes:
    """Without the spaces at line ends that Matplotlib leaves inside of paths, which git would complain about."""
    return re.sub(rb"[ \t]+\n", b"\n", svg)
