"""Characters drawn in the typefaces that Matplotlib ships, each instance distorted in its own way, byte for byte."""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageFont

from memvir.errors import UserError

# How much instances of a character differ: each is drawn from the middle outwards, evenly up to these limits.
ROTATION = 12.0
"""Degrees, either way."""
SHEAR = 0.2
"""Horizontal shift per unit of height, either way."""
SCALE = (0.75, 1.1)
"""Zoom factor, drawn for width and height together."""
STRETCH = 0.1
"""Width against height, either way."""
SHIFT = 0.08
"""Share of the image's side, either way, in both directions."""
BLUR = 1.0
"""Largest radius of the Gaussian blur at 32 pixels a side; grows with the side."""
NOISE = 0.12
"""Largest standard deviation of the pixel noise, 1 being white."""

COLUMNS = ("class_id", "class_name")

TYPEFACES = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)


def read_characters(path: Path) -> list[str]:
    """The characters that the table names, in the order of their class ids."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it is part of the repository: git checkout -- {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file: {error}") from None
    characters = []
    for line, row in enumerate(rows, 2):
        if row.get("class_id") != str(line - 1):
            raise UserError(f"{path}, line {line}: expected the columns {','.join(COLUMNS)} and class_id {line - 1}")
        found = re.match(r"U\+([0-9A-F]{4,6})\b", row.get("class_name") or "")
        if not found or int(found[1], 16) > 0x10FFFF:
            raise UserError(f"{path}, line {line}: class_name must begin with a code point such as U+0041")
        characters.append(chr(int(found[1], 16)))
    if len(characters) < 2 or len(set(characters)) != len(characters):
        raise UserError(f"{path}: needs at least two characters, each once")
    return characters


def class_name(character: str) -> str:
    """U+0041 LATIN CAPITAL LETTER A"""
    return f"U+{ord(character):04X} {unicodedata.name(character, 'UNNAMED')}"


def render(character: str, class_id: int, count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """`count` instances of a character, (size, size) uint8, white on black.

    An instance depends on the seed, the class and its own number only, so more of them leave the first ones
    as they are. The typefaces take turns.
    """
    drawings = [_draw(character, typeface, 2 * size) for typeface in _typefaces(2 * size)]
    for number in range(count):
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, class_id, number))))
        yield _distort(drawings[number % len(drawings)], size, stream)


def check_coverage(characters: list[str], path: Path) -> None:
    from matplotlib.ft2font import FT2Font

    for name in TYPEFACES:
        charmap = FT2Font(str(_typeface_folder() / name)).get_charmap()
        for character in characters:
            if ord(character) not in charmap:
                raise UserError(
                    f"{path}: {class_name(character)} is not in {name}; choose a character of all typefaces"
                )


def _typeface_folder() -> Path:
    import matplotlib  # late: only rendering needs it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _typefaces(side: int) -> list[ImageFont.FreeTypeFont]:
    """The typefaces at a size whose capitals take 0.6 of the side."""
    folder = _typeface_folder()
    if side not in _CACHE:
        fonts = (folder / name for name in TYPEFACES)
        _CACHE[side] = [ImageFont.truetype(f, round(0.82 * side), layout_engine=ImageFont.Layout.BASIC) for f in fonts]
    return _CACHE[side]


_CACHE: dict[int, list[ImageFont.FreeTypeFont]] = {}


def _draw(character: str, typeface: ImageFont.FreeTypeFont, side: int) -> Image.Image:
    """The character in the middle of a (side, side) image, shrunk where it would not fit."""
    mask, _ = typeface.getmask2(character, mode="L")
    ink = Image.frombytes("L", mask.size, bytes(mask))
    box = ink.getbbox()
    if box is None:
        raise UserError(f"{class_name(character)} leaves no ink in {Path(str(typeface.path)).name}; choose another")
    ink = ink.crop(box)
    room = round(0.86 * side)
    if max(ink.size) > room:
        factor = room / max(ink.size)
        ink = ink.resize([max(1, round(length * factor)) for length in ink.size], Image.Resampling.BOX)
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return canvas


def _distort(drawing: Image.Image, size: int, stream: np.random.Generator) -> np.ndarray:
    angle, shear, zoom, stretch, right, down, blur, noise = stream.random(8).tolist()
    either_way = [2 * value - 1 for value in (angle, shear, stretch, right, down)]
    angle, shear, stretch = math.radians(ROTATION * either_way[0]), SHEAR * either_way[1], STRETCH * either_way[2]
    zoom = SCALE[0] + (SCALE[1] - SCALE[0]) * zoom
    forward = (
        np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        @ np.array([[1.0, shear], [0.0, 1.0]])
        @ np.diag([zoom * (1 + stretch), zoom * (1 - stretch)])
        * (size / drawing.width)
    )
    # Pillow asks where each output pixel comes from: source = inverse @ (output - centre - shift) + source centre
    inverse = np.linalg.inv(forward)
    centre = size / 2 + SHIFT * size * np.array(either_way[3:])
    offset = drawing.width / 2 - inverse @ centre
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = drawing.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(BLUR * blur * size / 32))
    grain = stream.standard_normal((size, size)) * (255 * NOISE * noise)
    return np.clip(np.rint(np.asarray(image) + grain), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A PNG whose bytes are the same with every version of zlib: stored, not compressed."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()
